import json
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import save

import cloud.__main__
import edge_agent.__main__
from cloud.broker import start_broker
from cloud.config import HubConfig
from cloud.holder import hold
from cloud.store import Store
from federation.learning.data import LocalData
from federation.protocol import codec
from federation.protocol import messages as m
from federation.protocol.transfer import content_of
from simulations.datasets import load
from simulations.demo import write_data
from simulations.processes import Process, free_port
from tests.strangers import RunningHub, Stranger, running_hub, small_plan, until

MAINS = {"headwater-hub": cloud.__main__.main, "headwater-agent": edge_agent.__main__.main}

HUB = """
[broker]
port = {port}
"""
AGENT = """
device = "wrist-1"
broker = "mqtt://127.0.0.1:{port}"
folder = "journal"
{more}
"""
DATA = """
[data]
folder = "data"
"""
RUN = """
name = "digits"
rounds = 3
evaluation = "held-out"

[model]
name = "linear"
sizes = { inputs = 64, classes = 10 }

[policy]
devices_per_round = 1

[release]
every = 0
"""


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str

    def fails(self, *words: str) -> None:
        """It said in one line what is wrong, with these words, and ended as a mistake does."""
        assert self.code == 2, self
        assert len(self.err.splitlines()) == 1, self.err
        for word in words:
            assert word in self.err, self.err
        assert "Traceback" not in self.out + self.err

    def succeeds(self) -> str:
        assert self.code == 0, self
        assert self.err == ""
        return self.out


Type = Callable[..., Said]


@pytest.fixture
def typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Type]:
    """Runs a command line as its console script does, in the test's folder or another."""

    def run(command: str, *words: str | Path, folder: Path = tmp_path) -> Said:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [command, *map(str, words)])
        capsys.readouterr()
        code: Any = 0
        try:
            MAINS[command]()
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts commands as processes, and ends those that are left."""
    started: list[Process] = []

    def start(*words: str, **environment: str) -> Process:
        log = tmp_path / f"{words[0]}-{len(started)}.log"
        started.append(Process([sys.executable, "-m", *words], log, environment))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()


# What may be wrong in a file ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("colour = 3", ["unknown key 'colour'", "may have device, broker", "correct or remove"]),
        ("[training]\nthread = 2", ["unknown key 'thread'", "[training]", "did you mean threads?"]),
        ("heartbeat_s = 'often'", ["heartbeat_s is text in quotes", "expected a number"]),
        ("heartbeat_s = -1", ["heartbeat_s is -1", "above 0"]),
        ("keepalive_s = 1", ["keepalive_s is 1", "between 5 and 3600"]),
        ("[training]\nthreads = 0", ["training.threads is 0", "between 1 and 1024"]),
        ("ca_file = 'nowhere.pem'", ["ca_file 'nowhere.pem' is not there", "PEM file"]),
        ("namespace = 'My Fleet'", ["namespace 'My Fleet'", "lower-case letters"]),
        ("[data]\nfolder = 'nowhere'", ["nowhere is not a folder", ".npz or .csv", "create it"]),
        ("[data]\nfolder = '.'", ["has no .npz or .csv file", "put the data there"]),
        ("[data]\nfolder = '.'\nentry = 'a:b'", ["both folder and entry", "one of the two"]),
        ("[data]\nentry = 'watch'", ["data.entry is 'watch'", "expected module:function"]),
        ("[data]\nentry = 'no_such:load'", ["'no_such'", "cannot be found", "install it"]),
        ("[data]\nentry = 'json:none'", ["json has no function 'none'"]),
        ("device 3", ["is not TOML", "line"]),
    ],
)
def test_a_mistake_in_agent_toml_is_named(
    text: str, words: list[str], typed: Type, tmp_path: Path
) -> None:
    """A wrong agent.toml is answered with the key, what it may be, and what to do; code 2."""
    port = free_port()
    (tmp_path / "agent.toml").write_text(AGENT.format(port=port, more=text))

    said = typed("headwater-agent", "check", "agent.toml")

    said.fails("headwater-agent: ", *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("colour = 3", ["unknown key 'colour'", "may have namespace, folder, database, broker"]),
        ("[broker]\nprot = 3", ["unknown key 'prot'", "did you mean port?"]),
        ("[broker]\nport = '1883'", ["broker.port is text in quotes", "expected a whole number"]),
        ("[broker]\nport = 99999", ["broker.port is 99999", "between 0 and 65535"]),
        ("[broker]\nkind = 'emqx'", ["broker.kind is 'emqx'", "auto, mosquitto, nats"]),
        ("[broker]\nurl = 'localhost'", ["'localhost' is not understood", "mqtt://host:port"]),
        ("namespace = 'A B'", ["namespace 'A B'", "lower-case letters"]),
        ("folder = 'hub.toml'", ["hub.toml cannot be used", "name one that it may create"]),
        ("database = 'mysql://x/y'", ["'mysql' is not supported", "sqlite or postgresql"]),
        ("folder = 3", ["folder is a whole number", "text in quotes"]),
        ("namespace = ", ["hub.toml is not TOML"]),
    ],
)
def test_a_mistake_in_hub_toml_is_named(
    text: str, words: list[str], typed: Type, tmp_path: Path
) -> None:
    """A wrong hub.toml is answered with the key, what it may be, and what to do; code 2."""
    broker = "" if "[broker]" in text else f"\n[broker]\nport = {free_port()}\n"
    (tmp_path / "hub.toml").write_text(text + broker)

    said = typed("headwater-hub", "serve")

    said.fails("headwater-hub: ", *words)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Store]]:
    """A folder with hub.toml and a hub's record in it, and no hub at work."""
    home = tmp_path_factory.mktemp("record")
    (home / "hub.toml").touch()
    (home / "held-out").mkdir()
    store = Store(HubConfig(folder=home / "hub").database_url)
    yield home, store
    store.close()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("rounds = 3", "rounds = 0", ["rounds is 0", "at least one"]),
        ("rounds = 3", "", ["key rounds is missing", "add it"]),
        ('"linear"', '"resnet"', ["'resnet'", "linear, mlp, cnn, conv1d"]),
        ("inputs = 64", "input = 64", ["no size 'input'", "inputs, classes"]),
        ("inputs = 64", "inputs = 0", ["inputs = 0", "1 to 65536"]),
        ('"held-out"', '"nowhere"', ["nowhere is not a folder", "leave the key out"]),
        ("[release]", "quorum = 2\n[release]", ["quorum is 2", "between 1 and devices_per_round"]),
        ("[release]", "deadline_s = inf\n[release]", ["deadline_s is inf", "finite"]),
        ("[release]", "gather_s = nan\n[release]", ["gather_s is nan", "finite"]),
        ("[release]", "[training]\nepochs = -1\n[release]", ["training.epochs is -1", "0 or more"]),
        ("[release]", "[method]\nname = 'sgd'\n[release]", ["'sgd'", "fedavg, fedprox"]),
        ('"digits"', '"My Run"', ["'My Run'", "lower-case letters"]),
    ],
)
def test_a_mistake_in_run_toml_is_named_before_the_hub_hears_of_it(
    old: str, new: str, words: list[str], typed: Type, record: tuple[Path, Store]
) -> None:
    """A run that could not begin is refused when it is asked for, and leaves no trace."""
    home, store = record
    (home / "run.toml").write_text(RUN.replace(old, new, 1))

    said = typed("headwater-hub", "start", "run.toml", folder=home)

    said.fails("run.toml: ", *words)
    assert store.runs() == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["headwater-agent", "run", "nowhere.toml"], ["no file nowhere.toml", "create it"]),
        (["headwater-agent", "check", "."], ["cannot read .", "Is a directory"]),
        (["headwater-hub", "serve", "nowhere.toml"], ["no hub's file nowhere.toml", "name it"]),
        (["headwater-hub", "status"], ["no hub's file hub.toml", "--hub or HEADWATER_HUB"]),
        (["headwater-hub", "start", "run.toml"], ["no hub's file hub.toml"]),
    ],
)
def test_a_missing_file_is_named(words: list[str], expected: list[str], typed: Type) -> None:
    """A file that is not there is named, with what was expected and how to name another."""
    said = typed(*words)

    said.fails(*expected)


def test_a_record_that_is_not_there_is_explained(typed: Type, tmp_path: Path) -> None:
    """Asking about a hub that never ran says so, and how to start it."""
    (tmp_path / "hub.toml").touch()

    for words in (["status"], ["why", "digits"], ["stop", "digits"]):
        typed("headwater-hub", *words).fails("no hub ever ran in", "headwater-hub serve hub.toml")


def test_the_hub_file_may_be_named_three_ways(
    typed: Type, record: tuple[Path, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """hub.toml of the current folder, --hub and HEADWATER_HUB all name the hub."""
    home = record[0]

    answers = [typed("headwater-hub", "status", folder=home)]
    answers.append(typed("headwater-hub", "status", "--hub", home / "hub.toml"))
    monkeypatch.setenv("HEADWATER_HUB", str(home / "hub.toml"))
    answers.append(typed("headwater-hub", "status"))

    assert ["Hub is not running" in answer.succeeds() for answer in answers] == [True] * 3


def test_a_run_without_a_hub_waits_for_one(typed: Type, tmp_path: Path) -> None:
    """With no hub at work a run may be asked for, and everyone says what it waits for."""
    (tmp_path / "hub.toml").touch()
    (tmp_path / "held-out").mkdir()
    (tmp_path / "run.toml").write_text(RUN)
    Store(HubConfig(folder=tmp_path / "hub").database_url).close()

    asked = typed("headwater-hub", "start", "run.toml").succeeds()

    assert "headwater-hub why digits" in asked
    assert "no hub is running here" in asked
    assert "a hub: none is running here" in typed("headwater-hub", "why", "digits").succeeds()
    assert "Hub is not running" in typed("headwater-hub", "status").succeeds()
    assert json.loads(typed("headwater-hub", "status", "--json").succeeds())["hub"] is None
    typed("headwater-hub", "start", "run.toml").fails("a run 'digits' already", "another name")
    typed("headwater-hub", "why", "digit").fails("no run 'digit'", "there are digits")
    typed("headwater-hub", "stop", "digit").fails("no run 'digit'", "there are digits")


# A broker that does not let us in -----------------------------------------------------------


@pytest.mark.broker
def test_a_taken_port_and_a_taken_folder_are_named(typed: Type, tmp_path: Path) -> None:
    """A hub whose port or folder is in use says whose turn it is, and starts nothing."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (tmp_path / "hub.toml").write_text(HUB.format(port=port))
        typed("headwater-hub", "serve").fails(f"port {port}", "not to be had", "another port")
    with hold(tmp_path / "hub"):
        typed("headwater-hub", "serve").fails("another hub works in", "stop it")


@pytest.mark.broker
def test_a_wrong_password_is_told_from_an_unreachable_broker(
    typed: Type, launch: Callable[..., Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check` and `run` say that user or password are wrong, where the broker says so."""
    users = {"hub": "river", "wrist-1": "stream"}
    with start_broker("auto", tmp_path / "broker", users=users, namespace="fleet") as broker:
        config = tmp_path / "agent.toml"
        config.write_text(AGENT.format(port=broker.port, more='user = "wrist-1"'))
        refusal = ["refuses 'fleet-wrist-1", "user", "password", "correct"]

        monkeypatch.setenv("HEADWATER_PASSWORD", "brook")
        typed("headwater-agent", "check", config).fails(*refusal)
        agent = launch("edge_agent", "run", str(config), HEADWATER_PASSWORD="brook")
        until(lambda: "WARNING" in agent.last_words(), agent.last_words)
        assert len(agent.last_words().splitlines()) == 1
        assert all(word in agent.last_words() for word in refusal)
        assert agent.stop(patience_s=10.0) == 0

        monkeypatch.setenv("HEADWATER_PASSWORD", "stream")
        said = typed("headwater-agent", "check", config).succeeds()
        assert "lets this device in" in said
        assert "no hub was ever heard in namespace 'fleet'" in said


@pytest.mark.broker
def test_whoever_finds_no_broker_says_so_once_and_keeps_trying(
    typed: Type, launch: Callable[..., Process], tmp_path: Path
) -> None:
    """Hub and agent without a broker warn once, and meet when it is there at last."""
    port = free_port()
    url = f"mqtt://127.0.0.1:{port}"
    (tmp_path / "hub.toml").write_text(f'[broker]\nurl = "{url}"')
    (tmp_path / "agent.toml").write_text(AGENT.format(port=port, more=""))
    typed("headwater-agent", "check", "agent.toml").fails("no broker answers at", "start it")

    hub = launch("cloud", "serve", str(tmp_path / "hub.toml"))
    agent = launch("edge_agent", "run", str(tmp_path / "agent.toml"))
    everyone = (hub, agent)
    until(lambda: all("no broker answers at" in each.last_words() for each in everyone))
    with start_broker("auto", tmp_path / "broker", port=port):
        store = Store(HubConfig(folder=tmp_path / "hub").database_url)
        until(lambda: [device.device for device in store.devices()] == ["wrist-1"])
        store.close()
        endings = [process.stop(patience_s=10.0) for process in (agent, hub)]

    assert endings == [0, 0]
    for process in (hub, agent):
        warnings = [line for line in process.last_words().splitlines() if "WARNING" in line]
        assert len(warnings) == 1, warnings
        assert url in warnings[0]
        assert "start it, or correct the address" in warnings[0]
        assert "Traceback" not in process.last_words()


# How a run is, and why ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    """A hub at work in a folder with its hub.toml."""
    home = tmp_path_factory.mktemp("hub")
    (home / "hub.toml").touch()
    with (
        start_broker("auto", home / "broker") as broker,
        running_hub(home / "hub", broker.url) as running,
    ):
        yield running


@pytest.fixture
def ask(typed: Type, hub: RunningHub) -> Callable[..., str]:
    """What `headwater-hub` answers in the hub's folder."""

    def answer(*words: str) -> str:
        return typed("headwater-hub", *words, folder=hub.folder.parent).succeeds()

    return answer


Ask = Callable[..., str]


@pytest.mark.broker
def test_why_tells_of_a_wait_for_devices_and_of_runs_behind_it(hub: RunningHub, ask: Ask) -> None:
    """A run without devices says how many it needs; the next one says whom it waits for."""
    gone = Stranger("gone", hub.url)
    gone.join()
    gone.hear(m.Welcome)
    gone.leave()
    hub.ask(small_plan("first", devices_per_round=2, quorum=2, gather_s=60.0))
    hub.ask(small_plan("second"))
    until(lambda: hub.status("first").wait is not None)
    until(lambda: "goodbye" in ask("why", "first"))

    first, second, status = ask("why", "first"), ask("why", "second"), ask("status")

    assert "Run first is active: round 0 of 1." in first
    assert "devices: 0 of 2 are there; a round needs 2 (at most " in first
    assert "after 11 waits of 60 s in vain the run fails" in first
    assert "gone  it said goodbye" in first
    assert "It waits for the end of first (round 0 of 1)" in second
    assert "Hub is running (process " in status
    assert re.search(r"^second +requested +0/1 .*waits for its turn$", status, re.MULTILINE)
    assert re.search(r"^gone +disconnected .*it said goodbye$", status, re.MULTILINE)

    assert "asked to stop" in ask("stop", "second")
    assert hub.finish("second").status == "stopped"
    ask("stop", "first")
    assert hub.finish("first").status == "stopped"


@pytest.mark.broker
def test_why_tells_what_became_of_every_device(hub: RunningHub, ask: Ask) -> None:
    """Of each device of a round `why` says what it does, why it dropped out, or was not asked."""
    strangers = {name: Stranger(name, hub.url) for name in ("ann", "ben", "cem", "dan", "eve")}
    strangers |= {"fay": Stranger("fay", hub.url), "gus": Stranger("gus", hub.url)}
    for name, stranger in strangers.items():
        stranger.join(trains=name != "gus")
        stranger.hear(m.Welcome)
    hub.ask(small_plan("fates", devices_per_round=5, lost_grace_s=60.0, deadline_s=60.0))
    until(lambda: len(hub.store.attempts("fates", 1)) == 5)
    asked = [entry.device for entry in hub.store.attempts("fates", 1)]
    silent, busy, vanished, unwilling, poisonous = (strangers[name] for name in asked)
    tasks = {name: strangers[name].hear(m.Assignment) for name in asked}

    busy.say(m.TaskEvent(attempt=tasks[busy.name].attempt, event="training"))
    reason = "battery at [/red] 3 % :skull:"
    unwilling.say(
        m.TaskEvent(attempt=tasks[unwilling.name].attempt, event="declined", reason=reason)
    )
    poisonous.say(poisoned(tasks[poisonous.name]))
    vanished.vanish()
    until(lambda: len(hub.why("fates").dropped) == 2 and "lost" in ask("why", "fates"))
    text, found, status = (
        ask("why", "fates"),
        json.loads(ask("why", "fates", "--json")),
        ask("status"),
    )

    (left_out,) = {"ann", "ben", "cem", "dan", "eve", "fay"} - set(asked)
    assert "updates: 0 of 5 are in; at the deadline the round makes do with 1" in text
    assert "has not answered yet" in found["open"][silent.name]
    assert "began to train" in found["open"][busy.name]
    assert "its link was lost; waited for at most" in found["open"][vanished.name]
    assert found["dropped"][unwilling.name] == f"declined: {reason}"
    assert "refused: tensor 'classifier.bias'" in found["dropped"][poisonous.name]
    assert "not drawn" in found["not_asked"][left_out]
    assert found["not_asked"]["gus"] == "it does not train, it only infers"
    for section in ("open", "dropped", "not_asked"):
        for device, why in found[section].items():
            assert re.search(rf"^  {device} +{re.escape(why[:10])}", text, re.MULTILINE)
    assert re.search(rf"^{unwilling.name} +ready .*{re.escape(reason)}$", status, re.MULTILINE)

    ask("stop", "fates")
    hub.finish("fates")
    assert "It waits for nothing: it is stopped (the operator stopped it)" in ask("why", "fates")
    for stranger in strangers.values():
        stranger.leave()


@pytest.mark.broker
def test_why_remembers_who_dropped_out_of_earlier_rounds(hub: RunningHub, ask: Ask) -> None:
    """A device that failed in round after round is named, and so are rounds without a model."""
    stranger = Stranger("clumsy", hub.url)
    stranger.join()
    hub.ask(small_plan("stumbles", rounds=3, devices_per_round=1, max_abandoned=2))
    for _ in range(3):
        task = stranger.hear(m.Assignment)
        stranger.say(m.TaskEvent(attempt=task.attempt, event="failed", reason="out of memory"))

    assert hub.finish("stumbles").status == "failed"
    found = json.loads(ask("why", "stumbles", "--json"))
    stranger.leave()

    assert "3 rounds in a row" in found["waiting"]
    assert found["dropped"] == {"clumsy": "failed: out of memory"}
    assert found["fell_out"] == {
        "clumsy": "round 2: failed: out of memory (2 of the last 2 rounds)"
    }
    assert sorted(found["abandoned"]) == ["1", "2", "3"]


def poisoned(task: m.Assignment) -> m.UpdateOpen:
    """An update with NaN in it."""
    assert task.inline is not None
    base = codec.decode(task.inline)
    data = save({**base, "classifier.bias": np.full(10, np.nan, np.float32)})
    report = m.Report(samples=1)
    content = content_of(data, 65536)
    return m.UpdateOpen(attempt=task.attempt, content=content, report=report, inline=data)


# A day with both commands ---------------------------------------------------------------------


@pytest.mark.broker
def test_a_day_of_an_operator_and_a_device_owner(
    typed: Type, launch: Callable[..., Process], tmp_path: Path
) -> None:
    """Hub and agent serve, train, release and predict; told to stop, they leave nothing behind."""
    port = free_port()
    digits = load("digits", cache=Path())
    write_data(tmp_path / "data", LocalData(digits.x[:200], digits.y[:200]))
    write_data(tmp_path / "held-out", LocalData(digits.x[200:300], digits.y[200:300]))
    np.savez(tmp_path / "samples.npz", x=digits.x[300:305])
    (tmp_path / "hub.toml").write_text(HUB.format(port=port))
    (tmp_path / "agent.toml").write_text(AGENT.format(port=port, more=DATA))
    (tmp_path / "run.toml").write_text(RUN.replace("every = 0", "every = 3"))
    predict = ["headwater-agent", "predict", "agent.toml", "samples.npz"]

    hub = launch("cloud", "serve", str(tmp_path / "hub.toml"))
    until(lambda: "hub is serving" in hub.last_words(), hub.last_words)
    checked = typed("headwater-agent", "check", "agent.toml").succeeds()
    typed(*predict).fails("no released model", "run the agent")
    agent = launch("edge_agent", "run", str(tmp_path / "agent.toml"))
    typed("headwater-hub", "start", "run.toml").succeeds()
    until(lambda: "finished" in typed("headwater-hub", "why", "digits").succeeds(), hub.last_words)
    until(lambda: typed(*predict).code == 0, lambda: (typed(*predict), hub.last_words()))
    predicted = typed(*predict).succeeds().splitlines()
    status = json.loads(typed("headwater-hub", "status", "--json").succeeds())
    typed("headwater-hub", "stop", "digits").fails("is over: it is finished")

    assert checked.splitlines() == [
        "configuration of wrist-1 is in order",
        f"folder {tmp_path / 'journal'} can be written to",
        "data has 200 samples of 1 x 8 x 8, labels 0 to 9",
        f"broker mqtt://127.0.0.1:{port} lets this device in",
        "hub of namespace 'fleet' is online",
    ]
    assert status["hub"]["pid"] == hub.pid
    assert [device["device"] for device in status["devices"]] == ["wrist-1"]
    assert status["runs"][0]["status"] == "finished"
    assert all(re.fullmatch(r"\d\t[01]\.\d{3}", line) for line in predicted)
    assert len(predicted) == 5

    processes = [psutil.Process(process.pid) for process in (hub, agent)]
    children = [child for process in processes for child in process.children(recursive=True)]
    assert len(children) >= 2  # the broker, and the trainer that waits for more work
    processes[1].send_signal(signal.SIGINT)
    until(lambda: not agent.is_running)
    processes[0].send_signal(signal.SIGINT)
    until(lambda: not hub.is_running)
    assert [agent.stop(), hub.stop()] == [0, 0]
    _, alive = psutil.wait_procs(children, timeout=5.0)
    assert alive == []
    assert "Traceback" not in hub.last_words() + agent.last_words()
    assert "Hub is not running" in typed("headwater-hub", "status").succeeds()
