"""The agent: whatever it lives through, one assignment gives one update, the same bytes."""

import random
import zlib
from contextlib import closing
from itertools import pairwise

import pytest

from edge_agent.facts import AssignmentKept, Held, UpdateForgotten, UpdateKept
from edge_agent.journal import Journal
from edge_agent.trainer import fulfil
from federation.protocol import messages as m
from federation.protocol.effects import Link, Record, Trained
from federation.protocol.transfer import cut
from tests.desk import (
    ATTEMPT,
    BASE,
    CONTENT,
    SETTINGS,
    Counterpart,
    Desk,
    assignment,
    live,
    local_data,
)


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


def test_a_device_whose_broker_lost_the_hubs_state_is_born_and_takes_part():
    """Without the hub's state it says its birth after a while, and the welcome says the rest."""
    desk = Desk().boot()
    desk.do(desk.agent.on_link(Link(is_up=True, epoch=desk.epoch), desk.now))
    began = desk.now
    desk.hear(assignment())
    assert desk.take(m.BlobRequest) == []

    desk.wake()
    assert desk.now == began + SETTINGS.timeout_s
    (birth,) = desk.take(m.Birth)
    assert birth.working == ATTEMPT
    desk.hear(m.Welcome(epoch=desk.epoch, open_attempts=(ATTEMPT,)), epoch=7)

    assert len(desk.take(m.BlobRequest)) == 1
    desk.hear(m.HubState(online=True), epoch=7)
    desk.hear(m.Cancel(attempt=ATTEMPT, reason="of a hub before that one"), epoch=6)
    assert desk.agent.assignment is not None
    assert desk.take(m.Birth) == []


def test_a_device_that_was_asked_for_its_birth_needs_no_other_sign_of_the_hub():
    """After `Rebirth` and `Welcome` it fetches and uploads, though the hub's state never came."""
    desk = Desk().boot()
    desk.do(desk.agent.on_link(Link(is_up=True, epoch=desk.epoch), desk.now))
    desk.hear(m.Rebirth(reason="who are you?"))
    assert len(desk.take(m.Birth)) == 1

    desk.hear(m.Welcome(epoch=desk.epoch))
    desk.hear(assignment())

    assert len(desk.take(m.BlobRequest)) == 1


def test_a_device_that_knows_its_hub_to_be_away_waits_for_it():
    """Where the broker says that the hub is away, no birth is said to nobody."""
    desk = Desk().boot()
    desk.do(desk.agent.on_link(Link(is_up=True, epoch=desk.epoch), desk.now))
    desk.hear(m.HubState(online=False))
    late = desk.now + 100 * SETTINGS.timeout_s

    while desk.now < late:
        desk.wake()

    assert desk.take(m.Birth) == []


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
    {"plan": m.LocalPlan(model=m.ModelSpec(name="mlp"), uplink=m.Uplink(pace=float("nan")))},
]


@pytest.mark.parametrize("changes", IMPOSSIBLE)
def test_an_impossible_assignment_is_declined_and_nothing_of_it_is_kept(changes):
    """A base, deadline or pace that cannot be is answered in words; the task in hand goes on."""
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
