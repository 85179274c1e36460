"""The layer: equal to a dense reference, whoever stands beside whom, by every kernel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from federation.errors import ConfigError
from moe_serving.kernels.grouped import pack_grouped
from moe_serving.kernels.registry import best_kernel, kernel_named, kernels, serve_resident
from moe_serving.layers.experts import (
    Activation,
    ExpertShape,
    GroupedExperts,
    ResidentStore,
    StoredExperts,
)
from moe_serving.layers.gating import balance_loss, choose, route, sort_by_expert, z_loss
from moe_serving.layers.moe import MoELayer

ACTIVATIONS: list[Activation] = ["relu", "gelu", "swiglu"]
EIGHT_BIT = [k.name for k in kernels().values() if k.precision == "8bit" and k.is_usable()]
EXACT = [k.name for k in kernels().values() if k.precision == "exact" and k.is_usable()]
LARGEST_ERROR = {"relu": 0.03, "gelu": 0.04, "swiglu": 0.06}


def new_layer(
    n_experts: int = 6,
    top_k: int = 2,
    activation: Activation = "swiglu",
    *,
    seed: int = 0,
    is_normalised: bool = True,
    width: int = 32,
) -> MoELayer:
    torch.manual_seed(seed)
    shape = ExpertShape(width, 2 * width, activation)
    return MoELayer(0, n_experts, top_k, shape, is_normalised=is_normalised)


def dense_reference(x_TD: Tensor, layer: MoELayer) -> Tensor:
    """Every expert answers every token; what the router did not choose counts zero."""
    grouped = layer.experts
    assert isinstance(grouped, GroupedExperts)
    probability_TE = F.linear(x_TD, layer.router.weight).softmax(dim=-1)
    top_TK, chosen_TK = probability_TE.topk(layer.router.top_k, dim=-1)
    if layer.router.is_normalised:
        top_TK = top_TK / top_TK.sum(dim=-1, keepdim=True)
    weight_TE = torch.zeros_like(probability_TE).scatter(1, chosen_TK, top_TK)
    h_TER = torch.einsum("td,erd->ter", x_TD, grouped.w_in_ERD)
    match layer.shape.activation:
        case "relu":
            h_TEF = h_TER.clamp(min=0)
        case "gelu":
            h_TEF = 0.5 * h_TER * (1 + torch.erf(h_TER / 2**0.5))
        case "swiglu":
            gate, up = h_TER.split(layer.shape.d_expert, dim=-1)
            h_TEF = gate * torch.sigmoid(gate) * up
    return torch.einsum("te,tef,edf->td", weight_TE, h_TEF, grouped.w_out_EDF)


def inputs(tokens: int, width: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(0, 70),
    n_experts=st.integers(1, 8),
    top_k=st.integers(1, 4),
    activation=st.sampled_from(ACTIVATIONS),
    is_normalised=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_layer_equals_a_dense_reference(
    tokens: int, n_experts: int, top_k: int, activation: Activation, is_normalised: bool, seed: int
) -> None:
    """Training's path and every exact kernel give what every expert on every token gives."""
    top_k = min(top_k, n_experts)
    layer = new_layer(n_experts, top_k, activation, seed=seed, is_normalised=is_normalised)
    x_TD = inputs(tokens, seed=seed)
    expected = dense_reference(x_TD, layer)
    grouped = layer.experts
    assert isinstance(grouped, GroupedExperts)

    torch.testing.assert_close(layer(x_TD), expected, rtol=1e-4, atol=1e-5)
    for name in EXACT:
        layer.experts = grouped
        serve_resident([layer], kernel_named(name))
        torch.testing.assert_close(layer(x_TD), expected.detach(), rtol=1e-4, atol=1e-5)


def test_one_expert_may_take_everything() -> None:
    """A router that sends all tokens to one expert leaves the others untouched."""
    layer = new_layer(top_k=1)
    layer.router.weight.data.zero_()
    layer.router.weight.data[3] = 5
    x_TD = inputs(40).abs()

    plan = route(x_TD, layer.router)

    assert plan.counts_E.tolist() == [0, 0, 0, 40, 0, 0]
    torch.testing.assert_close(layer(x_TD), dense_reference(x_TD, layer), rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 50), n_experts=st.integers(1, 9), top_k=st.integers(1, 3),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_a_plan_holds_every_assignment_once(
    tokens: int, n_experts: int, top_k: int, seed: int
) -> None:
    """Nothing is dropped or padded: the plan is the choice, ordered by expert, then token."""
    rng = np.random.default_rng(seed)
    top_k = min(top_k, n_experts)
    logits_TE = torch.from_numpy(rng.normal(size=(tokens, n_experts)))
    choice = choose(logits_TE, top_k, is_normalised=True)

    plan = sort_by_expert(choice)

    pairs = [(e, t) for t, experts in enumerate(choice.expert_TK.tolist()) for e in experts]
    in_order = np.repeat(np.arange(n_experts), plan.counts_E.numpy()).tolist()
    assert list(zip(in_order, plan.token_N.tolist(), strict=True)) == sorted(pairs)
    assert sorted(plan.order_N.tolist()) == list(range(tokens * top_k))
    assert plan.offsets_E.tolist() == np.cumsum(plan.counts_E.numpy()).tolist()
    assert torch.equal(plan.weight_N, choice.weight_TK.flatten()[plan.order_N])


@pytest.mark.parametrize("name", [*EXACT, *EIGHT_BIT])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_permuting_the_batch_permutes_the_answers(name: str, activation: Activation) -> None:
    """Which row a token stands in does not matter to its answer."""
    layer = new_layer(activation=activation)
    serve_resident([layer], kernel_named(name))
    x_TD = inputs(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))

    permuted = layer(x_TD[order])

    torch.testing.assert_close(permuted, layer(x_TD)[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*EXACT, *EIGHT_BIT])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_answer_does_not_depend_on_batch_mates(name: str, activation: Activation) -> None:
    """A row alone gets what it gets among rows a thousand times as large.

    Exactly but for the order of sums; in 8 bits a level of one activation may differ by that.
    """
    layer = new_layer(activation=activation)
    serve_resident([layer], kernel_named(name))
    x_TD = inputs(96) * torch.logspace(-2, 1, 96)[:, None]

    together = layer(x_TD)

    alone = torch.cat([layer(x_TD[t : t + 1]) for t in range(96)])
    largest_T1 = together.abs().amax(dim=1, keepdim=True)
    assert ((alone - together).abs() / largest_T1).max() < (1e-5 if name in EXACT else 1e-2)


@pytest.mark.parametrize("name", EIGHT_BIT)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_eight_bits_are_close(name: str, activation: Activation) -> None:
    """8-bit experts are off by a few percent of the answer's norm on random weights."""
    layer = new_layer(activation=activation, width=128)
    x_TD = inputs(80, width=128)
    exact = layer(x_TD).detach()

    serve_resident([layer], kernel_named(name))

    error = (layer(x_TD) - exact).norm() / exact.norm()
    assert 0 < error < LARGEST_ERROR[activation]


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_eight_bits_serve_no_tokens_and_silent_ones(name: str) -> None:
    """No rows give no rows, and a row of zeros gives zeros, not NaN."""
    layer = new_layer()
    serve_resident([layer], kernel_named(name))

    assert layer(torch.zeros(0, 32)).shape == (0, 32)
    assert torch.equal(layer(torch.zeros(3, 32)), torch.zeros(3, 32))


@pytest.mark.parametrize("name", [*EXACT, *EIGHT_BIT])
def test_half_precision_weights_are_served_by_every_kernel(name: str) -> None:
    """A layer in bfloat16 gets answers in bfloat16, close to its own in float32."""
    layer = new_layer(width=64)
    x_TD = inputs(30, width=64)
    exact = layer(x_TD).detach()
    layer.bfloat16()

    serve_resident([layer], kernel_named(name))

    answer = layer(x_TD.bfloat16())
    assert answer.dtype == torch.bfloat16
    assert (answer.float() - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_grouped_products_equal_the_loop(tokens: int, activation: Activation) -> None:
    """The kernel for CUDA, run on the CPU here, gives what one expert at a time gives."""
    layer = new_layer(activation=activation)
    x_TD = inputs(tokens)
    expected = layer(x_TD).detach()
    assert isinstance(layer.experts, GroupedExperts)

    layer.serve_from(pack_grouped(layer.experts, top_k=2))

    torch.testing.assert_close(layer(x_TD), expected, rtol=1e-4, atol=1e-5)


def test_the_order_of_visits_changes_no_bit() -> None:
    """Experts may come from a store in any order: the answers have the same bits."""
    layer = new_layer(n_experts=8, top_k=4)
    grouped = layer.experts
    assert isinstance(grouped, GroupedExperts)
    pack = best_kernel(is_single=True).pack
    assert pack is not None
    packed = [pack(grouped.weights_of(e), "swiglu") for e in range(8)]

    class Backwards(ResidentStore):
        def visit(self, layer, counts_E):  # type: ignore[no-untyped-def]
            return reversed(list(super().visit(layer, counts_E)))

    x_TD = inputs(70)
    plan = route(x_TD, layer.router)
    forwards = StoredExperts(ResidentStore([packed]), 0)(x_TD, plan)

    assert torch.equal(StoredExperts(Backwards([packed]), 0)(x_TD, plan), forwards)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_dense_reference(activation: Activation) -> None:
    """Router and experts learn from the sparse layer what the dense reference teaches them."""
    layer = new_layer(activation=activation)
    x_TD = inputs(30)
    wanted = torch.autograd.grad(dense_reference(x_TD, layer).square().sum(), layer.parameters())

    found = torch.autograd.grad(layer(x_TD).square().sum(), layer.parameters())

    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_losses_of_balance() -> None:
    """The balance loss is 1 when all is even and E when one expert has all; z-loss grows."""
    even = choose(torch.eye(4).repeat(5, 1) * 1e-4, 1, is_normalised=False)
    one = choose(torch.tensor([[50.0, 0, 0, 0]]).repeat(20, 1), 1, is_normalised=False)

    assert balance_loss(even).item() == pytest.approx(1, abs=1e-3)
    assert balance_loss(one).item() == pytest.approx(4, abs=1e-3)
    assert z_loss(one).item() == pytest.approx(2500, rel=1e-3)


def test_a_watcher_sees_every_plan() -> None:
    """`watch` is told the layer's number, its input and the plan before the experts run."""
    layer = new_layer()
    seen = []
    layer.watch = lambda number, x_TD, plan: seen.append((number, x_TD, plan))
    x_TD = inputs(9)

    layer(x_TD)

    (number, told, plan), = seen  # fmt: skip
    assert number == 0
    assert told is x_TD
    assert plan.counts_E.sum() == 18


def test_kernels_are_looked_up_strictly() -> None:
    """A name that is no kernel's, a device without one, and a second packing are refused."""
    layer = new_layer()
    serve_resident([layer], best_kernel())

    with pytest.raises(ConfigError, match="no kernel is called 'magic'; there are runtime"):
        kernel_named("magic")
    with pytest.raises(ConfigError, match="no exact kernel for 'tpu'"):
        best_kernel("tpu")
    with pytest.raises(ConfigError, match="layer 0 is served from a store already"):
        serve_resident([layer], best_kernel())
