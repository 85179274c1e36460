"""Checkpoints: what is saved is what is loaded, what is damaged is refused, theirs are ours."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from federation.errors import StoreError
from moe_serving.checkpoint import expert_ranges, load, save
from moe_serving.kernels.plain import pack_plain
from moe_serving.layers.experts import ExpertWeights, GroupedExperts, ResidentStore, StoredExperts
from moe_serving.layers.gating import Choice, sort_by_expert
from moe_serving.models.config import (
    ClassifierConfig,
    DecoderConfig,
    ModelConfig,
    TranslationConfig,
)
from moe_serving.models.families import build
from moe_serving.models.huggingface import load_huggingface

LM = DecoderConfig(
    vocabulary_size=50, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8, d_expert=24,
    n_experts=5, top_k=2, max_length=40,
)  # fmt: skip
TRANSLATION = TranslationConfig(
    vocabulary_size=50, d_model=32, n_heads=4, d_head=8, d_expert=24, n_encoder_layers=2,
    n_decoder_layers=2, encoder_moe=(1,), decoder_moe=(0, 1), n_experts=4, top_k=1, max_length=40,
)  # fmt: skip
CLASSIFIER = ClassifierConfig(
    n_channels=6, window_length=64, patch_length=8, n_classes=5, d_model=32, n_layers=2, n_heads=2,
    d_expert=24, n_experts=4,
)  # fmt: skip
FAMILIES = pytest.mark.parametrize(
    "config", [LM, TRANSLATION, CLASSIFIER], ids=lambda c: type(c).__name__
)


def saved(config: ModelConfig, folder: Path) -> nn.Module:
    torch.manual_seed(7)
    model = build(config)
    save(model, folder)
    return model


@FAMILIES
def test_a_model_comes_back_with_every_bit(config: ModelConfig, tmp_path: Path) -> None:
    """What `save` wrote, `load` gives: the same record and the same bits of every tensor."""
    model = saved(config, tmp_path)

    loaded = load(tmp_path)

    assert loaded.config == config
    theirs = loaded.state_dict()
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


def test_a_tied_head_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    """A tied embedding is one tensor in the file and one parameter after loading."""
    saved(TRANSLATION, tmp_path)

    loaded = load(tmp_path)

    assert "head.weight" not in load_file(tmp_path / "model.safetensors")
    assert loaded.head.weight is loaded.embedding.weight


@FAMILIES
def test_one_expert_is_one_range_of_bytes(config: ModelConfig, tmp_path: Path) -> None:
    """The bytes at an expert's offset are its two matrices, whichever layer and expert."""
    model = saved(config, tmp_path)

    ranges = expert_ranges(tmp_path)

    content = (tmp_path / "model.safetensors").read_bytes()
    layers = list(model.moe_layers())
    assert len(ranges.offsets) == len(layers)
    for layer, offsets in zip(layers, ranges.offsets, strict=True):
        assert isinstance(layer.experts, GroupedExperts)
        for expert, offset in enumerate(offsets):
            raw = bytearray(content[offset : offset + ranges.size_bytes])
            found = ranges.shape.split(torch.frombuffer(raw, dtype=ranges.dtype))
            wanted = layer.experts.weights_of(expert)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def scramble_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)


def claim_a_huge_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def write_garbage(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff{")


def edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def record(**fields: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "no whole safetensors file"),
    "scrambled": (scramble_header, "no whole safetensors file"),
    "huge header": (claim_a_huge_header, "no whole safetensors file"),
    "empty": (empty, "no whole safetensors file"),
    "absent": (remove, "cannot be read"),
    "missing": (edit(lambda t: t.pop("norm.weight")), "lacks norm.weight"),
    "unknown": (edit(lambda t: t.update(extra=torch.ones(2))), "no place for"),
    "shape": (edit(lambda t: t.update({"norm.weight": torch.ones(31)})), r"is \[31\]; the model"),
    "experts' shape": (
        edit(lambda t: t.update({"blocks.0.moe.experts": torch.ones(5, 7)})),
        r"is \[5, 7\]; the model needs",
    ),
    "integers": (
        edit(lambda t: t.update({"norm.weight": torch.ones(32, dtype=torch.int32)})),
        "all must be one of",
    ),
    "two types": (
        edit(lambda t: t.update({"norm.weight": torch.ones(32, dtype=torch.bfloat16)})),
        "all must be one of",
    ),
    "NaN": (edit(lambda t: t["blocks.1.moe.experts"][3, 5].fill_(torch.nan)), "holds NaN"),
    "infinity": (edit(lambda t: t["norm.weight"][0].fill_(torch.inf)), "holds NaN or infinity"),
    "other sizes": (record(n_experts=6), "the model needs"),
    "no heads": (record(n_heads=0), "n_heads is 0"),
    "more chosen than there are": (record(top_k=9), "top_k is 9"),
    "another kind": (record(kind="oracle"), "not the record of a model"),
    "no number": (record(d_model="wide"), "not the record of a model"),
    "garbage": (write_garbage, "not the record"),
    "no record": (lambda folder: (folder / "config.json").unlink(), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """Whatever is wrong with a checkpoint is one `StoreError` that says what and where."""
    saved(LM, tmp_path)
    damage, said = DAMAGES[name]
    damage(tmp_path)

    with pytest.raises(StoreError, match=said):
        load(tmp_path)


def test_every_cut_of_the_file_is_noticed(tmp_path: Path) -> None:
    """A file that ends early is refused wherever it was cut."""
    saved(CLASSIFIER, tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()

    for end in range(0, len(content), len(content) // 23):
        path.write_bytes(content[:end])
        with pytest.raises(StoreError):
            load(tmp_path)


@pytest.mark.slow
def test_mixtral_from_hugging_face_gives_its_logits(tmp_path: Path) -> None:
    """A Mixtral folder, whole or in shards, gives transformers' own logits."""
    import transformers

    torch.manual_seed(3)
    theirs = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=64,
        )
    ).eval()
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tokens = torch.randint(0, 60, (3, 17))

    for kind in ("whole", "shards"):
        ours = load_huggingface(tmp_path / kind)

        with torch.no_grad():
            torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1


@pytest.mark.slow
def test_switch_from_hugging_face_gives_its_logits(tmp_path: Path) -> None:
    """A Switch Transformers folder gives transformers' own logits where theirs drop nothing."""
    import transformers

    torch.manual_seed(3)
    theirs = transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(
            vocab_size=60,
            d_model=32,
            d_kv=8,
            d_ff=40,
            num_layers=4,
            num_sparse_encoder_layers=2,
            num_decoder_layers=2,
            num_sparse_decoder_layers=1,
            num_heads=4,
            num_experts=4,
            expert_capacity=100,
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    source, target = torch.randint(2, 60, (3, 150)), torch.randint(2, 60, (3, 11))
    source[1, 90:] = 0

    ours = load_huggingface(tmp_path)

    with torch.no_grad():
        expected = theirs(
            input_ids=source, attention_mask=(source != 0).long(), decoder_input_ids=target
        ).logits
        torch.testing.assert_close(ours(source, target), expected, rtol=1e-4, atol=1e-4)
    save(ours, tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "ours")(source, target), ours(source, target))


def test_a_foreign_family_is_refused(tmp_path: Path) -> None:
    """A folder of another architecture, or with an option we lack, is a `StoreError`."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')

    with pytest.raises(StoreError, match="no Mixtral or Switch"):
        load_huggingface(tmp_path)


@pytest.mark.slow
def test_a_foreign_model_runs_on_our_experts() -> None:
    """Registered with transformers by name, our plan and experts give its own logits."""
    import transformers
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def run_ours(module: nn.Module, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        n_experts = module.num_experts
        plan = sort_by_expert(Choice(expert_TK, weight_TK, torch.empty(0, n_experts)))
        weights = zip(module.gate_up_proj, module.down_proj, strict=True)
        packed = [pack_plain(ExpertWeights(*pair), "swiglu") for pair in weights]
        return StoredExperts(ResidentStore([packed]), 0)(x_TD, plan)

    ALL_EXPERTS_FUNCTIONS.register("headwater", run_ours)
    torch.manual_seed(3)
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
            max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    tokens = torch.randint(0, 60, (3, 17))
    with torch.no_grad():
        own = model(tokens).logits

        model.set_experts_implementation("headwater")

        torch.testing.assert_close(model(tokens).logits, own, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_benchmark_measures_a_small_case() -> None:
    """One case of `benchmarks.moe_layer` gives peers that agree with us and complete claims."""
    from benchmarks.moe_layer import claims_of
    from benchmarks.moe_layer_measuring import EIGHT_BIT, Case, measure_case, one_thread

    with one_thread():
        found = [
            measure_case(Case(256, 8, 64, 128, "relu", share=0.1, is_static=True), 0.1),
            measure_case(Case(64, 8, 64, 128, "swiglu"), 0.1),
            measure_case(Case(64, 8, 64, 128, "relu", top_k=1), 0.1),
        ]

    for each in found:
        exact = {n: e for n, e in each.errors.items() if not n.startswith(EIGHT_BIT)}
        assert max(exact.values()) < 1e-5
        assert all(seconds > 0 for seconds in each.seconds.values())
        assert each.roofline_s > 0
        assert {claim.peer for claim in claims_of(each)} >= {"per-expert roofline", "ORT MoE"}
    assert set(found[0].temporary_mb) == {"ours, f32", "static einsum", "static padded"}
