"""A model of the zoo as K models side by side, each with weights of its own.

What passes through has two first dimensions, model and sample: (K, B, ...). A dense layer is one
batched matrix product, a convolution one of K groups of channels.

Images lie channels last on their way: pooling is then 5 to 9 times faster, and convolutions up
to 1.8 times. Normalisation of groups is not, so models that have it keep them first.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from federation.errors import ConfigError
from federation.learning.architecture import named
from federation.learning.models import build_model, forward_pass
from federation.learning.zoo import ChannelsFirst
from federation.protocol.messages import ModelSpec

FEW_CHANNELS = 8
"""With fewer channels than this, oneDNN's gradient of a kernel takes 4 times as long as a
product with the patches of the image."""


def side_by_side(spec: ModelSpec) -> nn.Module:
    """The model as K models, K being what `bind` says; its parameters keep their names.

    Raises:
        ConfigError: a model or size the zoo does not have.
    """
    model = build_model(spec)
    if isinstance(model, nn.Sequential):
        model = _pooled_first(model)
    _replace_leaves(model)
    modules = list(model.modules())
    if any(isinstance(module, _Normalisation) for module in modules):
        for module in modules:
            if isinstance(module, Convolution):
                module.puts_channels_last = False
    return model


def count_activations(model: nn.Module, entries: int) -> int:
    """How many numbers pass between the modules of such a model for one sample of so many."""
    found = 0

    def count(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal found
        found += output.numel()

    leaves = [module for module in model.modules() if not list(module.children())]
    handles = [leaf.register_forward_hook(count) for leaf in leaves]
    with torch.no_grad():
        forward_pass(model)(torch.zeros((1, 1, entries)))
    for handle in handles:
        handle.remove()
    return found


def bind(
    model: nn.Module,
    shapes: Iterable[tuple[int, ...]],
    windows: Iterable[slice],
    flat: Tensor,
) -> None:
    """Make the parameters windows on these weights, (K, P): each row is a model."""
    for parameter, shape, window in zip(model.parameters(), shapes, windows, strict=True):
        parameter.grad = None
        parameter.data = flat[:, window].view(-1, *shape)


class _Dense(nn.Module):
    def __init__(self, one: nn.Linear) -> None:
        super().__init__()
        self.weight: Tensor = one.weight
        self.bias: Tensor | None = one.bias

    def forward(self, x: Tensor) -> Tensor:
        if len(self.weight) == 1:
            bias = None if self.bias is None else self.bias.squeeze(0)
            one = functional.linear(x.squeeze(0), self.weight.squeeze(0), bias)
            return one.unsqueeze(0)
        if self.bias is None:
            return torch.bmm(x, self.weight.mT)
        return torch.baddbmm(self.bias[:, None], x, self.weight.mT)


class Convolution(nn.Module):
    """Convolutions of one or two dimensions: K groups of channels."""

    def __init__(self, one: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__()
        self.weight: Tensor = one.weight
        self.bias: Tensor | None = one.bias
        self.stride, self.padding = one.stride, one.padding
        self.is_of_images = isinstance(one, nn.Conv2d)
        self.puts_channels_last = self.is_of_images

    def forward(self, x: Tensor) -> Tensor:
        """(K, B, C, ...) to (K, B, filters, ...)."""
        models = len(self.weight)
        weight = self.weight.flatten(0, 1)
        bias = None if self.bias is None else self.bias.flatten()
        folded = _fold(x)
        if self.is_of_images:
            if self.puts_channels_last and _is_few(folded, models):
                made = _convolve_patches(folded, weight, bias, self.stride, self.padding, models)
                return _unfold(made, models)
            folded = _channels_last(folded) if self.puts_channels_last else folded
            made = functional.conv2d(folded, weight, bias, self.stride, self.padding, groups=models)
        else:
            made = functional.conv1d(folded, weight, bias, self.stride, self.padding, groups=models)
        return _unfold(made, models)


class _PatchConvolution(torch.autograd.Function):
    """A convolution of images that no gradient is asked of; its kernels' is a matrix product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any,
        padding: Any,
        models: int,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.geometry = weight.shape, stride, padding, models
        return functional.conv2d(_channels_last(x), weight, bias, stride, padding, groups=models)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        shape, (down, along), (rows, columns), models = ctx.geometry
        (height, width), filters = gradient.shape[2:], shape[0] // models
        padded = functional.pad(x, (columns, columns, rows, rows)).contiguous()
        b, c, i, j = padded.stride()
        patches = padded.as_strided(
            (len(x), x.shape[1], *shape[2:], height, width), (b, c, i, j, down * i, along * j)
        ).reshape(len(x), models, -1, height * width)
        pixels = gradient.permute(0, 2, 3, 1).flatten(1, 2)
        kernels = [
            torch.bmm(patches[:, model], piece).sum(0).t()
            for model, piece in enumerate(torch.split(pixels, filters, 2))
        ]
        bias = pixels.sum((0, 1)) if ctx.needs_input_grad[2] else None
        return None, torch.cat(kernels).reshape(shape), bias, None, None, None


_convolve_patches: Callable[..., Tensor] = _PatchConvolution.apply


class _Normalisation(nn.Module):
    def __init__(self, one: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias = one.weight, one.bias
        self.groups, self.eps = one.num_groups, one.eps

    def forward(self, x: Tensor) -> Tensor:
        models = len(self.weight)
        weight, bias = self.weight.flatten(), self.bias.flatten()
        return _unfold(
            functional.group_norm(_fold(x), models * self.groups, weight, bias, self.eps), models
        )


class _Pooling(nn.Module):
    def __init__(self, one: nn.Module) -> None:
        super().__init__()
        self.one = one

    def forward(self, x: Tensor) -> Tensor:
        return _unfold(self.one(_fold(x)), len(x))


class _Reshaping(nn.Module):
    def __init__(self, reshape: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.reshape = reshape

    def forward(self, x: Tensor) -> Tensor:
        return self.reshape(x)


def _pooled_first(model: nn.Sequential) -> nn.Sequential:
    """The same model, where the largest is picked before the rectifier and not after it.

    A rectifier keeps the order of numbers, so it may see a quarter of them, and give the same.
    """
    modules = list(model.named_children())
    for at, ((_, one), (_, following)) in enumerate(pairwise(modules)):
        if isinstance(one, nn.ReLU | nn.LeakyReLU) and isinstance(following, nn.MaxPool2d):
            modules[at : at + 2] = modules[at + 1], modules[at]
    return named(**dict(modules))


def _replace_leaves(model: nn.Module) -> None:
    for name, child in model.named_children():
        if list(child.children()):
            _replace_leaves(child)
        else:
            setattr(model, name, _leaf(child))


def _leaf(one: nn.Module) -> nn.Module:
    for kinds, replacement in _LEAVES.items():
        if isinstance(one, kinds):
            return replacement(one)
    raise ConfigError(
        f"a model with {type(one).__name__} cannot train side by side with others: "
        "say how in federation.learning.cohort.network"
    )


_LEAVES: dict[Any, Callable[[Any], nn.Module]] = {
    nn.Linear: _Dense,
    (nn.Conv1d, nn.Conv2d): Convolution,
    nn.GroupNorm: _Normalisation,
    (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool1d): _Pooling,
    nn.Flatten: lambda _: _Reshaping(partial(torch.flatten, start_dim=2)),
    nn.Unflatten: lambda one: _Reshaping(
        partial(torch.unflatten, dim=2, sizes=one.unflattened_size)
    ),
    ChannelsFirst: lambda _: _Reshaping(partial(torch.transpose, dim0=2, dim1=3)),
    (nn.ReLU, nn.LeakyReLU): lambda one: one,
}


def _fold(x: Tensor) -> Tensor:
    """(K, B, C, ...) as (B, K C, ...)."""
    return x.squeeze(0) if len(x) == 1 else x.transpose(0, 1).flatten(1, 2)


def _unfold(x: Tensor, models: int) -> Tensor:
    """(B, K C, ...) as (K, B, C, ...)."""
    return (
        x.unsqueeze(0) if models == 1 else x.view(len(x), models, -1, *x.shape[2:]).transpose(0, 1)
    )


def _channels_last(images: Tensor) -> Tensor:
    """The images with their channels last in memory, and said to be so where there is but one."""
    if images.shape[1] > 1:
        return images.contiguous(memory_format=torch.channels_last)
    height, width = images.shape[2:]
    strides = height * width, 1, width, 1
    return images.contiguous().as_strided(images.shape, strides)


def _is_few(images: Tensor, models: int) -> bool:
    on_cpu = images.device.type == "cpu"
    return on_cpu and images.shape[1] < FEW_CHANNELS * models and not images.requires_grad
