"""Models with depth levels: a device of level c trains the first c stages and a head.

The deepest level is the whole model, whose head ends in `classifier`. A shallower one has a
head of its own, `exit<c>_...`: private, when the hub's model has none (`exits` = 0, FedLP,
arXiv:2303.06360), or one that all share (`exits` = 1), and then the model of a level holds the
exits of all levels up to it. Tensors of stage k are called `stage<k>.<layer>.<tensor>`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import TypeAlias

from torch import Tensor, nn

from federation.errors import ConfigError
from federation.learning.architecture import (
    Architecture,
    Sizes,
    flat_input,
    group_norm,
    image_input,
    named,
    side_after,
)

Head: TypeAlias = dict[str, nn.Module]


class MultiExit(nn.Module):
    """Stages in a row, a head after each; the model's answer is that of the deepest."""

    def __init__(self, front: Head, stages: Sequence[nn.Module], heads: Sequence[Head]) -> None:
        super().__init__()
        self.front = named(**front)
        paths: list[tuple[str, tuple[str, ...]]] = []
        for number, (stage, head) in enumerate(zip(stages, heads, strict=True), start=1):
            self.add_module(f"stage{number}", stage)
            for name, module in head.items():
                self.add_module(name, module)
            paths.append((f"stage{number}", tuple(head)))
        # By name, so that a module may be replaced.
        self._paths = tuple(paths)

    def passes(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """What the deepest classifier gets and says, and the logits of every exit."""
        x, features, exits = self.front(x), x, []
        for stage, (*body, last) in self._paths:
            x = self._through((stage,), x)
            features = self._through(body, x)
            exits.append(self._through((last,), features))
        return features, exits[-1], tuple(exits)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the deepest exit alone."""
        x = self._through(("front", *(stage for stage, _ in self._paths)), x)
        return self._through(self._paths[-1][1], x)

    def _through(self, names: Sequence[str], x: Tensor) -> Tensor:
        for name in names:
            x = getattr(self, name)(x)
        return x


@dataclass(frozen=True, slots=True, eq=False)
class _Anatomy:
    """The pieces a model of some level is made of; heads are given by level, unprefixed."""

    front: Head
    stages: tuple[nn.Module, ...]
    head: Callable[[int], Head]
    exit: Callable[[int], Head]


def _assemble(anatomy: _Anatomy, sizes: Sizes) -> nn.Module:
    deepest = len(anatomy.stages)
    level = sizes["level"] or deepest
    if level > deepest or sizes["exits"] > 1:
        raise ConfigError(
            f"level = {sizes['level']} and exits = {sizes['exits']}; expected a level up to "
            f"{deepest} and exits 0 or 1: correct the plan"
        )
    stages = anatomy.stages[:level]
    if sizes["exits"]:
        shared = [_exit(n, anatomy.exit(n)) for n in range(1, min(level + 1, deepest))]
        whole = [anatomy.head(deepest)] if level == deepest else []
        return MultiExit(anatomy.front, stages, shared + whole)
    body = {f"stage{number}": stage for number, stage in enumerate(stages, start=1)}
    head = anatomy.head(level)
    return named(**anatomy.front, **body, **(head if level == deepest else _exit(level, head)))


def _exit(level: int, head: Head) -> Head:
    return {f"exit{level}_{name}": module for name, module in head.items()}


def _deep_mlp(sizes: Sizes) -> nn.Module:
    asked = [sizes[f"hidden{number}"] for number in range(1, 6)]
    widths = [sizes["inputs"], *(width for width in asked if width)]
    stages = tuple(
        named(hidden=nn.Linear(width, following), relu=nn.ReLU())
        for width, following in pairwise(widths)
    )

    def head(level: int) -> Head:
        return {"classifier": nn.Linear(widths[level], sizes["classes"])}

    return _assemble(_Anatomy({"flat": nn.Flatten()}, stages, head, head), sizes)


def _fedlp_cnn(sizes: Sizes) -> nn.Module:
    filters, classes = sizes["filters"], sizes["classes"]
    front: Head = {"flat": nn.Flatten(), "image": nn.Unflatten(1, image_input(sizes))}

    def conv(number: int, channels: int, out: int) -> Head:
        return {
            f"conv{number}": nn.Conv2d(channels, out, 3, padding=1),
            f"relu{number}": nn.ReLU(),
            f"norm{number}": group_norm(out, sizes),
        }

    stages = (
        named(**conv(1, sizes["channels"], filters), **conv(2, filters, filters)),
        named(pool=nn.MaxPool2d(2), **conv(3, filters, 2 * filters)),
        named(**conv(4, 2 * filters, 2 * filters)),
        named(pool=nn.MaxPool2d(2), **conv(5, 2 * filters, 4 * filters)),
        named(**conv(6, 4 * filters, 4 * filters)),
    )
    # How often the image was halved, and the channels, at the end of each stage.
    halvings, channels = (0, 1, 1, 2, 2), (1, 2, 2, 4, 4)

    def pixels(times: int) -> int:
        return side_after(sizes["height"], 2**times) * side_after(sizes["width"], 2**times)

    def head(level: int) -> Head:
        inputs = channels[level - 1] * filters * pixels(halvings[level - 1] + 1)
        return {
            "pool": nn.MaxPool2d(2),
            "pooled": nn.Flatten(),
            "hidden": nn.Linear(inputs, sizes["hidden"]),
            "classifier": nn.Linear(sizes["hidden"], classes),
        }

    def shared_exit(level: int) -> Head:
        inputs = channels[level - 1] * filters * pixels(3)
        return {
            "pool": nn.AvgPool2d(2 ** (3 - halvings[level - 1])),
            "pooled": nn.Flatten(),
            "classifier": nn.Linear(inputs, classes),
        }

    return _assemble(_Anatomy(front, stages, head, shared_exit), sizes)


STAGED: Mapping[str, Architecture] = MappingProxyType(
    {
        "deep_mlp": Architecture(
            "up to five hidden layers, each a level, of 0 absent; the defaults fit the 8x8 "
            "digits; FedLP's is 784-512-128-128-64-32-10",
            {
                "inputs": 64,
                "hidden1": 128,
                "hidden2": 64,
                "hidden3": 64,
                "hidden4": 32,
                "hidden5": 0,
                "classes": 10,
                "narrow": 0,
                "level": 0,
                "exits": 0,
            },
            flat_input,
            _deep_mlp,
            widths=("hidden1", "hidden2", "hidden3", "hidden4", "hidden5"),
            optional=("hidden2", "hidden3", "hidden4"),
        ),
        "fedlp_cnn": Architecture(
            "FedLP's six convolutions and two dense layers, in five levels (arXiv:2303.06360); "
            "group in place of batch normalisation",
            {
                "channels": 3,
                "height": 32,
                "width": 32,
                "filters": 32,
                "hidden": 128,
                "classes": 10,
                "narrow": 0,
                "level": 0,
                "exits": 0,
            },
            image_input,
            _fedlp_cnn,
            widths=("filters", "hidden"),
        ),
    }
)
