"""The reference: an earlier self of the model in training, on the CPU, cheap to ask."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cloud.trainers.freezing.chain import Chain
from cloud.trainers.freezing.plasticity import plasticity

Precision = Literal["int8", "float32"]

_WEIGHT_LEVELS = 63
"""Seven bits: without VNNI, CPUs add pairs of products of eight bits in sixteen, which overflow."""


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What some modules of the model in training said: the input of the first, and all outputs.

    `weights` refresh the reference once it has answered (None: it stays); `asked` numbers
    questions from 1.
    """

    asked: int
    modules: range
    x: Tensor
    outputs: Sequence[Tensor]
    weights: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The plasticity of each module a question was about."""

    asked: int
    modules: range
    readings: tuple[float, ...]


class Int8Linear(nn.Module):
    """A linear layer in 8 bits: weights by output channel, inputs as they come (dynamic).

    By oneDNN's kernel for plain int8 tensors; torch's own quantized tensors are going away.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(1).clamp_min(1e-12) / _WEIGHT_LEVELS
        int8 = (weight / scales[:, None]).round().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(int8, None)
        self._scales, self._zeros = scales, torch.zeros(len(scales), dtype=torch.int64)
        bias: Tensor | None = linear.bias
        self._bias = None if bias is None else bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), float32."""
        flat = x.flatten(0, -2)
        least, most = (float(edge) for edge in torch.aminmax(flat))
        scale = max(max(most, 0.0) - min(least, 0.0), 1e-12) / 255
        zero = round(-min(least, 0.0) / scale)
        levels = flat.div(scale).round_().add_(zero).clamp_(0, 255).to(torch.uint8)
        weight = (self._packed, self._scales, self._zeros, self._bias)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            levels, scale, zero, *weight, 1.0, 0, torch.float32, "none", [], "none"
        )
        return y.view(*x.shape[:-1], -1)


class Reference:
    """Answers questions by a copy of the model, refreshed by questions that bring weights.

    Linear layers are in int8 where `precision` says so; what dynamic quantisation does not apply
    to (convolutions, grouped experts, norms) is float32: 16 bits are no faster on most CPUs.

    Departs from the paper: the copy is not asked from the input on but from the frontmost active
    module on, with the activation the model in training had there. The modules before it are
    frozen, so both share them: it is cheaper by them, and quantising them adds no error.
    """

    def __init__(self, model: nn.Module, chain: Chain, precision: Precision) -> None:
        self._model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
        self._chain, self._precision = chain, precision
        self._quantised = self._model

    def answer(self, question: Question) -> Answer:
        """The plasticity of the question's modules since the reference was refreshed."""
        x = question.x.cpu()
        x = x.float() if x.is_floating_point() else x
        readings = []
        with torch.no_grad():
            for number, said in zip(question.modules, question.outputs, strict=True):
                x = self._chain.modules[number].run(self._quantised, x, [])
                readings.append(plasticity(said.cpu(), x))
        if question.weights is not None:
            self._refresh(question.weights, question.modules)
        return Answer(question.asked, question.modules, tuple(readings))

    def _refresh(self, weights: Mapping[str, Tensor], modules: range) -> None:
        found = {name: tensor.cpu().float() for name, tensor in weights.items()}
        self._model.load_state_dict(found, strict=False)
        self._quantised = self._quantise(modules)

    def _quantise(self, modules: range) -> nn.Module:
        if self._precision == "float32":
            return self._model
        paths = [path for number in modules for path in self._chain.modules[number].paths]
        found = copy.deepcopy(self._model)
        for path in paths:
            for linear_path, linear in list(_linears(found, path)):
                parent, _, name = linear_path.rpartition(".")
                setattr(found.get_submodule(parent), name, Int8Linear(linear))
        return found


def _linears(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.get_submodule(path).named_modules(prefix=path):
        if type(module) is nn.Linear:
            yield name, module
