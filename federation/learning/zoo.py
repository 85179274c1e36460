"""Models that every device trains whole: linear, dense, convolutional.

No model of the zoo has batch statistics, since averages of them over devices that differ mean
little: group normalisation stands in (arXiv:1910.00189). All state is parameters.

A model with `projected` features is a student's: before its classifier, which is then as wide as
its teacher's, a projector brings its own features to that width (SimKD, in arXiv:2303.06155).
"""

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor, nn

from federation.learning.architecture import (
    Architecture,
    Sizes,
    flat_input,
    group_norm,
    image_input,
    named,
    side_after,
    window_input,
)


class ChannelsFirst(nn.Module):
    """Turns windows (N, length, channels), as sensors write them, for `Conv1d`."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, length, channels) to (N, channels, length)."""
        return x.transpose(1, 2)


def _linear(sizes: Sizes) -> nn.Module:
    return named(flat=nn.Flatten(), classifier=nn.Linear(sizes["inputs"], sizes["classes"]))


def _head(features: int, sizes: Sizes) -> dict[str, nn.Module]:
    """The classifier; before it, in a student with `projected` sizes, the projector (SimKD)."""
    if not (width := sizes["projected"]):
        return {"classifier": nn.Linear(features, sizes["classes"])}
    return {
        "projector": nn.Linear(features, width),
        "projected": nn.ReLU(),
        "classifier": nn.Linear(width, sizes["classes"]),
    }


def _mlp(sizes: Sizes) -> nn.Module:
    modules: dict[str, nn.Module] = {
        "flat": nn.Flatten(),
        "hidden": nn.Linear(sizes["inputs"], sizes["hidden"]),
        "relu": nn.ReLU(),
    }
    features = sizes["hidden"]
    if sizes["hidden2"]:
        modules["hidden2"] = nn.Linear(features, sizes["hidden2"])
        modules["relu2"] = nn.ReLU()
        features = sizes["hidden2"]
    return named(**modules, **_head(features, sizes))


def _cnn(sizes: Sizes) -> nn.Module:
    shape, filters = image_input(sizes), sizes["filters"]
    pooled = (sizes["height"] // 4) * (sizes["width"] // 4)
    return named(
        flat=nn.Flatten(),
        image=nn.Unflatten(1, shape),
        conv1=nn.Conv2d(sizes["channels"], filters, 5, padding=2),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(filters, 2 * filters, 5, padding=2),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        pooled=nn.Flatten(),
        hidden=nn.Linear(2 * filters * pooled, sizes["hidden"]),
        relu3=nn.ReLU(),
        **_head(sizes["hidden"], sizes),
    )


def _conv1d(sizes: Sizes) -> nn.Module:
    modules: dict[str, nn.Module] = {
        "flat": nn.Flatten(),
        "window": nn.Unflatten(1, window_input(sizes)),
        "turn": ChannelsFirst(),
    }
    channels = sizes["channels"]
    for number, width in enumerate((1, 2, 2), start=1):
        filters = width * sizes["filters"]
        modules[f"conv{number}"] = nn.Conv1d(channels, filters, 5, stride=2, padding=2)
        modules[f"norm{number}"] = group_norm(filters, sizes)
        modules[f"relu{number}"] = nn.ReLU()
        channels = filters
    modules |= {"mean": nn.AdaptiveAvgPool1d(1), "out": nn.Flatten()}
    return named(**modules, **_head(channels, sizes))


def _rebafl_cnn(sizes: Sizes) -> nn.Module:
    """The authors' two nets: for CIFAR-10 a third convolution, and a head without bias.

    Their projection head is left out: it is of another method, and the prototypes are means of
    what the classifier gets.
    """
    deep = sizes["filters3"] > 0
    modules: dict[str, nn.Module] = {
        "flat": nn.Flatten(),
        "image": nn.Unflatten(1, image_input(sizes)),
    }
    kernels, paddings = (5, 5, 3), (0, 1, 1)
    channels, shrinking = sizes["channels"], (-4, 2, -2, 2, *((2,) if deep else ()))
    for number in range(1, 4 if deep else 3):
        filters, at = sizes[f"filters{number}"], number - 1
        conv = nn.Conv2d(channels, filters, kernels[at], padding=paddings[at])
        modules[f"conv{number}"] = conv
        modules[f"relu{number}"] = nn.LeakyReLU()
        modules[f"pool{number}"] = nn.MaxPool2d(2)
        channels = filters
    pixels = side_after(sizes["height"], *shrinking) * side_after(sizes["width"], *shrinking)
    modules["pooled"] = nn.Flatten()
    modules["hidden"] = nn.Linear(channels * pixels, sizes["hidden"])
    if not deep:
        modules["relu"] = nn.LeakyReLU()
    return named(**modules, classifier=nn.Linear(sizes["hidden"], sizes["classes"], bias=not deep))


PLAIN: Mapping[str, Architecture] = MappingProxyType(
    {
        "linear": Architecture(
            "multinomial logistic regression",
            {"inputs": 64, "classes": 10, "narrow": 0},
            flat_input,
            _linear,
        ),
        "mlp": Architecture(
            "one hidden layer, or two; the defaults fit the 8x8 digits",
            {
                "inputs": 64,
                "hidden": 32,
                "classes": 10,
                "narrow": 0,
                "hidden2": 0,
                "projected": 0,
            },
            flat_input,
            _mlp,
            widths=("hidden", "hidden2"),
        ),
        "cnn": Architecture(
            "two convolutions and two dense layers, after arXiv:1602.05629, section 3",
            {
                "channels": 1,
                "height": 28,
                "width": 28,
                "filters": 16,
                "hidden": 128,
                "classes": 10,
                "narrow": 0,
                "projected": 0,
            },
            image_input,
            _cnn,
            widths=("filters", "hidden"),
        ),
        "conv1d": Architecture(
            "three strided convolutions over a window of sensor readings, time first",
            {
                "length": 100,
                "channels": 6,
                "filters": 32,
                "classes": 7,
                "narrow": 0,
                "projected": 0,
            },
            window_input,
            _conv1d,
            widths=("filters",),
        ),
        "rebafl_cnn": Architecture(
            "the network of ReBaFL (arXiv:2303.06314): as it is for Fashion-MNIST; with "
            "filters3 = 64 and colour images of 32x32, for CIFAR-10",
            {
                "channels": 1,
                "height": 28,
                "width": 28,
                "filters1": 16,
                "filters2": 32,
                "filters3": 0,
                "hidden": 128,
                "classes": 10,
                "narrow": 0,
            },
            image_input,
            _rebafl_cnn,
            widths=("filters1", "filters2", "filters3", "hidden"),
        ),
    }
)
