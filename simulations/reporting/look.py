"""How pictures look on light and on dark paper. Colours differ in lightness too, for any eye."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 130


@dataclass(frozen=True, slots=True)
class Look:
    """Colours of one theme. `runs` are those of the first and the second run's curves.

    `states` are those of a device in a round, in the order of `pictures.STATES`.
    """

    paper: str
    ink: str
    faint: str
    runs: tuple[str, str]
    states: tuple[str, str, str, str, str]


LIGHT = Look(
    paper="#ffffff",
    ink="#1f2328",
    faint="#c8ced6",
    runs=("#0b62b0", "#c2410c"),
    states=("#eceff2", "#b4c0cc", "#0b62b0", "#d1350f", "#f0b400"),
)
DARK = Look(
    paper="#161b22",
    ink="#e6edf3",
    faint="#444c56",
    runs=("#58a6ff", "#ff9b54"),
    states=("#21262d", "#57636f", "#58a6ff", "#ff6a45", "#e3c34a"),
)
DASHES = ("-", (0, (5, 2)))
"""The second run's curves are dashed, so that print without colour can tell them apart."""


def render(draw: "Callable[[Figure, Look], None]", size: tuple[float, float], look: Look) -> bytes:
    """A picture as PNG, of `size` inches; the same bytes for the same drawing."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = {
        "text.color": look.ink,
        "axes.labelcolor": look.ink,
        "axes.edgecolor": look.faint,
        "axes.facecolor": look.paper,
        "xtick.color": look.ink,
        "ytick.color": look.ink,
        "legend.frameon": False,
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.parse_math": False,
    }
    with rc_context(cast("Any", colours)):
        figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained", facecolor=look.paper)
        canvas = FigureCanvasAgg(figure)
        draw(figure, look)
        file = io.BytesIO()
        cast("Any", canvas).print_png(file)  # Draws once; savefig would draw twice.
    return file.getvalue()


def style(axes: "Axes", look: Look, y_label: str, *, from_zero: bool = True) -> None:
    """Rule faint lines across, take the frame's upper and right side off, and name the axis."""
    axes.grid(visible=True, color=look.faint, linewidth=0.6, alpha=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel(y_label)
    if from_zero:
        axes.set_ylim(bottom=0.0)


def whole_rounds(axes: "Axes") -> None:
    """Name the axis of rounds, which has no tick between two."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("round")
