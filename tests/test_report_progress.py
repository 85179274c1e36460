"""A bar tells whoever looks how far a run is, and is silent where nobody does."""

import io

import pytest
from rich.console import Console

from simulations.report import RoundResult
from simulations.reporting.progress import run_progress


@pytest.mark.parametrize("width", [60, 120])
def test_the_bar_tells_how_far_a_run_is(width: int) -> None:
    """The bar shows round and accuracy, and on a wide terminal devices and virtual time too."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width)
    row = RoundResult(
        round=3, status="closed", opened_s=1.0, closed_s=7200.0, asked=8, not_asked={},
        devices=("d00", "d01"), accuracy=0.875,
    )  # fmt: skip
    with run_progress("[red]smoke", 5, quiet=False, console=console) as on_round:
        on_round(row)

    last = screen.getvalue()
    assert "3/5" in last
    assert "accuracy 87.5 %" in last
    assert "[red]smoke" in last
    assert ("8 asked, 6 dropped" in last) == (width == 120)
    assert ("2.0 h simulated" in last) == (width == 120)


def test_the_bar_is_silent_when_nobody_looks() -> None:
    """Nothing is written where the output is no terminal, or where quiet is asked for."""
    written = []
    for is_terminal in (False, True):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=is_terminal, width=120)
        with run_progress("smoke", 5, quiet=is_terminal, console=console) as on_round:
            on_round(
                RoundResult(
                    round=1, status="abandoned", opened_s=0.0, closed_s=1.0, asked=1, not_asked={}
                )
            )
        written.append(screen.getvalue())

    assert written == ["", ""]
