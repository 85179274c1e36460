"""The agent: whatever it lives through, one assignment gives one update, the same bytes."""

import random
import zlib
from contextlib import closing
from itertools import pairwise

import numpy as np
import pytest

from edge_agent.agent import Agent, AgentSettings
from edge_agent.facts import AssignmentKept, Held, ReleaseKept, UpdateForgotten, UpdateKept
from edge_agent.journal import Journal
from edge_agent.trainer import fulfil
from federation.learning.data import LocalData
from federation.protocol import codec
from federation.protocol import messages as m
from federation.protocol.effects import Link, Record, Send, StopTraining, Train, Trained, WakeAt
from federation.protocol.transfer import content_of, cut

SETTINGS = AgentSettings(heartbeat_s=30.0, timeout_s=5.0)
ATTEMPT = "run_3_dev"
CAPABILITY = m.Capability(agent="test")


def local_data():
    rng = np.random.default_rng(4)
    return LocalData(
        rng.normal(size=(40, 64)).astype(np.float32), rng.integers(0, 10, 40).astype(np.int64)
    )


def base_model(hidden=300):
    rng = np.random.default_rng(3)
    shapes = {
        "hidden.weight": (hidden, 64),
        "hidden.bias": (hidden,),
        "classifier.weight": (10, hidden),
        "classifier.bias": (10,),
    }
    return codec.encode(
        {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    )


BASE = base_model()
CONTENT = content_of(BASE, 16 * 1024)


def assignment(attempt=ATTEMPT, deadline_s=600.0, **changes):
    plan = m.LocalPlan(
        model=m.ModelSpec(name="mlp", sizes={"hidden": 300}), max_steps=2, learning_rate=0.1, seed=9
    )
    fields = {"attempt": attempt, "run": "run", "round": 3, "deadline_s": deadline_s}
    return m.Assignment(**(fields | {"base": CONTENT, "plan": plan} | changes))


def from_hub(letter, epoch=1):
    return m.Envelope(sender="hub", epoch=epoch, body=letter)


class Desk:
    """A device by hand: it performs effects, and answers as a hub would."""

    def __init__(self, held=None, *, stop_after=None, capability=CAPABILITY):
        self.held = held or Held()
        self.said, self.trains, self.stopped, self.facts = [], [], [], []
        self.wake_at, self.now, self.epoch, self.steps = 0.0, 100.0, 0, 0
        self.stop_after = stop_after
        self.capability = capability
        self.trainings = 0
        self.agent = None

    def boot(self):
        self.agent = Agent(
            "dev", self.capability, self.held, settings=SETTINGS, rng=random.Random(0)
        )
        self.epoch += 1
        self.do(self.agent.start(self.now))
        return self

    def meet(self, hub_epoch=1):
        self.do(self.agent.on_link(Link(is_up=True, epoch=self.epoch), self.now))
        self.hear(m.HubState(online=True), hub_epoch)
        return self

    def hear(self, letter, epoch=1):
        if self.agent is not None:
            self.do(self.agent.on_message(from_hub(letter, epoch), self.now))

    def do(self, effects):
        """Perform effects one by one; the power fails after `stop_after` of them in all."""
        for effect in effects:
            self.steps += 1
            if self.stop_after is not None and self.steps > self.stop_after:
                self.agent = None
                return
            match effect:
                case Record(fact):
                    self.held.record(fact)
                    self.facts.append(fact)
                case Send(letter):
                    self.said.append(letter)
                case Train():
                    self.trainings += 1
                    self.trains.append(effect)
                case StopTraining(attempt):
                    self.stopped.append(attempt)
                case WakeAt(at):
                    self.wake_at = at

    def wake(self):
        self.now = max(self.now, self.wake_at)
        self.do(self.agent.on_wake(self.now))

    def take(self, kind):
        taken = [letter for letter in self.said if isinstance(letter, kind)]
        self.said = [letter for letter in self.said if not isinstance(letter, kind)]
        return taken


class Counterpart:
    """The hub's side of one attempt: it serves the base, takes the update, counts acceptances."""

    def __init__(self):
        self.parts, self.accepted = {}, []

    def answer(self, desk):
        """Answer all that was said; False when there is nothing more to do."""
        said, desk.said = desk.said, []
        trains, desk.trains = desk.trains, []
        for letter in said:
            self.react(desk, letter)
        for job in trains:
            if desk.agent is not None:
                desk.do(
                    desk.agent.on_trained(fulfil(job.assignment, job.base, local_data()), desk.now)
                )
        return bool(said or trains)

    def react(self, desk, letter):
        match letter:
            case m.Birth():
                done = bool(self.accepted)
                desk.hear(m.Welcome(epoch=desk.epoch, open_attempts=() if done else (ATTEMPT,)))
                if not done and ATTEMPT not in (letter.working, *letter.finished):
                    desk.hear(assignment())
            case m.BlobRequest():
                for index in letter.wanted:
                    crc32, data = cut(BASE, CONTENT, index)
                    desk.hear(
                        m.BlobChunk(digest=CONTENT.digest, index=index, crc32=crc32, data=data)
                    )
            case m.UpdateOpen():
                self.acknowledge(desk, letter.content)
                self.content = letter.content
            case m.UpdateChunk():
                self.parts.setdefault(letter.digest, {})[letter.index] = letter.data
                self.acknowledge(desk, self.content)

    def acknowledge(self, desk, content):
        parts = self.parts.setdefault(content.digest, {})
        if len(parts) < content.chunks:
            received = sum(1 << index for index in parts).to_bytes(
                -(-content.chunks // 8), "little"
            )
            desk.hear(m.UpdateAck(attempt=ATTEMPT, digest=content.digest, received=received))
            return
        update = b"".join(parts[index] for index in range(content.chunks))
        verdict = "duplicate" if update in self.accepted else "stored"
        if verdict == "stored":
            self.accepted.append(update)
        desk.hear(m.UpdateAck(attempt=ATTEMPT, digest=content.digest, verdict=verdict))


def live(desk, hub):
    """Boot, meet the hub, and go on until nothing is left to say."""
    desk.boot()
    if desk.agent is not None:
        desk.meet()
    while desk.agent is not None and hub.answer(desk):
        pass


def test_a_device_restarted_at_any_point_sends_the_same_update_once():
    """Power may fail after any single effect: the same bytes arrive, and are accepted once."""
    whole = Desk()
    undisturbed = Counterpart()
    live(whole, undisturbed)
    assert whole.steps > 20
    assert len(undisturbed.accepted) == 1

    for stop_after in range(whole.steps):
        hub, desk = Counterpart(), Desk(stop_after=stop_after)
        live(desk, hub)
        again = Desk(desk.held)
        live(again, hub)

        assert hub.accepted == undisturbed.accepted, stop_after
        if any(isinstance(fact, UpdateKept) for fact in desk.facts):
            assert again.trainings == 0, "what was finished is trained again"
        assert again.held.updates == {}
        assert again.held.assignment is None
        assert again.held.parts.keys() <= {CONTENT.digest}


def test_what_was_fetched_before_a_restart_is_not_asked_for_again():
    """After a restart in mid-download only the missing chunks are requested."""
    desk = Desk().boot().meet()
    desk.hear(assignment())
    (request,) = desk.take(m.BlobRequest)
    for index in (0, 2):
        crc32, data = cut(BASE, CONTENT, index)
        desk.hear(m.BlobChunk(digest=CONTENT.digest, index=index, crc32=crc32, data=data))

    again = Desk(desk.held).boot().meet()

    assert set(request.wanted) >= {0, 2}
    (request,) = again.take(m.BlobRequest)
    assert set(request.wanted) == set(range(CONTENT.chunks)) - {0, 2}


def finished(held=None, size=100_000):
    """A desk whose update is finished and not yet answered for."""
    desk = Desk(held).boot().meet()
    desk.hear(assignment(inline=b"base"))
    update = random.Random(1).randbytes(size)
    trained = Trained(ATTEMPT, update, m.Report(samples=4))
    desk.do(desk.agent.on_trained(trained, desk.now))
    return desk


def test_an_update_is_written_down_before_it_is_announced():
    """The record of a finished update comes before its opening letter."""
    desk = Desk().boot().meet()
    desk.hear(assignment(inline=b"base"))

    trained = Trained(ATTEMPT, b"update", m.Report(samples=4))
    effects = desk.agent.on_trained(trained, desk.now)

    kinds = [
        effect.fact if isinstance(effect, Record) else getattr(effect, "letter", None)
        for effect in effects
    ]
    kept = next(i for i, kind in enumerate(kinds) if isinstance(kind, UpdateKept))
    said = next(i for i, kind in enumerate(kinds) if isinstance(kind, m.UpdateOpen))
    assert kept < said


@pytest.mark.parametrize("verdict", ["stored", "duplicate", "rejected", "too-late"])
def test_only_a_final_verdict_for_this_content_lets_an_update_be_forgotten(verdict):
    """An open acknowledgement, or one for another content, keeps it; any final one drops it."""
    desk = finished()
    (opened,) = desk.take(m.UpdateOpen)
    digest = opened.content.digest

    desk.hear(m.UpdateAck(attempt=ATTEMPT, digest=digest, verdict="open"))
    desk.hear(m.UpdateAck(attempt=ATTEMPT, digest="0" * 64, verdict=verdict))
    assert desk.held.updates
    desk.hear(m.UpdateAck(attempt=ATTEMPT, digest=digest, verdict=verdict))

    assert desk.held.updates == {}
    assert isinstance(desk.facts[-1], UpdateForgotten)


def test_an_unanswered_update_is_announced_again_and_again_with_growing_pauses():
    """Silence is met with the opening letter, at growing intervals of at most a minute."""
    desk = finished()
    desk.take(m.UpdateOpen)
    times = []
    while len(times) < 8:
        desk.wake()
        times += [desk.now for _ in desk.take(m.UpdateOpen)]

    pauses = [later - sooner for sooner, later in pairwise(times)]
    assert all(later >= sooner - 1e-9 for sooner, later in pairwise(pauses))
    assert pauses[-1] <= 60.0 + 1e-9


def test_nothing_is_sent_while_the_link_or_the_hub_is_away_and_all_when_they_are_back():
    """Offline, a finished update waits; it is announced with the next birth."""
    desk = Desk().boot().meet()
    desk.hear(assignment(inline=b"base"))
    desk.hear(m.HubState(online=False))
    desk.said.clear()
    desk.do(desk.agent.on_trained(Trained(ATTEMPT, b"u", m.Report(samples=1)), desk.now))
    assert desk.take(m.UpdateOpen) == []

    desk.hear(m.HubState(online=True))
    assert desk.take(m.UpdateOpen) == []
    desk.wake()

    (birth,) = desk.take(m.Birth)
    assert birth.finished == (ATTEMPT,)
    assert len(desk.take(m.UpdateOpen)) == 1


def test_letters_of_a_replaced_hub_are_void():
    """What a hub of an older epoch said is ignored, whenever it arrives."""
    desk = Desk().boot().meet(hub_epoch=5)
    desk.said.clear()

    desk.hear(assignment(), epoch=4)
    desk.hear(m.HubState(online=False), epoch=4)
    assert desk.said == []
    assert desk.agent.assignment is None
    desk.hear(assignment(), epoch=5)

    assert desk.agent.assignment is not None


def test_a_device_that_only_infers_declines_and_says_why():
    """An assignment to a device that does not train is declined with a reason."""
    capability = m.Capability(agent="test", trains=False, infers=True)
    desk = Desk(capability=capability).boot().meet()

    desk.hear(assignment())

    (event,) = desk.take(m.TaskEvent)
    assert (event.event, event.attempt) == ("declined", ATTEMPT)
    assert "infers" in event.reason
    assert desk.held.assignment is None


IMPOSSIBLE = [
    {"base": m.Content(digest="zz", size=9, chunk_bytes=9)},
    {"base": m.Content(digest="0" * 64, size=-1, chunk_bytes=9)},
    {"base": m.Content(digest="0" * 64, size=9, chunk_bytes=0)},
    {"base": m.Content(digest="0" * 64, size=2**40, chunk_bytes=1)},
    {"deadline_s": float("nan")},
    {"deadline_s": float("inf")},
    {"deadline_s": -1.0},
]


@pytest.mark.parametrize("changes", IMPOSSIBLE)
def test_an_impossible_assignment_is_declined_and_nothing_of_it_is_kept(changes):
    """A base or a deadline that cannot be is answered in words; the task in hand goes on."""
    desk = Desk().boot().meet()
    desk.hear(assignment(inline=b"base"))
    desk.take(m.TaskEvent)

    desk.hear(assignment("run_4_dev", **changes))
    desk.wake()

    (event,) = desk.take(m.TaskEvent)
    assert (event.attempt, event.event) == ("run_4_dev", "declined")
    assert "expected" in event.reason or "are taken" in event.reason
    assert desk.held.assignment.attempt == ATTEMPT
    assert desk.wake_at > desk.now


@pytest.mark.parametrize("changes", IMPOSSIBLE)
def test_an_impossible_assignment_on_disk_does_not_keep_an_agent_from_starting(tmp_path, changes):
    """What was written down before it was checked is forgotten at the next start."""
    with closing(Journal(tmp_path)) as journal:
        journal.record(AssignmentKept(assignment(**changes)))
        desk = Desk(journal.restore()).boot().meet()
        for fact in desk.facts:
            journal.record(fact)

        assert journal.restore().assignment is None
    assert desk.take(m.Birth)[0].working is None


@pytest.mark.parametrize("digest", ["zz", "0" * 64])
def test_letters_about_contents_that_nobody_asked_for_are_ignored(digest):
    """Chunks and farewells of a content that is not under way are neither kept nor forgotten."""
    desk = Desk().boot().meet()
    desk.hear(assignment())
    known = list(desk.facts)

    desk.hear(m.BlobGone(digest=digest, reason="never heard of it"))
    desk.hear(m.BlobChunk(digest=digest, index=0, crc32=zlib.crc32(b"x"), data=b"x"))

    assert desk.facts == known
    assert desk.agent.assignment.attempt == ATTEMPT


def test_an_assignment_that_comes_twice_is_trained_once():
    """A duplicate of the assignment in hand, or of one that is finished, starts nothing."""
    desk = Desk().boot().meet()
    desk.hear(assignment(inline=b"base"))
    desk.hear(assignment(inline=b"base"))
    assert len(desk.trains) == 1
    desk.do(desk.agent.on_trained(Trained(ATTEMPT, b"u", m.Report(samples=1)), desk.now))

    desk.hear(assignment(inline=b"base"))

    assert len(desk.trains) == 1
    assert desk.take(m.TaskEvent)[-1].event == "accepted"


def test_a_new_assignment_replaces_the_one_in_hand():
    """The hub gives one task at a time: the older is stopped, forgotten, and said to be so."""
    desk = Desk().boot().meet()
    desk.hear(assignment(inline=b"base"))
    desk.take(m.TaskEvent)

    desk.hear(assignment("run_4_dev", inline=b"base"))

    assert desk.stopped == [ATTEMPT]
    assert desk.held.assignment.attempt == "run_4_dev"
    said = [(event.attempt, event.event) for event in desk.take(m.TaskEvent)]
    assert said == [
        (ATTEMPT, "cancelled"),
        ("run_4_dev", "accepted"),
        ("run_4_dev", "training"),
    ]


@pytest.mark.parametrize("when", ["training", "fetching"])
def test_a_cancelled_attempt_is_stopped_and_its_late_result_ignored(when):
    """Cancel ends fetching or training; a result that was on its way changes nothing."""
    desk = Desk().boot().meet()
    desk.hear(assignment(inline=b"base") if when == "training" else assignment())
    desk.said.clear()

    desk.hear(m.Cancel(attempt=ATTEMPT, reason="round 3 has closed"))
    desk.do(desk.agent.on_trained(Trained(ATTEMPT, b"u", m.Report(samples=1)), desk.now))

    assert desk.stopped == [ATTEMPT]
    assert desk.held == Held()
    assert desk.said == []


def test_a_cancel_for_another_attempt_changes_nothing():
    """A cancel that raced with the next assignment does not hit it."""
    desk = Desk().boot().meet()
    desk.hear(assignment(inline=b"base"))

    desk.hear(m.Cancel(attempt="run_2_dev", reason="round 2 has closed"))

    assert desk.stopped == []
    assert desk.agent.assignment.attempt == ATTEMPT


def test_a_welcome_that_does_not_know_the_attempt_ends_it():
    """What the hub's welcome does not list is stopped, and the hub hears that it is."""
    desk = Desk().boot().meet()
    desk.hear(assignment(inline=b"base"))
    desk.take(m.TaskEvent)

    desk.hear(m.Welcome(epoch=desk.epoch, open_attempts=("run_9_dev",)))

    (event,) = desk.take(m.TaskEvent)
    assert (event.attempt, event.event) == (ATTEMPT, "cancelled")
    assert event.reason == "the hub no longer waits for it"
    assert desk.stopped == [ATTEMPT]
    assert desk.held.assignment is None


def test_an_attempt_ends_at_its_deadline_and_says_so():
    """The agent gives up by itself when the seconds it was given have passed."""
    desk = Desk().boot().meet()
    desk.hear(assignment(deadline_s=7.0, inline=b"base"))
    desk.take(m.TaskEvent)
    began = desk.now
    while desk.agent.assignment is not None:
        desk.wake()

    assert desk.now == pytest.approx(began + 7.0)
    (event,) = desk.take(m.TaskEvent)
    assert (event.event, event.reason) == ("cancelled", "the deadline has passed")


def test_training_that_fails_is_reported_with_its_reason():
    """A failure of training reaches the hub in words, and the task is forgotten."""
    desk = Desk().boot().meet()
    desk.hear(assignment(inline=b"not a model"))
    (job,) = desk.trains

    desk.do(desk.agent.on_trained(fulfil(job.assignment, job.base, local_data()), desk.now))

    event = desk.take(m.TaskEvent)[-1]
    assert event.event == "failed"
    assert event.reason
    assert desk.held == Held()


def test_damaged_chunks_are_asked_for_again():
    """A chunk with a wrong checksum is not kept, and is requested anew when its time is up."""
    desk = Desk().boot().meet()
    desk.hear(assignment())
    (request,) = desk.take(m.BlobRequest)
    crc32, data = cut(BASE, CONTENT, 0)
    desk.hear(m.BlobChunk(digest=CONTENT.digest, index=0, crc32=crc32 ^ 1, data=data))
    assert desk.held.parts == {}

    asked = ()
    while 0 not in asked:
        desk.wake()
        asked = tuple(i for letter in desk.take(m.BlobRequest) for i in letter.wanted)

    assert 0 in request.wanted


def test_a_content_whose_whole_is_wrong_is_fetched_anew_from_nothing():
    """Every chunk sound and the digest wrong: nothing of it is kept, and nothing is trained."""
    small = content_of(b"x" * 50_000, 16 * 1024)
    desk = Desk().boot().meet()
    desk.hear(assignment(base=small))
    desk.take(m.BlobRequest)

    for index in range(small.chunks):
        data = b"y" * len(cut(b"x" * 50_000, small, index)[1])
        letter = m.BlobChunk(digest=small.digest, index=index, crc32=zlib.crc32(data), data=data)
        desk.hear(letter)

    assert desk.trains == []
    assert desk.held.parts == {}
    assert {i for letter in desk.take(m.BlobRequest) for i in letter.wanted} == set(
        range(small.chunks)
    )


def test_a_base_that_is_gone_ends_the_attempt_with_the_hubs_reason():
    """If the hub no longer has the model, the attempt is given up and the reason passed on."""
    desk = Desk().boot().meet()
    desk.hear(assignment())

    desk.hear(m.BlobGone(digest=CONTENT.digest, reason="the run is over"))

    assert desk.take(m.TaskEvent)[-1].reason == "the run is over"
    assert desk.held == Held()


INFERS = m.Capability(agent="test", infers=True)


def onnx_of(serial):
    return f"model {serial}".encode() * 10_000


def release_of(serial, model=None, run="run"):
    content = content_of(onnx_of(serial if model is None else model), 16 * 1024)
    return m.Release(run=run, round=3, content=content, serial=serial)


def serve(desk, *models):
    """Answer every request for these contents; the indices that were asked for."""
    known = {content_of(data, 16 * 1024).digest: data for data in models}
    asked = []
    while requests := desk.take(m.BlobRequest):
        for request in requests:
            for index in request.wanted:
                asked.append((request.content.digest, index))
                crc32, data = cut(known[request.content.digest], request.content, index)
                letter = m.BlobChunk(
                    digest=request.content.digest, index=index, crc32=crc32, data=data
                )
                desk.hear(letter)
    return asked


def installed(desk):
    return [fact.release.serial for fact in desk.facts if isinstance(fact, ReleaseKept)]


def test_a_release_is_fetched_kept_and_not_fetched_again():
    """A device that infers pulls a new release once; the next boot remembers it."""
    release = release_of(1)
    desk = Desk(capability=INFERS).boot().meet()
    desk.hear(release)
    serve(desk, onnx_of(1))
    (kept,) = [fact for fact in desk.facts if isinstance(fact, ReleaseKept)]
    assert kept.data == onnx_of(1)
    assert desk.held.parts == {}

    again = Desk(desk.held, capability=INFERS).boot().meet()
    again.hear(release)

    assert again.take(m.BlobRequest) == []
    assert again.take(m.Birth)[0].release == release.content.digest


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_of_the_releases_of_two_runs_the_newest_is_installed_once(order):
    """Whatever order retained releases arrive in, at every reconnect, the newest one stays."""
    desk, taken = Desk(capability=INFERS).boot().meet(), []
    for _ in range(3):
        for serial in order:
            desk.hear(release_of(serial, run=f"run {serial}"))
        serve(desk, onnx_of(1), onnx_of(2))
        taken += installed(desk)
        desk = Desk(desk.held, capability=INFERS).boot().meet()

    assert taken == [2]
    assert desk.held.parts == {}


def test_the_model_in_use_released_again_is_not_fetched():
    """A newer release of the same bytes costs nothing and calls off what it supersedes."""
    desk = Desk(capability=INFERS).boot().meet()
    desk.hear(release_of(1))
    serve(desk, onnx_of(1))
    desk.hear(release_of(2))
    desk.take(m.BlobRequest)

    desk.hear(release_of(4, model=1))
    desk.hear(release_of(3))
    desk.now += 1000.0
    desk.wake()

    assert desk.take(m.BlobRequest) == []
    assert installed(desk) == [1]


def test_a_download_goes_on_when_the_same_content_is_released_again():
    """A newer release of the bytes under way is installed without asking for them twice."""
    desk = Desk(capability=INFERS).boot().meet()
    desk.hear(release_of(1))

    desk.hear(release_of(2, model=1))
    asked = serve(desk, onnx_of(1))

    assert len(asked) == len(set(asked)) == release_of(1).content.chunks
    assert installed(desk) == [2]


def test_a_release_that_was_gone_is_fetched_when_it_is_offered_again():
    """A farewell to a wanted release does not make the device deaf to it."""
    desk = Desk(capability=INFERS).boot().meet()
    desk.hear(release_of(1))
    desk.take(m.BlobRequest)
    desk.hear(m.BlobGone(digest=release_of(1).content.digest, reason="not yet"))

    desk.hear(release_of(1))
    serve(desk, onnx_of(1))

    assert installed(desk) == [1]


def test_a_release_of_an_impossible_content_is_ignored():
    """A release that cannot be fetched takes nothing from the one under way."""
    desk = Desk(capability=INFERS).boot().meet()
    desk.hear(release_of(1))
    content = m.Content(digest="zz", size=9, chunk_bytes=9)

    desk.hear(m.Release(run="run", round=9, content=content, serial=9))
    serve(desk, onnx_of(1))

    assert installed(desk) == [1]


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("chunks", [1, CONTENT.chunks])
def test_the_next_assignment_from_the_same_base_fetches_only_what_is_missing(chunks, restarts):
    """What was fetched of a base outlives a cancel, until another base is assigned."""
    desk = Desk().boot().meet()
    desk.hear(assignment())
    desk.take(m.BlobRequest)
    for index in range(chunks):
        crc32, data = cut(BASE, CONTENT, index)
        desk.hear(m.BlobChunk(digest=CONTENT.digest, index=index, crc32=crc32, data=data))
    desk.hear(m.Cancel(attempt=ATTEMPT, reason="too few came"))
    desk.take(m.BlobRequest)
    desk.now += 1000.0
    desk.wake()
    assert desk.take(m.BlobRequest) == []
    if restarts:
        desk = Desk(desk.held).boot().meet()

    desk.hear(assignment("run_4_dev"))
    asked = serve(desk, BASE)

    assert {index for _, index in asked} == set(range(chunks, CONTENT.chunks))
    assert (desk.trains[-1].assignment.attempt, desk.trains[-1].base) == ("run_4_dev", BASE)

    other = content_of(b"another base" * 5000, 16 * 1024)
    desk.hear(assignment("run_5_dev", base=other))
    assert desk.held.parts == {}


def test_a_heartbeat_says_what_is_in_hand_at_its_interval():
    """Signs of life come every `heartbeat_s`, with the attempt and how far it is."""
    desk = Desk().boot().meet()
    desk.hear(assignment(inline=b"base"))
    desk.agent.progress = 0.25
    began, beats = desk.now, []
    while len(beats) < 2:
        desk.wake()
        beats += [(desk.now - began, beat) for beat in desk.take(m.Heartbeat)]

    assert [at for at, _ in beats] == pytest.approx([30.0, 60.0])
    assert beats[0][1] == m.Heartbeat(attempt=ATTEMPT, progress=0.25, uptime_s=30.0)
