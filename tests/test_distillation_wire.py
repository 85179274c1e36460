"""Students, mirrors and stand-ins over the wire: the hub by hand, and a real fleet over MQTT."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from cloud.config import MethodChoice, ModelChoice, RunPlan
from cloud.coordination.coordinator import Coordinator
from cloud.coordination.facts import (
    AttemptChanged,
    ChunkStored,
    HubMemory,
    MirrorTaken,
    RoundClosed,
    UpdateAccepted,
    UpdateRefused,
)
from cloud.coordination.standing_in import LABEL
from cloud.mirrors import follow
from cloud.record.registry import Registry
from cloud.teaching import TeachingPlan, prepare
from edge_agent.config import read_agent_config
from edge_agent.runner import _capability as capability_of
from edge_agent.trainer import fulfil
from federation.errors import ConfigError
from federation.learning.data import LocalData
from federation.learning.layers import model_part
from federation.learning.mirroring import pack_mirror
from federation.learning.samples import sample_digest
from federation.protocol import messages as m
from federation.protocol.codec import decode, encode
from federation.protocol.effects import Link, Train, Trained
from federation.protocol.mirror import MIRROR
from optimizer.baselines import select_uniformly
from tests.desk import Desk, assignment
from tests.real import digits_plan, digits_shards, real_fleet, wait_until
from tests.rooms import Room, encoded, run_plan, value, weights
from tests.simulated import on_disk
from twin.mirror import MirrorStore
from twin.teacher import Phase, Schooling

SAMPLES = LocalData(
    np.arange(12 * 64, dtype=np.float32).reshape(12, 64) / 100, np.arange(12, dtype=np.int64) % 10
)


class Workroom(Room):
    """A hub by hand with digital agents: what they shall train is in `tasks`."""

    def __init__(self, plan, model=None, *, why_not="", **options):
        self.tasks, self.why_not = [], why_not
        super().__init__(plan, model, **options)

    def restart(self):
        memory = self.record.restore() if self.record else HubMemory()
        self.hub = Coordinator(
            memory,
            select=select_uniformly,
            read_content=lambda _: None,
            may_stand_in=lambda _device, _plan: self.why_not,
        )
        self.said.clear()
        self.do(self.hub.start(self.now))
        self.do(self.hub.on_link(Link(is_up=True, epoch=1), self.now))

    def do(self, effects):
        super().do(effects)
        self.tasks += [effect for effect in effects if isinstance(effect, Train)]

    def born(self, *devices, mirrors=False, **birth):
        for device in devices:
            able = m.Capability(agent="test", mirrors=mirrors)
            self.hear(device, m.Birth(capability=able, **birth))

    def stood_in(self, trained):
        self.do(self.hub.on_stood_in(trained, self.now))


def with_(plan: RunPlan, **changes) -> RunPlan:
    return msgspec.structs.replace(plan, **changes)


# Mirrors ----------------------------------------------------------------------------------


def test_a_device_gives_its_samples_only_where_the_owner_allows_it():
    """Asked for its data, a device declines; with `mirror = true` it sends them, to the bit."""
    asked = assignment(plan=m.LocalPlan(model=m.ModelSpec(name="mlp"), method=MIRROR, epochs=0))

    refusing = Desk().boot().meet()
    refusing.hear(asked)
    allowing = Desk(capability=m.Capability(agent="test", mirrors=True)).boot().meet()
    allowing.hear(asked)

    [event] = refusing.take(m.TaskEvent)
    assert (event.event, "does not let its data be mirrored" in event.reason) == ("declined", True)
    assert not refusing.trains
    assert [event.event for event in allowing.take(m.TaskEvent)] == ["accepted"]
    trained = fulfil(asked, b"", SAMPLES)
    np.testing.assert_array_equal(decode(trained.update)["mirror/x"], SAMPLES.x)
    assert trained.report.samples == 12


def test_mirrored_samples_are_kept_apart_and_average_nothing(tmp_path):
    """What comes in a mirror run is handed to the mirrors, and the model stays as it was."""
    room = Workroom(with_(run_plan(1), mirror=True))
    room.born("d1", mirrors=True)
    [task] = room.told("d1", m.Assignment)

    room.send("d1", pack_mirror(SAMPLES))

    assert task.plan.method == MIRROR
    assert room.verdicts("d1")[-1] == "stored"
    [taken] = room.of(MirrorTaken)
    assert room.of(RoundClosed)[-1].model == encoded(0.0)
    store = MirrorStore(tmp_path)
    follow(store, room.facts)
    assert sample_digest(store.read("d1")) == sample_digest(SAMPLES)
    assert taken.data == pack_mirror(SAMPLES)


def test_samples_of_who_does_not_allow_it_are_refused():
    """Whatever a device sends, without its owner's word at birth the hub takes no byte of it."""
    room = Workroom(with_(run_plan(1), mirror=True))
    room.born("d1")

    room.send("d1", pack_mirror(SAMPLES))

    assert room.verdicts("d1") == ["rejected"]
    assert not room.of(ChunkStored)
    assert not room.of(MirrorTaken)
    assert "does not let its data be mirrored" in room.of(UpdateRefused)[0].reason


@pytest.mark.parametrize(
    "data", [encoded(1.0), b"x", encode({"mirror/x": np.zeros((2, 3), np.float32)})]
)
def test_what_is_no_mirror_is_refused(data):
    """In a mirror run an update that is no samples is rejected, and nothing of it is kept."""
    room = Workroom(with_(run_plan(1), mirror=True))
    room.born("d1", mirrors=True)

    room.send("d1", data)

    assert room.verdicts("d1")[-1] == "rejected"
    assert not room.of(MirrorTaken)


def test_taking_the_word_back_deletes_the_mirror(tmp_path):
    """A device born without the permission it had before has its mirror deleted."""
    room, store = Workroom(with_(run_plan(1), mirror=True)), MirrorStore(tmp_path)
    room.born("d1", mirrors=True)
    room.send("d1", pack_mirror(SAMPLES))
    follow(store, room.facts)
    assert store.devices == ("d1",)

    for _ in range(70):  # More births than are recorded in a minute: this one is, all the same.
        room.born("d1", mirrors=True)
    room.facts.clear()
    room.born("d1", mirrors=False)
    follow(store, room.facts)

    assert store.devices == ()
    assert [entry.what for entry in store.ledger()] == ["allowed", "mirrored", "revoked", "deleted"]


@pytest.mark.parametrize(
    ("table", "mirrors"), [("", False), ("[twin]\n", False), ("[twin]\nmirror = true\n", True)]
)
def test_an_owner_allows_the_mirror_in_the_agents_file(tmp_path, table, mirrors):
    """Without `mirror = true` in agent.toml a device says at birth that it mirrors nothing."""
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "data.npz", x=SAMPLES.x, y=SAMPLES.y)
    file = tmp_path / "agent.toml"
    head = 'device = "d1"\nbroker = "mqtt://127.0.0.1"\nfolder = "journal"\n'
    file.write_text(f'{head}[data]\nfolder = "data"\n{table}')

    assert capability_of(read_agent_config(file)).mirrors is mirrors


def test_only_who_mirrors_can_be_taught(tmp_path):
    """A plan that teaches a device without mirrored data names it, and leaves nothing behind."""
    plan = TeachingPlan(teacher=TEACHER, model=TEACHER, default=TEACHER, at_twin=("d7",))

    with pytest.raises(ConfigError, match="d7 is to be taught and mirrors no data"):
        prepare(plan, MirrorStore(tmp_path / "mirrors"), Registry(tmp_path))

    assert list((tmp_path / "models").iterdir()) == []


# Students ---------------------------------------------------------------------------------


def test_students_are_never_averaged():
    """Each device's update becomes its own model, and the next round begins from it."""
    room = Workroom(run_plan(2, rounds=2, method="simkd"))
    room.born("d1", "d2")

    room.send("d1", encoded(1.0))
    room.send("d2", encoded(5.0))

    model = room.model()
    assert value(model) == 0.0
    assert {name: float(t.flat[0]) for name, t in model.items() if "weight" in name} == {
        "classifier.weight": 0.0,
        "d1/classifier.weight": 1.0,
        "d2/classifier.weight": 5.0,
    }
    for device, mine in (("d1", 1.0), ("d2", 5.0)):
        task = room.told(device, m.Assignment)[-1]
        assert task.round == 2
        assert value(decode(task.inline)) == mine


def test_a_student_who_is_absent_stays():
    """A device that does not answer keeps the student it had: absent is not zero."""
    plan = run_plan(2, rounds=2, method="logit_kd", quorum=1, deadline_s=5.0)
    room = Workroom(plan, encode({**weights(0.0), "d2/classifier.weight": np.ones((10, 64), "f4")}))
    room.born("d1", "d2")

    room.send("d1", encoded(3.0))
    room.wait(6.0)

    assert float(room.model()["d2/classifier.weight"].flat[0]) == 1.0
    assert float(room.model()["d1/classifier.weight"].flat[0]) == 3.0


def test_what_a_teacher_says_goes_down_and_not_back():
    """A device gets its own student and answers, another's never; its update is the student."""
    said = np.arange(6, dtype=np.float32).reshape(3, 2)
    bundle = {**weights(0.0)}
    for device, number in (("d1", 1.0), ("d2", 2.0)):
        mine = {**weights(number), "taught/features": said * number}
        bundle |= {f"{device}/{name}": tensor for name, tensor in mine.items()}
    room = Workroom(run_plan(2, method="simkd"), encode(bundle))
    room.born("d1", "d2")

    base = decode(room.told("d2", m.Assignment)[0].inline)
    room.send("d2", encoded(7.0))
    room.send("d1", encode({**weights(8.0), "taught/features": said}))

    np.testing.assert_array_equal(base["taught/features"], said * 2.0)
    assert value(model_part(base)) == 2.0
    assert len(base) == 3
    assert room.verdicts("d2")[-1] == "stored"
    assert room.verdicts("d1")[-1] == "rejected"


def test_large_bases_are_served_by_digest():
    """A student's base too large for a letter is fetched in chunks, by whoever it is for."""
    rng = np.random.default_rng(0)
    bundle = {**weights(0.0)}
    big = {**weights(1.0), "taught/features": rng.standard_normal((400, 64)).astype(np.float32)}
    bundle |= {f"d1/{name}": tensor for name, tensor in big.items()}
    room = Workroom(run_plan(1, method="simkd"), encode(bundle))
    room.born("d1")
    task = room.told("d1", m.Assignment)[0]

    room.hear("d1", m.BlobRequest(content=task.base, wanted=tuple(range(task.base.chunks))))

    parts = {chunk.index: chunk.data for chunk in room.told("d1", m.BlobChunk)}
    assert task.inline is None
    assert b"".join(parts[index] for index in sorted(parts)) == encode(big)


def test_plans_that_teach_with_a_method_for_all_are_refused():
    """Students belong to methods whose models are personal; others say so."""
    with pytest.raises(ConfigError, match="choose simkd or logit_kd"):
        msgspec.convert(
            {
                "name": "run",
                "rounds": 1,
                "model": {"name": "linear"},
                "policy": {"devices_per_round": 1},
                "students": {"d1": {"name": "mlp"}},
            },
            RunPlan,
        )


# Stand-ins --------------------------------------------------------------------------------


def dropped(**options) -> Workroom:
    """Two devices were asked, one has answered, the other is lost beyond its grace."""
    plan = with_(run_plan(2, lost_grace_s=5.0, deadline_s=60.0), stand_in=True)
    room = Workroom(plan, **options)
    room.born("d1", "d2", mirrors=True)
    room.send("d1", encoded(1.0))
    room.lost("d2")
    room.wait(5.5)
    return room


def test_an_agent_finishes_for_a_device_that_dropped_out():
    """Lost beyond its grace, a device's very assignment goes to its agent, whose update counts."""
    room = dropped()
    [task] = room.tasks
    assert task.assignment.attempt == "run_1_d2"
    assert task.assignment.plan == room.told("d2", m.Assignment)[0].plan
    assert task.base == encoded(0.0)

    room.stood_in(Trained("run_1_d2", update=encoded(3.0), report=m.Report(samples=1)))

    assert value(room.model()) == 2.0
    [closed] = room.of(RoundClosed)
    assert closed.devices == ("d1", "d2")
    labels = {fact.device: fact.stood_in for fact in room.of(UpdateAccepted)}
    assert labels["d1"] == ""
    assert "its digital agent finished in its place" in labels["d2"]
    assert b"".join(f.data for f in room.of(ChunkStored) if f.attempt == "run_1_d2") == encoded(3.0)


def test_a_device_that_is_back_in_time_counts_itself():
    """Whoever comes first counts, once: the agent's update is then for nobody."""
    room = dropped()
    room.born("d2", mirrors=True)

    room.send("d2", encoded(5.0))
    room.stood_in(Trained("run_1_d2", update=encoded(9.0), report=m.Report(samples=1)))

    assert value(room.model()) == 3.0
    assert len(room.of(UpdateAccepted)) == 2
    assert not any(fact.stood_in for fact in room.of(UpdateAccepted))


def test_a_device_that_comes_after_its_agent_is_told_so():
    """The device's own update, later, is a duplicate: it may forget it."""
    plan = with_(run_plan(3, lost_grace_s=5.0, deadline_s=60.0), stand_in=True)
    room = Workroom(plan)
    room.born("d1", "d2", "d3", mirrors=True)
    room.lost("d2")
    room.wait(5.5)
    room.stood_in(Trained("run_1_d2", update=encoded(3.0), report=m.Report(samples=1)))

    room.born("d2", mirrors=True)
    room.send("d2", encoded(3.0))

    assert room.verdicts("d2") == ["duplicate"]


@pytest.mark.parametrize("why_not", ["the owner of d2 allows no mirror", "needs what it remembers"])
def test_nobody_is_stood_in_for_against_owner_or_method(why_not):
    """Where owner or method object, no agent is asked, and the round does without the device."""
    room = dropped(why_not=why_not)

    assert room.tasks == []


def test_a_word_taken_back_while_the_agent_trains_is_obeyed():
    """What an agent made of data that its owner took back meanwhile does not count."""
    room = dropped()
    room.why_not = "the owner of d2 allows no mirror"

    room.stood_in(Trained("run_1_d2", update=encoded(3.0), report=m.Report(samples=1)))

    assert len(room.of(UpdateAccepted)) == 1


def test_an_agent_of_before_a_restart_fails_nobody():
    """What was asked before the hub began anew is passed over, and asked again where it is due."""
    plan = with_(run_plan(2, lost_grace_s=5.0, deadline_s=60.0), stand_in=True)
    with on_disk(plan) as record:
        room = dropped(record=record)
        room.restart()

        room.stood_in(Trained("run_1_d2", update=encoded(3.0), report=m.Report(samples=1)))

        assert not any(fact.status == "failed" for fact in room.of(AttemptChanged))
        room.wait(12.0)
    assert [task.assignment.attempt for task in room.tasks] == ["run_1_d2"] * 2


def test_without_the_plans_word_nobody_stands_in():
    """A run that does not say `stand_in` asks no agent."""
    room = Workroom(run_plan(2, lost_grace_s=5.0, deadline_s=60.0))
    room.born("d1", "d2", mirrors=True)
    room.lost("d2")
    room.wait(30.0)

    assert room.tasks == []
    assert LABEL


@pytest.mark.parametrize("update", [b"", encode({"classifier.weight": np.zeros((2, 2), "f4")})])
def test_an_agents_update_is_checked_like_any(update):
    """An agent's update that does not fit fails the attempt, and the round goes on."""
    room = dropped()

    room.stood_in(Trained("run_1_d2", update=update, report=m.Report(samples=1)))

    assert len(room.of(UpdateAccepted)) == 1


# Over MQTT --------------------------------------------------------------------------------

TEACHER = ModelChoice(name="mlp", sizes={"inputs": 64, "hidden": 48, "classes": 10})
STUDENTS = {
    "d00": ModelChoice(name="mlp", sizes={"inputs": 64, "hidden": 12, "classes": 10}),
    "d01": ModelChoice(name="mlp", sizes={"inputs": 64, "hidden": 12, "hidden2": 10}),
    "d02": ModelChoice(name="cnn", sizes={"height": 8, "width": 8, "filters": 2, "hidden": 12}),
}


@pytest.mark.slow
@pytest.mark.broker
def test_three_architectures_are_taught_over_mqtt(tmp_path: Path):
    """Devices mirror, a teacher teaches, and three students train: on devices, at a twin, and in
    the place of a device that is killed; the hub's bits are those of each device's own training.
    """
    shards = {name: data.take(np.arange(60)) for name, data in digits_shards(3).items()}
    plan = with_(digits_plan(3, 1), name="mirrors", mirror=True)
    with real_fleet(tmp_path, "auto", plan, shards, mirrors=tuple(shards)) as fleet:
        fleet.begin()
        fleet.finish()
        store = MirrorStore(tmp_path / "hub" / "mirrors")
        assert store.devices == tuple(shards)
        schooling = Schooling(phases=(Phase(5, 0.02),), batch_size=16)
        prepared = prepare(
            TeachingPlan(
                teacher=TEACHER,
                model=TEACHER,
                default=TEACHER,
                students=STUDENTS,
                at_twin=("d01",),
                teacher_schooling=schooling,
                student_schooling=schooling,
            ),
            store,
            Registry(tmp_path / "hub"),
        )
        bundle = decode(Registry(tmp_path / "hub").read(prepared.teaching))
        policy = msgspec.structs.replace(plan.policy, lost_grace_s=1.0)
        taught = with_(
            digits_plan(3, 1, epochs=60),
            name="taught",
            policy=policy,
            model=TEACHER,
            method=MethodChoice(name="simkd"),
            students={
                d: ModelChoice(**msgspec.structs.asdict(s)) for d, s in prepared.students.items()
            },
            teaching=prepared.teaching,
            at_twin=("d01",),
            stand_in=True,
        )
        fleet.plan = taught
        fleet.store.request_run(taught)
        wait_until(lambda: _status(fleet, "d02") == "training", 60, fleet.account)
        fleet.agents["d02"].stop()

        model = decode(fleet.finish(100))

        reasons = {row.device: row.reason for row in fleet.store.attempts("taught", 1)}
        assert "its digital agent finished in its place" in reasons["d02"]
        assert reasons["d00"] == reasons["d01"] == ""
    for device in STUDENTS:
        first = _own(bundle, device)
        last = _own(model, device)
        if device == "d01":
            assert encode(model_part(last)) == encode(model_part(first))
            continue
        task = _task_of(taught, device)
        expected = decode(fulfil(task, encode(first), shards[device]).update)
        assert encode(model_part(last)) == encode(expected)


def _status(fleet, device: str) -> str:
    found = [row for row in fleet.store.attempts("taught", 1) if row.device == device]
    return found[0].status if found else ""


def _own(weights_, device: str):
    return {n.split("/", 1)[1]: t for n, t in weights_.items() if n.startswith(f"{device}/")}


def _task_of(plan: RunPlan, device: str) -> m.Assignment:
    """The assignment the hub gave: a function of the plan alone."""
    from cloud.coordination.facts import RunMemory
    from cloud.coordination.rounds import Attempt
    from cloud.coordination.run import CHUNK_BYTES, ActiveRun
    from federation.protocol.transfer import content_of

    model = encode(weights(0.0))
    run = ActiveRun(RunMemory(plan=plan, content=content_of(model, CHUNK_BYTES), model=model))
    run.open_round(dict.fromkeys(STUDENTS, 0), 0.0)
    return run.assignment(Attempt(f"{plan.name}_1_{device}", device), 60.0)
