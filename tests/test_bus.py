"""The bus in memory keeps what an MQTT broker keeps, and loses what one loses."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.protocol.topics import Route
from simulations.bus import Bus, LinkQuality
from simulations.clock import Alarm, Clock
from simulations.topic_tree import Filters, Retained


class Client:
    """One client that notes what it hears."""

    def __init__(self, bus, name, filters, *, quality=None, will=None):
        self.bus, self.name, self.filters = bus, name, filters
        self.quality, self.will = quality or LinkQuality(), will
        self.heard, self.lost = [], []
        self.takes = True

    def connect(self):
        self.connection = self.bus.connect(
            self.name,
            self.filters,
            deliver=self.hear,
            on_lost=self.lost.append,
            will=(lambda will=self.will: will) if self.will else None,
            quality=self.quality,
        )
        return self

    def hear(self, _topic, payload):
        self.heard.append(payload.decode())
        return self.takes

    def say(self, topic, text, *, qos=1, retain=False, expiry_s=0):
        return self.connection.publish(Route(topic, qos, retain, expiry_s), text.encode())


@pytest.fixture
def bus():
    return Bus(Clock(), random.Random(7))


def run(bus, until=1e6):
    while bus.clock.next_at <= until:
        bus.clock.step()


def pair(bus, quality=None):
    sender = Client(bus, "sender", [], quality=quality).connect()
    reader = Client(bus, "reader", ["a/#"], quality=quality).connect()
    return sender, reader


@given(st.data())
def test_letters_of_one_sender_arrive_in_order_whatever_the_delays(data):
    """Delays are drawn for each letter, and none overtakes another."""
    quality = LinkQuality(delay_s=(0.0, data.draw(st.floats(0.0, 10.0))), duplicates=0.3)
    bus = Bus(Clock(), random.Random(data.draw(st.integers(0, 1000))))
    sender, reader = pair(bus, quality)

    for number in range(20):
        sender.say("a/b", f"{number:02d}")
    run(bus)

    assert reader.heard == sorted(reader.heard)
    assert set(reader.heard) == {f"{number:02d}" for number in range(20)}


def test_guaranteed_letters_wait_in_the_session_and_others_do_not(bus):
    """QoS 1 waits for a reader that is away, in order; QoS 0 is gone."""
    sender, reader = pair(bus)
    reader.connection.die()
    run(bus)
    for number in range(3):
        sender.say("a/b", f"kept {number}")
        sender.say("a/b", f"gone {number}", qos=0)
    run(bus)

    reader.connect()
    sender.say("a/b", "after")
    run(bus)

    assert reader.heard == ["kept 0", "kept 1", "kept 2", "after"]


def test_what_was_not_acknowledged_comes_again_before_what_is_new(bus):
    """A letter that a reader died over is delivered again, first."""
    sender, reader = pair(bus)
    reader.takes = False
    sender.say("a/b", "one")
    run(bus)
    reader.connection.die()
    sender.say("a/b", "two")
    run(bus)

    reader.takes = True
    reader.connect()
    run(bus)

    assert reader.heard == ["one", "one", "two"]


def test_a_cut_link_loses_what_is_on_its_way_up_and_keeps_what_is_on_its_way_down(bus):
    """A sender's letters in flight are lost with its link; the broker sends its own again."""
    slow = LinkQuality(delay_s=(1.0, 1.0))
    sender, reader = pair(bus, slow)
    sender.say("a/b", "through")
    run(bus, until=1.5)
    sender.say("a/b", "lost")
    for client in (sender, reader):
        client.connection.lose(detected_after_s=5.0, reason="cut")

    sender.connect()
    reader.connect()
    run(bus)

    assert reader.heard == ["through"]
    assert reader.lost == ["cut"]


def test_a_process_that_dies_has_said_what_it_sent(bus):
    """What a killed process handed over still arrives, and its will comes after it."""
    slow = LinkQuality(delay_s=(1.0, 1.0))
    _, reader = pair(bus)
    dying = Client(bus, "dying", [], quality=slow, will=(Route("a/will"), b"will")).connect()

    dying.say("a/b", "last words")
    dying.connection.die()
    run(bus)

    assert reader.heard == ["last words", "will"]


def test_the_will_is_said_after_detection_and_not_after_a_goodbye(bus):
    """An unclean loss says the will once it is noticed; a clean goodbye never does."""
    _, reader = pair(bus)
    lost = Client(bus, "lost", [], will=(Route("a/lost"), b"lost")).connect()
    polite = Client(bus, "polite", [], will=(Route("a/polite"), b"polite")).connect()

    polite.connection.close((Route("a/polite"), b"goodbye"))
    lost.connection.lose(detected_after_s=45.0, reason="cut")
    run(bus, until=44.0)
    assert reader.heard == ["goodbye"]
    run(bus)

    assert reader.heard == ["goodbye", "lost"]


def test_taking_over_a_session_says_the_old_will_first(bus):
    """A client that connects again before its loss is noticed: old will, then the new one."""
    _, reader = pair(bus)
    client = Client(bus, "x", [], will=(Route("a/will"), b"will of 1")).connect()
    client.connection.lose(detected_after_s=45.0)

    client.will = (Route("a/will"), b"will of 2")
    client.connect().say("a/b", "back")
    run(bus)

    assert reader.heard == ["will of 1", "back"]


def test_a_silent_cut_is_not_noticed_by_the_client(bus):
    """On a half-open link the client goes on talking, to nobody."""
    sender, reader = pair(bus)

    sender.connection.lose(detected_after_s=45.0)

    assert sender.say("a/b", "into the void")
    assert sender.lost == []
    run(bus)
    assert reader.heard == []


def test_a_second_connection_under_one_name_ends_the_first(bus):
    """Session takeover: the first connection is told so, and hears nothing more."""
    sender, reader = pair(bus)
    second = Client(bus, "reader", ["a/#"]).connect()

    sender.say("a/b", "who hears?")
    run(bus)

    assert reader.lost == ["session taken over"]
    assert (reader.heard, second.heard) == ([], ["who hears?"])


def test_retained_letters_greet_a_new_reader_until_they_are_cleared(bus):
    """The last retained letter of a topic comes with the subscription; an empty one clears it."""
    sender = Client(bus, "sender", []).connect()
    sender.say("a/x", "old", retain=True)
    sender.say("a/x", "new", retain=True)
    sender.say("a/y", "cleared", retain=True)
    sender.say("a/y", "", retain=True)
    run(bus)

    reader = Client(bus, "reader", ["a/+"]).connect()
    run(bus)

    assert reader.heard == ["new"]


def test_letters_expire_while_they_wait(bus):
    """A letter with an expiry is not delivered to a reader that comes back later."""
    sender, reader = pair(bus)
    reader.connection.die()
    run(bus)
    sender.say("a/b", "short", expiry_s=60)
    sender.say("a/b", "long", expiry_s=600)
    bus.clock.call_at(bus.clock.now + 61, reader.connect)

    run(bus)

    assert reader.heard == ["long"]


@pytest.mark.parametrize(
    ("forgets", "expected"), [(True, ["new"]), (False, ["waiting", "kept", "new"])]
)
def test_a_broker_restart_keeps_or_forgets_sessions_and_retained_letters(bus, forgets, expected):
    """With its state, all comes back; without, what waited and what was retained is gone."""
    sender, reader = pair(bus)
    reader.connection.die()
    run(bus)
    sender.say("a/b", "waiting")
    sender.say("a/c", "kept", retain=True)
    run(bus)

    bus.stop(forgets=forgets)
    assert sender.lost == ["broker is gone"]
    assert bus.connect("reader", [], deliver=reader.hear, on_lost=reader.lost.append) is None
    bus.start()
    reader.connect()
    sender.connect().say("a/b", "new")
    run(bus)

    assert list(dict.fromkeys(reader.heard)) == expected


def test_losses_and_duplicates_come_as_often_as_asked_for():
    """QoS 0 is lost and QoS 1 doubled at the link's rates, within four standard deviations."""
    bus = Bus(Clock(), random.Random(3))
    sender = Client(bus, "s", [], quality=LinkQuality(loss=0.2, duplicates=0.2)).connect()
    reader = Client(bus, "r", ["a/#"]).connect()

    for _ in range(2000):
        sender.say("a/b", "0", qos=0)
        sender.say("a/b", "1")
    run(bus)

    assert abs(reader.heard.count("0") - 1600) < 4 * (2000 * 0.16) ** 0.5
    assert abs(reader.heard.count("1") - 2400) < 4 * (2000 * 0.16) ** 0.5


def test_a_slow_link_takes_the_time_its_rate_says(bus):
    """Ten letters of 10,000 bytes take 8 s at 100 kbit/s, each way."""
    _, reader = pair(bus)
    slow = Client(bus, "slow", [], quality=LinkQuality(up_bps=100_000)).connect()

    for _ in range(10):
        slow.say("a/b", "x" * (10_000 - len("a/b")))
    run(bus, until=7.99)
    assert len(reader.heard) == 9
    run(bus)

    assert bus.clock.now == pytest.approx(8.0)
    assert bus.traffic("slow") == (100_000, 0)
    assert bus.traffic("reader") == (0, 100_000)


LEVELS = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4)


@given(
    LEVELS, st.lists(st.sampled_from(["a", "b", "c", "+"]), min_size=1, max_size=4), st.booleans()
)
def test_filters_match_as_mqtt_says(topic, levels, is_open):
    """`+` is any one level and `#` the parent and all below, for readers and retained letters."""
    name = "/".join([*levels, "#"] if is_open else levels)
    fits = all(f in ("+", t) for f, t in zip(levels, topic, strict=False))
    expected = fits and (len(topic) >= len(levels) if is_open else len(topic) == len(levels))
    filters, retained = Filters(), Retained()
    filters.add(name, "reader")
    retained.put(Route("/".join(topic), retain=True), b"x")

    assert list(filters.matching("/".join(topic))) == (["reader"] if expected else [])
    assert len(list(retained.matching(name))) == int(expected)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), max_size=20))
def test_an_alarm_rings_at_the_time_set_last(settings):
    """Setting an alarm again replaces the time before, earlier or later."""
    clock, rang, expected = Clock(), [], None
    alarm = Alarm(clock, lambda: rang.append(clock.now))

    for wait, ahead in settings:
        until = clock.now + wait
        while clock.next_at <= until:
            clock.step()
        clock.call_at(until, lambda: None)
        while clock.now < until:
            clock.step()
        expected = clock.now + ahead
        alarm.set(expected)
    while clock.step():
        pass

    if expected is not None:
        assert rang[-1] == expected
        assert len(rang) <= len(settings)
