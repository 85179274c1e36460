import json
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from cloud.broker import start_broker
from cloud.config import HubConfig
from cloud.holder import hold
from cloud.record.store import Store
from federation.datasets.cached import load
from federation.learning.data import LocalData
from simulations.demo.script import write_data
from simulations.processes import Process, free_port
from tests.command_line import Type
from tests.strangers import until

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
