"""A report as one HTML page that asks nothing of any network."""

import base64
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from markupsafe import Markup

from simulations.reporting import measures
from simulations.reporting.attempts import DeviceAccount, worst_and_best
from simulations.reporting.drawings import LABELS
from simulations.reporting.pictures import Picture
from simulations.reporting.reading import RoundRow, Run

DEVICES_SHOWN = 10
ROUNDS_SHOWN = 500
REASONS_SHOWN = 30
NOT_TOLD = "\N{EN DASH}"
LONGEST = 300
"""Characters of any text out of a run's files; what is longer is cut off."""

HARMLESS = {"Cc": " ", "Cf": "", "Co": "\ufffd", "Cs": "\ufffd", "Cn": "\ufffd"}
"""What stands in place of characters that control rather than show, by Unicode's category."""


def render_page(runs: Sequence[Run], pictures: Sequence[Picture]) -> str:
    """The page for one run, or for two side by side.

    Names and reasons in a run's files come from devices, so that all text is escaped, and no
    script, style or address of theirs would be followed: the page's policy allows its own style
    and its own pictures.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=show_text,
    )
    environment.filters["data_address"] = _data_address
    return environment.get_template("page.html").render(
        title=" beside ".join(run.result.name for run in runs),
        runs=[_heading(run, label) for run, label in zip(runs, LABELS, strict=False)],
        figures=measures.figures(runs),
        pictures=pictures,
        drops=_counts([run.result.drop_reasons for run in runs]),
        refusals=_counts([_refusals(run) for run in runs]),
        devices=[_devices(run) for run in runs],
        rounds=[_rounds(run) for run in runs],
        settings=_settings(runs),
        labels=LABELS[: len(runs)],
        is_pair=len(runs) == 2,
    )


def show_text(value: object) -> object:
    """A text without characters that would reorder or hide others, cut to a length."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    cut = value if len(value) <= LONGEST else value[:LONGEST] + "…"
    return "".join(HARMLESS.get(unicodedata.category(sign), sign) for sign in cut)


def _data_address(png: bytes) -> Markup:
    # Base64 holds no character that means anything in HTML.
    return Markup("data:image/png;base64," + base64.b64encode(png).decode("ascii"))  # noqa: S704


def _heading(run: Run, label: str) -> dict[str, Any]:
    result = run.result
    return {
        "label": label,
        "name": result.name,
        "method": result.method,
        "status": result.status,
        "is_finished": result.status == "finished",
        "reason": result.reason,
        "folder": str(run.folder),
        "left_out": run.left_out,
    }


def _counts(counts: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """Rows of a text and its count in each run, the commonest first."""
    totals: dict[str, int] = {}
    for entry in counts:
        for text, number in entry.items():
            totals[text] = totals.get(text, 0) + number
    texts = sorted(totals, key=lambda text: -totals[text])
    rows = [[text, *(entry.get(text, 0) for entry in counts)] for text in texts[:REASONS_SHOWN]]
    return {"rows": rows, "more": max(len(texts) - REASONS_SHOWN, 0)}


def _refusals(run: Run) -> dict[str, int]:
    refused = {f"update refused: {verdict}": n for verdict, n in run.result.refused.items()}
    letters = run.result.letters_refused
    return refused | ({"letter refused": letters} if letters else {})


def _devices(run: Run) -> dict[str, Any]:
    worst, best = worst_and_best(run.accounts, DEVICES_SHOWN)
    groups = [("Counted least often", worst), ("Counted most often", best)]
    if not best:
        groups = [("All devices that were asked", worst)]
    return {
        "asked": len(run.accounts),
        "groups": [
            {"title": title, "rows": [_device(account) for account in accounts]}
            for title, accounts in groups
            if accounts
        ],
    }


def _device(account: DeviceAccount) -> list[str]:
    costs = (
        (account.energy_j, measures.joules),
        (account.bytes_up, measures.megabytes),
        (account.bytes_down, measures.megabytes),
        (account.train_s, measures.seconds),
        (account.busy_s, measures.seconds),
    )
    return [
        account.device,
        measures.count(account.asked),
        measures.count(account.counted),
        measures.percent(account.share),
        *(NOT_TOLD if value is None else write(value) for value, write in costs),
    ]


def _rounds(run: Run) -> dict[str, Any]:
    """The last rounds: as text, what the pictures show."""
    rows = run.result.rounds[-ROUNDS_SHOWN:]
    return {"rows": [_round(row) for row in rows], "more": len(run.result.rounds) - len(rows)}


def _round(row: RoundRow) -> list[str]:
    cells = (
        (row.accuracy, measures.percent),
        (row.loss, lambda loss: f"{loss:.4f}"),
        (row.bytes_up, measures.megabytes),
        (row.bytes_down, measures.megabytes),
        (row.energy_j, measures.joules),
    )
    return [
        str(row.round),
        row.status,
        measures.seconds(row.closed_s - row.opened_s),
        str(row.asked),
        str(len(row.devices)),
        *(NOT_TOLD if value is None else write(value) for value, write in cells),
    ]


def _settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every setting by its path, its value in each run, and whether they differ; those first."""
    tables = [_flat(_told(run)) for run in runs]
    paths = dict.fromkeys(path for table in tables for path in table)
    rows = []
    for path in paths:
        values = [table.get(path, NOT_TOLD) for table in tables]
        rows.append({"path": path, "values": values, "differs": len(set(values)) > 1})
    return sorted(rows, key=lambda row: not row["differs"])


def _told(run: Run) -> dict[str, Any]:
    result = run.result
    return {
        "seed": result.seed,
        "run": result.run,
        "versions": result.versions,
        "model_sha256": result.model_sha256,
    }


def _flat(table: Mapping[str, Any], before: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{before}{key}.")
        elif isinstance(value, str):
            flat[f"{before}{key}"] = value
        else:
            flat[f"{before}{key}"] = msgspec.json.encode(value).decode()
    return flat
