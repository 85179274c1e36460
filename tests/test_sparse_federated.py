"""A sparse global model stays sparse, and its updates carry what lives and no index."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from cloud.config import MethodChoice, ModelChoice, RunPlan
from cloud.coordination.rounds import RoundPolicy
from cloud.initial import initial_model
from cloud.record.registry import ManifestEntry, Registry
from federation.errors import CodecError, ConfigError
from federation.learning.aggregation.ballot import Ballot, Vote
from federation.learning.aggregation.mean import weighted_mean
from federation.learning.aggregation.sparse import living_mean
from federation.learning.data import LocalData
from federation.learning.methods import method_named
from federation.learning.models import build_model, initial_weights, load_weights
from federation.learning.support import support_of, within_support
from federation.learning.training import batches, train_locally
from federation.learning.uplink import absolute, pack_update, unpack_update
from federation.protocol import codec
from federation.protocol.codec import Weights
from federation.protocol.messages import LocalPlan, Uplink

MODEL = ModelChoice(name="mlp", sizes={"inputs": 64, "hidden": 96, "classes": 10})
KEPT = 0.1


def pruned(seed: int = 0) -> Weights:
    """The model with the smallest nine tenths of every matrix dead."""
    whole = initial_weights(MODEL, seed)
    least = {n: np.quantile(np.abs(t), 1 - KEPT) for n, t in whole.items() if t.ndim > 1}
    masks = {n: np.abs(whole[n]) >= bound for n, bound in least.items()}
    return within_support(whole, masks)


def samples(seed: int, count: int = 70) -> LocalData:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 64), np.float32)
    return LocalData(x, rng.integers(0, 10, count))


PLAIN = Uplink()


def plan(seed: int = 0, uplink: Uplink = PLAIN) -> LocalPlan:
    return LocalPlan(
        model=MODEL,
        method="sparse",
        seed=seed,
        epochs=2,
        batch_size=16,
        learning_rate=0.1,
        momentum=0.9,
        weight_decay=1e-3,
        uplink=uplink,
    )


def living(weights: Weights) -> int:
    return sum(int((t != 0).sum()) if t.ndim > 1 else t.size for t in weights.values())


def masked_dense(base: Weights, data: LocalData, asked: LocalPlan) -> Weights:
    """Plain SGD by torch on dense tensors, with gradients and weights masked by hand."""
    torch = pytest.importorskip("torch")
    model = load_weights(build_model(asked.model), base)
    masks = {n: torch.tensor(alive) for n, alive in support_of(base).items()}
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=asked.learning_rate,
        momentum=asked.momentum,
        weight_decay=asked.weight_decay,
    )
    for places in batches(asked, data.samples):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            model(torch.tensor(data.x[places])), torch.tensor(data.y[places])
        )
        loss.backward()
        for name, parameter in model.named_parameters():
            if name in masks:
                parameter.grad *= masks[name]
        optimizer.step()
    return {name: t.detach().numpy() for name, t in model.state_dict().items()}


def test_what_is_dead_stays_exactly_zero_and_the_rest_learns() -> None:
    """Momentum and weight decay move no dead entry; living ones go where masked SGD takes them."""
    base, data = pruned(), samples(1)
    trained = train_locally(base, data, plan()).weights
    expected = masked_dense(base, data, plan())

    for name, alive in support_of(base).items():
        assert not trained[name][~alive].any()
        assert (trained[name] != base[name])[alive].mean() > 0.9
    for name in base:
        np.testing.assert_allclose(trained[name], expected[name], atol=2e-6)


def test_the_hub_averages_as_with_dense_masked_updates() -> None:
    """What comes out of a round is bit for bit the mean of the devices' dense masked models."""
    base, sizes = pruned(), (70, 33, 51)
    trained = [
        train_locally(base, samples(i, size), plan(i)).weights for i, size in enumerate(sizes)
    ]
    heard = [
        unpack_update(pack_update(one, base, plan(i), {}, {})[0], base, plan(i))
        for i, one in enumerate(trained)
    ]

    def votes(updates: list[Weights]) -> tuple[Vote, ...]:
        return tuple(Vote(f"d{i}", u, sizes[i]) for i, u in enumerate(updates))

    ours = living_mean(Ballot(base, votes(heard))).weights
    dense = weighted_mean(Ballot(base, votes(trained))).weights
    assert all(np.array_equal(ours[name], dense[name]) for name in base)
    assert living(ours) == living(base)


def test_no_entry_dies_because_updates_cancel_out() -> None:
    """Devices that send opposites leave every living entry alive, and next to nothing in it."""
    base = pruned()
    votes = tuple(
        Vote(name, {n: np.float32(sign) * t for n, t in base.items()}, 10)
        for name, sign in (("a", 1.0), ("b", -1.0))
    )
    after = living_mean(Ballot(base, votes)).weights

    for name, alive in support_of(base).items():
        assert np.array_equal(after[name] != 0, alive)
        assert np.abs(after[name]).max() < 1e-37


@pytest.mark.parametrize("encoding", ["dense", "int8"])
@pytest.mark.parametrize("delta", [False, True])
def test_an_update_takes_the_kept_share_of_the_bytes(
    encoding: Literal["dense", "int8"], *, delta: bool
) -> None:
    """Beside names and digests, an update is so many bytes for each living entry, no index."""
    base = pruned()
    asked = plan(uplink=Uplink(encoding=encoding, delta=delta))
    trained = train_locally(base, samples(1), asked).weights
    data, _ = pack_update(trained, base, asked, {}, {})
    update = absolute(unpack_update(data, base, asked), base, asked.uplink)

    each = 4 if encoding == "dense" else 1
    alive, whole = living(base), sum(t.size for t in base.values())
    around = len(codec.encode({n: np.zeros(0, np.float32) for n in base})) + 400
    assert each * alive <= len(data) <= each * alive + around
    assert alive / whole == pytest.approx(KEPT, abs=0.03)
    for name, keep in support_of(base).items():
        assert not update[name][~keep].any()
        if encoding == "dense":
            np.testing.assert_allclose(update[name], trained[name], atol=1e-6)


def test_the_largest_entries_and_the_residual_stay_where_the_model_lives() -> None:
    """With top_k and error feedback, positions travel, and nothing is owed to dead entries."""
    base = pruned()
    asked = plan(uplink=Uplink(delta=True, top_k=0.02, residual=True))
    trained = train_locally(base, samples(1), asked).weights
    data, owed = pack_update(trained, base, asked, {}, {})
    update = unpack_update(data, base, asked)

    for name, keep in support_of(base).items():
        assert not owed[name][~keep].any()
        assert not update[name][~keep].any()
        np.testing.assert_allclose(owed[name] + update[name], trained[name] - base[name], atol=1e-6)


def test_life_in_a_dead_entry_is_refused() -> None:
    """The hub takes no update that revives an entry, or that another mask was used for."""
    base, other = pruned(), pruned(seed=5)
    whole = {name: np.ones_like(tensor) for name, tensor in base.items()}
    with pytest.raises(CodecError, match="where the base is zero"):
        unpack_update(codec.encode(whole), base, plan())
    with pytest.raises(CodecError, match="mask"):
        unpack_update(pack_update(other, other, plan(), {}, {})[0], base, plan())


def test_a_matrix_that_died_altogether_travels_as_nothing() -> None:
    """An empty tensor makes the way there and back, in either encoding."""
    base = {n: np.zeros_like(t) if t.ndim > 1 else t for n, t in pruned().items()}
    for uplink in (Uplink(), Uplink(encoding="int8")):
        asked = plan(uplink=uplink)
        update = unpack_update(pack_update(base, base, asked, {}, {})[0], base, asked)
        assert all(not update[name].any() for name, t in base.items() if t.ndim > 1)


def starting_plan(start: str, model: ModelChoice = MODEL) -> RunPlan:
    return RunPlan(
        name="run",
        rounds=1,
        model=model,
        policy=RoundPolicy(devices_per_round=2, quorum=2),
        method=MethodChoice(name="sparse"),
        start=start,
    )


def test_a_run_starts_from_a_model_of_the_registry(tmp_path: Path) -> None:
    """A pruned model that was trained at the hub is the one that a run begins with."""
    registry, base = Registry(tmp_path), pruned()
    entry = ManifestEntry(round=0, weights=registry.put(codec.encode(base)))
    registry.write_manifest("fashion-sparse", [entry])

    begun = codec.decode(initial_model(starting_plan("fashion-sparse"), registry))

    assert all(np.array_equal(begun[name], tensor) for name, tensor in base.items())
    assert method_named("sparse").keeps_zeros
    with pytest.raises(ConfigError, match="no model of that name"):
        initial_model(starting_plan("another"), registry)
    with pytest.raises(ConfigError, match="no model of that name"):
        initial_model(starting_plan("fashion-sparse"))
    wider = ModelChoice(name="mlp", sizes={**MODEL.sizes, "hidden": 97})
    with pytest.raises(ConfigError, match="not that of"):
        initial_model(starting_plan("fashion-sparse", wider), registry)
