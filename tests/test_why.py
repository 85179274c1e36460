import json
import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from safetensors.numpy import save

from cloud.broker import start_broker
from federation.protocol import codec
from federation.protocol import messages as m
from federation.protocol.transfer import content_of
from tests.command_line import Type
from tests.strangers import RunningHub, Stranger, running_hub, small_plan, until

pytestmark = pytest.mark.broker


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
