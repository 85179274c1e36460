"""A model as modules in order: what can be frozen from the front, one after the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from cloud.trainers.tasks.labelled import sum_of
from federation.errors import ConfigError
from moe_serving.layers.gating import Choice
from moe_serving.models.attention import rotary_angles
from moe_serving.models.classifier import WindowClassifier
from moe_serving.models.decoder import DecoderLM

Pass: TypeAlias = Callable[[nn.Module, Tensor, list[Choice]], Tensor]
"""A part of a model (the first argument) applied; what its routers said is appended."""


@dataclass(frozen=True, slots=True, eq=False)
class Module:
    """One of the model's modules in order: its submodules' paths, its parameters, its pass.

    The pass is given the whole model, so that a copy of the model can take it too.
    """

    paths: tuple[str, ...]
    parameters: tuple[str, ...]
    run: Pass


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """Modules in order, and what makes a task's outputs of the last one's.

    Applied one after the other they are the task's forward pass, except that of the balance
    losses those of the modules that were run are counted: a frozen router cannot learn.
    """

    modules: tuple[Module, ...]
    outputs: Callable[[Tensor], Tensor]

    def finish(
        self, x: Tensor, choices: list[Choice], balance: float
    ) -> tuple[Tensor, Tensor | None]:
        """The task's outputs and what is added to its loss."""
        return self.outputs(x), balance * sum_of(choices) if choices else None


def chain_of(model: nn.Module, modules: int = 0) -> Chain:
    """The modules of a model of the zoo, or of a mixture of experts, in order.

    Args:
        model: an `nn.Sequential`, nested or not, a `DecoderLM` or a `WindowClassifier`.
        modules: so many, of similar numbers of parameters; 0 for as many as can be told apart.

    Raises:
        ConfigError: a model that is no chain, or that has fewer than two modules.
    """
    match model:
        case DecoderLM() if not model.config.is_tied:
            units, outputs = _decoder_units(model), _classes_second
        case WindowClassifier():
            units, outputs = _classifier_units(model), _as_it_is
        case nn.Sequential():
            units, outputs = _sequential_units(model), _as_it_is
        case _:
            raise ConfigError(
                f"the modules of a {type(model).__name__} do not follow one another (or its "
                "embedding is its head, which never freezes); expected a chain of them: leave "
                "out [freezing]"
            )
    if len(units) < 2 or modules > len(units) or modules == 1:
        raise ConfigError(
            f"freezing.modules is {modules} and the model has {len(units)} that follow one "
            "another; expected 2 or more, and not more than it has: correct it"
        )
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return Chain(tuple(_grouped(units, sizes, modules or len(units))), outputs)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _classes_second(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _sequential_units(model: nn.Sequential) -> list[Module]:
    """A module for each child with parameters; children without go with the one before."""
    units: list[list[str]] = [[]]
    has_parameters = False
    for path in _leaves(model, ""):
        owns = any(True for _ in model.get_submodule(path).parameters())
        if owns and has_parameters:
            units.append([])
        has_parameters = has_parameters or owns
        units[-1].append(path)
    return [_of_paths(model, paths, _in_order(tuple(paths))) for paths in units]


def _leaves(model: nn.Sequential, prefix: str) -> Iterator[str]:
    for name, child in model.named_children():
        if isinstance(child, nn.Sequential):
            yield from _leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _in_order(paths: tuple[str, ...]) -> Pass:
    def run(model: nn.Module, x: Tensor, _: list[Choice]) -> Tensor:
        for path in paths:
            x = model.get_submodule(path)(x)
        return x

    return run


def _decoder_units(model: DecoderLM) -> list[Module]:
    config = model.config

    def begin(whole: nn.Module, tokens_BL: Tensor, _: list[Choice]) -> Tensor:
        x_BLD: Tensor = whole.get_submodule("embedding")(tokens_BL)
        return x_BLD

    def end(whole: nn.Module, x_BLD: Tensor, _: list[Choice]) -> Tensor:
        logits: Tensor = whole.get_submodule("head")(whole.get_submodule("norm")(x_BLD))
        return logits

    blocks = _block_units(model, config.d_head, config.rope_base, is_causal=True)
    ends = _of_paths(model, ["embedding"], begin), _of_paths(model, ["norm", "head"], end)
    return _with_ends(blocks, *ends)


def _classifier_units(model: WindowClassifier) -> list[Module]:
    config = model.config

    def begin(whole: nn.Module, x_BLC: Tensor, _: list[Choice]) -> Tensor:
        n_patches = config.window_length // config.patch_length
        x_BPD: Tensor = whole.get_submodule("patch")(x_BLC.reshape(len(x_BLC), n_patches, -1))
        return x_BPD

    def end(whole: nn.Module, x_BPD: Tensor, _: list[Choice]) -> Tensor:
        logits: Tensor = whole.get_submodule("head")(whole.get_submodule("norm")(x_BPD).mean(dim=1))
        return logits

    blocks = _block_units(model, config.d_model // config.n_heads, 10_000.0, is_causal=False)
    ends = _of_paths(model, ["patch"], begin), _of_paths(model, ["norm", "head"], end)
    return _with_ends(blocks, *ends)


def _with_ends(blocks: list[Module], first: Module, last: Module) -> list[Module]:
    """What comes before the blocks goes with the first, what comes after with the last."""
    blocks[0] = _joined([first, blocks[0]])
    blocks[-1] = _joined([blocks[-1], last])
    return blocks


def _block_units(
    model: DecoderLM | WindowClassifier, d_head: int, rope_base: float, *, is_causal: bool
) -> list[Module]:
    def block(path: str) -> Pass:
        def run(whole: nn.Module, x_BLD: Tensor, choices: list[Choice]) -> Tensor:
            positions = torch.arange(x_BLD.shape[1], device=x_BLD.device)
            cosine, sine = rotary_angles(d_head, rope_base, positions)
            y_BLD: Tensor = whole.get_submodule(path)(
                x_BLD, cosine, sine, choices, is_causal=is_causal
            )
            return y_BLD

        return run

    paths = [f"blocks.{number}" for number in range(model.config.n_layers)]
    return [_of_paths(model, [path], block(path)) for path in paths]


def _of_paths(model: nn.Module, paths: Sequence[str], run: Pass) -> Module:
    names = tuple(
        f"{path}.{name}"
        for path in paths
        for name, _ in model.get_submodule(path).named_parameters()
    )
    return Module(tuple(paths), names, run)


def _joined(parts: Sequence[Module]) -> Module:
    if len(parts) == 1:
        return parts[0]

    def run(model: nn.Module, x: Tensor, choices: list[Choice]) -> Tensor:
        for part in parts:
            x = part.run(model, x, choices)
        return x

    return Module(
        tuple(path for part in parts for path in part.paths),
        tuple(name for part in parts for name in part.parameters),
        run,
    )


def _grouped(units: Sequence[Module], sizes: Mapping[str, int], count: int) -> list[Module]:
    """`count` modules of neighbours whose largest has as few parameters as can be."""
    weights = [sum(sizes[name] for name in unit.parameters) for unit in units]
    ends = even_cuts(weights, count)
    starts = [0, *ends[:-1]]
    return [_joined(units[a:b]) for a, b in zip(starts, ends, strict=True)]


def even_cuts(weights: Sequence[int], count: int) -> list[int]:
    """Where `count` runs of neighbours end, so that the heaviest is as light as can be.

    Raises:
        ValueError: fewer weights than runs.
    """
    if not 1 <= count <= len(weights):
        raise ValueError(f"{len(weights)} weights cannot be cut into {count} runs")
    total = [0]
    for weight in weights:
        total.append(total[-1] + weight)
    # best[k][i]: the heaviest of k runs of the first i weights, and where the last one starts.
    best = [[(float(total[i]), 0) for i in range(len(total))]]
    for k in range(2, count + 1):
        row = [(float("inf"), 0)] * k
        for i in range(k, len(total)):
            tries = ((max(best[-1][j][0], total[i] - total[j]), j) for j in range(k - 1, i))
            row.append(min(tries))
        if k < len(total):
            best.append(row)
    ends, end = [], len(weights)
    for row in reversed(best):
        ends.append(end)
        end = row[end][1]
    return ends[::-1]
