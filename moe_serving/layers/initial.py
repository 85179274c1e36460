"""How weights begin."""

from torch import Tensor, nn


def draw_normal(weight: Tensor, fan_in: int) -> None:
    """Normal noise of variance 1 / fan_in, from torch's global generator.

    A weight on the meta device has no values to draw, and asking torch for them there would
    import its compiler, which takes seconds.
    """
    if not weight.is_meta:
        nn.init.normal_(weight, std=fan_in**-0.5)
