"""A report shows what a run's folder holds, harmlessly, and says what it does not hold."""

import html.parser
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from msgspec.structs import replace
from PIL import Image
from typer.testing import CliRunner

from federation.errors import ConfigError
from simulations.reporting.attempts import worst_and_best
from simulations.reporting.command import Report, render_report, write_report
from simulations.reporting.look import LIGHT
from simulations.reporting.page import render_page
from simulations.reporting.reading import read_run
from simulations.scenario import find_scenario, read_scenario
from simulations.simulation import simulate
from tests.reported import COUNTED, HEADER, LOST, one_round, whole_result, write_run

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=y>{{7*7}}$\\frac{\u202eevil\x00\x1b[2J"
PICTURES = {
    "accuracy_by_round.png", "accuracy_by_time.png", "jitter.png", "participation.png",
    "fleet.png", "traffic.png", "energy.png", "round_time.png",
}  # fmt: skip


class Seen(html.parser.HTMLParser):
    """What a browser would make of a page: its elements with attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all_of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def seen(page: str | Path) -> Seen:
    return Seen(Path(page).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def report(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return write_report([run], tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(report: Report) -> Seen:
    return seen(report.page)


@pytest.fixture(scope="module")
def command() -> Callable[..., str]:
    """The command as it stands alone; its output, or the error it ends with."""
    app = typer.Typer()
    app.command()(render_report)

    def call(*words: str | Path) -> str:
        ended = CliRunner().invoke(app, [str(word) for word in words])
        if ended.exception is not None:
            raise ended.exception
        return ended.output

    return call


# What a page holds ---------------------------------------------------------------------------


def test_a_page_fetches_nothing(page: Seen) -> None:
    """Every picture is inside the page, and neither script, sheet nor address leads out of it."""
    addresses = [
        value or ""
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in {"src", "srcset", "href", "action", "data", "poster"}
    ]

    assert len(page.all_of("img")) == len(page.all_of("source")) == len(PICTURES)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.elements}
    policy = next(meta["content"] for meta in page.all_of("meta") if "http-equiv" in meta)
    assert policy is not None
    assert "default-src 'none'" in policy


def test_every_picture_is_a_file_and_described_in_words(report: Report, page: Seen) -> None:
    """Each picture lies beside the page as a PNG, and the page says in words what it shows."""
    images = {Path(file).name: Image.open(file) for file in report.pictures}
    alts = [image["alt"] or "" for image in page.all_of("img")]

    assert set(images) == PICTURES
    for image in images.values():
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 300
    assert all(re.search(r"\d.*\.$", alt) for alt in alts), alts
    assert any("12 rounds" in alt and "30 devices" in alt for alt in alts)


def test_the_fleet_picture_shows_each_state_in_its_colour(run: Path, report: Report) -> None:
    """Each state of a device takes as much of the picture as of the fleet's rounds."""
    states = np.load(run / "fleet.npy")
    picture = np.asarray(Image.open(Path(report.page).parent / "fleet.png").convert("RGB")).reshape(
        -1, 3
    )
    colours = [tuple(bytes.fromhex(colour[1:])) for colour in LIGHT.states]
    pixels = np.array([(picture == colour).all(1).sum() for colour in colours], float)

    shares = np.bincount(states.ravel(), minlength=5) / states.size
    assert pixels / pixels.sum() == pytest.approx(shares, abs=0.02)


def test_tables_have_headers_and_true_figures(run: Path, page: Seen) -> None:
    """Columns and rows are headed, and the figures are those of the run's files."""
    result = json.loads((run / "result.json").read_text())
    counted = sum(len(row["devices"]) for row in result["rounds"])
    energy = sum(row["energy_j"] for row in result["rounds"])

    assert {head["scope"] for head in page.all_of("th")} == {"col", "row"}
    assert f"Updates counted{counted}" in page.text.replace(",", "")
    assert f"Energy of devices{energy:.1f} J" in page.text.replace(",", "")
    assert "lost: its link was lost" in page.text
    assert "run.training.learning_rate0.1" in page.text


def test_a_devices_account_is_the_sum_of_its_attempts(run: Path) -> None:
    """Asked, counted, energy, bytes and seconds of each device add up to those of its rounds."""
    rounds = json.loads((run / "result.json").read_text())["rounds"]
    states = np.load(run / "fleet.npy")
    accounts = {account.device: account for account in read_run(run).accounts}

    for place in range(states.shape[1]):
        account = accounts[f"d{place:02d}"]
        asked = int((states[:, place] >= COUNTED).sum())
        assert account.asked == asked
        assert account.counted == sum(account.device in row["devices"] for row in rounds)
        assert account.energy_j == pytest.approx(2.5 * asked)
        assert account.bytes_down == 1100 * asked
        assert account.train_s == pytest.approx(0.5 * asked)


def test_the_worst_devices_stand_before_the_best(run: Path, page: Seen) -> None:
    """Ten that counted least often, then ten that did most often: worst and best first."""
    accounts = read_run(run).accounts
    worst, best = worst_and_best(accounts, 10)
    shares = sorted(account.share for account in accounts)

    assert [account.share for account in worst] == shares[:10]
    assert [account.share for account in best] == shares[:-11:-1]
    shown = [page.text.index(f"\n{account.device}") for account in (*worst, *best)]
    assert shown == sorted(shown)
    assert worst_and_best(accounts[:20], 10)[1] == []


def test_two_runs_stand_side_by_side(run: Path, tmp_path: Path) -> None:
    """Two runs share their pictures; differences of figures and settings stand in tables."""
    other = write_run(tmp_path / "other", seed=1, rounds=8, devices=20, name="second")
    report = write_report([run, tmp_path / "other"])
    both = seen(report.page)

    assert Path(report.page).parent == run / "report-beside-other"
    assert "difference, B less A" in both.text
    assert "Updates asked for" in both.text
    asked = [
        sum(row["asked"] for row in result["rounds"])
        for result in (json.loads((run / "result.json").read_text()), other)
    ]
    assert f"{asked[0]}{asked[1]}\N{MINUS SIGN}{asked[0] - asked[1]}" in both.text
    settings = both.text.split("the same")[1]
    assert settings.index("run.training.epochs") < settings.index("run.training.learning_rate")
    assert len(both.all_of("img")) == len(PICTURES)


# Hostile and damaged files -------------------------------------------------------------------


def test_what_a_peer_says_is_text_and_nothing_else(tmp_path: Path) -> None:
    """Names and reasons of any content appear as text: no element or attribute comes of them."""
    write_run(tmp_path / "plain", rounds=4, devices=6)
    write_run(
        tmp_path / "hostile",
        rounds=4,
        devices=6,
        name=HOSTILE,
        namer=lambda place: f"{HOSTILE}{place}",
        reason=HOSTILE,
    )
    plain, hostile = (
        Seen(render_page([read_run(tmp_path / kind)], [])) for kind in ("plain", "hostile")
    )

    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert [sorted(a) for _, a in hostile.elements] == [sorted(a) for _, a in plain.elements]
    assert "<script>alert(1)</script>" in hostile.text
    assert "{{7*7}}" in hostile.text
    assert not set("\u202e\x00\x1b") & set(hostile.text)


def test_long_texts_are_cut(tmp_path: Path) -> None:
    """A name of a megabyte does not make a page of many."""
    write_run(tmp_path, rounds=2, devices=3, namer=lambda place: f"{place}" + "x" * 10**6)

    assert len(render_page([read_run(tmp_path)], [])) < 10**5


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("attempts.csv", None, "there is no attempts.csv"),
        ("attempts.csv", b"", "lacks the column round"),
        ("attempts.csv", b"round,place,device\n1,0,d00\n", "lacks the column opened_s"),
        ("attempts.csv", ",".join(HEADER).encode() + b"\n1,0,d00,rec", "line 2 has 4 values"),
        (
            "attempts.csv",
            ",".join(HEADER).encode() + b"\n1,0,d00,received,,1,2,3,nan,5,6\n",
            "energy_j is 'nan'",
        ),
        ("fleet.npy", None, "there is no fleet.npy"),
        ("fleet.npy", b"\x93NUMPY\x01", "fleet.npy is damaged"),
        ("fleet.npy", np.zeros((12, 30), np.float32), "no table of bytes"),
        ("fleet.npy", np.full((12, 30), 9, np.uint8), "of another version"),
        ("fleet.npy", np.zeros((7, 30), np.uint8), "has 7 rounds"),
        ("fleet.npy", np.zeros((0, 30), np.uint8), "is empty"),
        ("fleet.npy", np.array([{"a": 1}], object), "fleet.npy is damaged"),
    ],
)
def test_what_is_missing_or_damaged_is_left_out_and_said(
    tmp_path: Path, file: str, content: bytes | np.ndarray[Any, Any] | None, words: str
) -> None:
    """Without one of the files beside the result, or with a damaged one, the rest is read."""
    write_run(tmp_path)
    (tmp_path / file).unlink()
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    elif content is not None:
        np.save(tmp_path / file, content)
    read = read_run(tmp_path)

    assert len(read.left_out) == 1
    assert words in read.left_out[0]
    assert len(read.accounts) == 30
    assert (read.fleet is None) == (file == "fleet.npy")
    assert (read.accounts[0].energy_j is None) == (file == "attempts.csv")


def test_a_run_of_an_older_version_has_a_report(
    tmp_path: Path, command: Callable[..., str]
) -> None:
    """A result alone, without energy, is shown; page and command say what it lacks."""
    result = write_run(tmp_path, rounds=3, devices=30)
    for row in result["rounds"]:
        del row["energy_j"], row["train_s"]
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "attempts.csv").unlink()
    (tmp_path / "fleet.npy").unlink()
    said = [line for line in command(tmp_path).splitlines() if line.startswith("left out")]
    shown = seen(tmp_path / "report" / "report.html")

    assert len(said) == 2
    for words in ("there is no attempts.csv", "there is no fleet.npy", "Energy of devicesnot rec"):
        assert words in shown.text
    files = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert files == PICTURES - {"fleet.png", "energy.png"}


def test_a_header_cannot_ask_for_more_than_the_file_has(tmp_path: Path) -> None:
    """A fleet.npy that claims a terabyte is damaged, and no memory is taken for it."""
    write_run(tmp_path)
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"shape": (10**6, 10**6), "fortran_order": False, "descr": "|u1"}
    )
    (tmp_path / "fleet.npy").write_bytes(file.getvalue())

    assert "fleet.npy is damaged" in read_run(tmp_path).left_out[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is no folder of a run"),
        (b"", "is damaged"),
        (b"{", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[]", "of another version"),
        (b'{"status": "finished"}', "of another version"),
        (b'{"name": "x", "rule": "trust", "matrix": {}}', "peers without a hub"),
    ],
)
def test_a_folder_of_no_run_is_refused_in_one_line(
    tmp_path: Path, command: Callable[..., str], content: bytes | None, words: str
) -> None:
    """What is no result, a damaged one or one of another kind is named, with what to do."""
    if content is not None:
        (tmp_path / "result.json").write_bytes(content)

    with pytest.raises(ConfigError) as refused:
        command(tmp_path)

    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("change", ["accuracy", "round", "energy_j", "closed_s"])
def test_figures_out_of_range_are_refused(tmp_path: Path, change: str) -> None:
    """A round with an impossible figure makes the result one that cannot be shown."""
    result = write_run(tmp_path)
    result["rounds"][4][change] = -5
    (tmp_path / "result.json").write_text(json.dumps(result))

    with pytest.raises(ConfigError, match="another version"):
        write_report([tmp_path])


def test_a_comparisons_folder_is_not_taken_for_a_run(tmp_path: Path) -> None:
    """The folder of `compare` is told apart, and its runs are named as what to give."""
    (tmp_path / "comparison.json").write_text("{}")

    with pytest.raises(ConfigError, match="give one or two of the runs' folders in it"):
        write_report([tmp_path])


def test_a_folder_that_cannot_be_written_to_is_named(run: Path, tmp_path: Path) -> None:
    """A file where the report's folder should be is a mistake told in one line."""
    (tmp_path / "taken").write_text("")

    with pytest.raises(ConfigError, match=r"cannot write to .*taken"):
        write_report([run], tmp_path / "taken")


def test_a_run_without_rounds_has_a_page(tmp_path: Path) -> None:
    """Where no round was opened, the page has figures and settings, and says so."""
    result = write_run(tmp_path)
    whole = whole_result([], "empty", 0, 30.0)
    (tmp_path / "result.json").write_text(json.dumps(result | whole))
    (tmp_path / "attempts.csv").write_text(",".join(HEADER) + "\n")
    (tmp_path / "fleet.npy").unlink()
    report = write_report([tmp_path])

    assert report.pictures == ()
    assert "no round was opened" in seen(report.page).text


def test_a_run_of_one_abandoned_round_has_a_page(tmp_path: Path) -> None:
    """A run whose only round gave no model shows who was asked, and no curve of accuracy."""
    result = write_run(tmp_path, rounds=1, devices=1)
    row = one_round(1, [LOST], (1.0, 2.0), "d{:02d}".format, "gone")
    (tmp_path / "result.json").write_text(json.dumps(result | whole_result([row], "one", 0, 2.0)))
    names = {Path(file).name for file in write_report([tmp_path]).pictures}

    assert "participation.png" in names
    assert "accuracy_by_round.png" not in names


# The command, and a real run ----------------------------------------------------------


def test_a_real_runs_folder_has_a_report(tmp_path: Path) -> None:
    """What `simulate` leaves behind can be shown, with its accuracy as its result tells it."""
    smoke = read_scenario(find_scenario("smoke"))
    scenario = replace(smoke, run=replace(smoke.run, rounds=2))
    result = simulate(scenario, tmp_path, cache=tmp_path)
    shown = seen(write_report([tmp_path]).page)

    assert result.accuracy is not None
    assert f"Accuracy of the last model{100 * result.accuracy:.1f} %" in shown.text
    assert result.model_sha256 in shown.text


def test_the_same_run_gives_the_same_page(
    run: Path, report: Report, tmp_path: Path, command: Callable[..., str]
) -> None:
    """Two reports of one folder are equal to the byte; with --json the command names all files."""
    said = json.loads(command(run, "--out", tmp_path / "a" / "b", "--json"))

    assert Path(said["page"]).read_bytes() == Path(report.page).read_bytes()
    assert {Path(file).name for file in said["pictures"]} == PICTURES
    assert Path(said["page"]).parent == tmp_path / "a" / "b"
    assert said["left_out"] == []
