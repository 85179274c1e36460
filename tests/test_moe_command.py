"""`headwater-moe` as its users type it: what it says of mistakes, and how it ends."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

import moe_serving.__main__
from federation.errors import HeadwaterError
from moe_serving.config import read_moe_config
from tests.moe_models import publish_tiny

ROOT = Path(__file__).parents[1]


def command(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit code and words of the command within this process."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(sys, "argv", ["headwater-moe", *arguments])
    try:
        with pytest.raises(SystemExit) as ended:
            moe_serving.__main__.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


MISTAKES = {
    "no file": (None, "there is no file"),
    "no repository": ("repository = 'none'", "is not a folder"),
    "unknown key": ("repository = '.'\nport = 3", "unknown key 'port'"),
    "wrong range": ("repository = '.'\n[models.a]\nslots = 0", "slots is 0"),
    "wrong name": ("repository = '.'\n[models.'A b']\nslots = 1", "cannot be a model's name"),
    "wrong broker": ("repository = '.'\n[mqtt]\nbroker = 'tcp://x'", "is not understood"),
    "no model": ("repository = '.'\n[models.ghost]", "has no version"),
}


@pytest.mark.parametrize("what", list(MISTAKES))
def test_a_mistake_in_the_file_is_one_line(
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, and one line that says what is wrong and what to do."""
    text, word = MISTAKES[what]
    if text is not None:
        (tmp_path / "moe.toml").write_text(
            f"{text}\n[http]\nport = 0\n" if "port" not in text else text
        )

    code, out, err = command(["serve", str(tmp_path / "moe.toml")], monkeypatch, capsys)

    assert (code, out) == (2, "")
    assert word in err
    assert len(err.splitlines()) == 1


def test_show_checks_every_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line a model with its newest version; a damaged one is an error."""
    publish_tiny(tmp_path / "repository", "poet")
    publish_tiny(tmp_path / "repository", "poet", seed=1)

    monkeypatch.setattr(sys, "argv", ["headwater-moe", "show", str(tmp_path / "repository")])
    whole = command(["show", str(tmp_path / "repository")], monkeypatch, capsys)
    file = tmp_path / "repository" / "poet" / "2" / "config.json"
    file.write_text("{}")
    damaged = command(["show", str(tmp_path / "repository")], monkeypatch, capsys)

    assert whole == (0, "poet 2 (lm), 1 earlier\n", "")
    assert damaged[0] == 2
    assert "config.json has 2 bytes" in damaged[2]


def test_a_configuration_is_read_with_its_defaults(tmp_path: Path) -> None:
    """Paths are relative to the file; a model without settings has the defaults."""
    (tmp_path / "moe.toml").write_text("repository = '.'\n[models.poet]\nslots = 7\n")

    config = read_moe_config(tmp_path / "moe.toml")

    assert config.repository == tmp_path.resolve()
    assert (config.of_model("poet").slots, config.of_model("other").slots) == (7, 32)
    with pytest.raises(HeadwaterError, match="there is no file"):
        read_moe_config(tmp_path / "other.toml")


@pytest.mark.slow
@pytest.mark.parametrize(("grace_s", "code"), [(30.0, 0), (0.05, 3)])
def test_sigterm_finishes_what_was_accepted_and_the_code_tells(
    grace_s: float, code: int, tmp_path: Path
) -> None:
    """Each request gets one status: 200 within the grace; without, 503, and exit code 3."""
    publish_tiny(tmp_path / "repository", "poet")
    (tmp_path / "moe.toml").write_text(
        f"repository = 'repository'\ngrace_s = {grace_s}\n[http]\nport = 0\n"
        "[models.poet]\nslots = 1\ntarget_wait_s = 1000.0\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_serving", "serve", str(tmp_path / "moe.toml")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"serving poet \(1\) on (\S+)\n", line)
        assert found, line
        statuses = _ask_then_end(found.group(1), process)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()

    assert (process.returncode, out) == (code, ""), err
    assert "Traceback" not in err
    assert len(statuses) == 6
    assert set(statuses) == {200} if code == 0 else set(statuses) <= {200, 503}
    assert code == 0 or 503 in statuses


def _ask_then_end(url: str, process: subprocess.Popen[str]) -> list[int]:
    statuses: list[int] = []
    body = {"model": "poet", "prompt": "a", "max_tokens": 200}
    with httpx.Client(base_url=url, timeout=60.0) as client:

        def ask() -> None:
            statuses.append(client.post("/v1/completions", json=body).status_code)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 30
        while "queue_tokens" not in (seen := client.get("/metrics").text) or not _waits(seen):
            assert time.monotonic() < until, "nothing ever waited"
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
    return statuses


def _waits(metrics: str) -> bool:
    """Whether five wait behind the one that runs."""
    found = re.search(r'^headwater_moe_queue_tokens\{model="poet"\} (\S+)$', metrics, re.M)
    return found is not None and float(found.group(1)) == 5 * 201
