import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloud.broker import Broker
from cloud.config import BrokerConfig, HubConfig
from cloud.record.queries import RoundRow
from cloud.record.store import Store
from federation.protocol.effects import Link
from federation.protocol.link import Arrived, Ending, MailboxConfig
from federation.protocol.messages import Report
from federation.protocol.topics import Route
from simulations.processes import free_port, hub_process
from simulations.swarm.connection import Connection
from simulations.swarm.dropping import Drop, Dropping, drop_of, is_due
from simulations.swarm.record import audit
from simulations.tables import PHASES
from tests.command_line import Type

PATIENCE_S = 60.0


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Starts a hub with a broker of a kind, its file `hub.toml` in the test's folder."""
    started = []

    def start(kind: str) -> None:
        broker = BrokerConfig(kind=kind, port=free_port())  # type: ignore[arg-type]
        process = hub_process(HubConfig(folder=tmp_path / "hub", broker=broker), tmp_path)
        started.append(process)
        process.start()
        deadline = time.monotonic() + PATIENCE_S
        while "hub is serving" not in process.last_words():
            assert process.is_running, process.last_words()
            assert time.monotonic() < deadline, process.last_words()
            time.sleep(0.05)

    yield start
    for each in started:
        each.stop()


def rounds_in(folder: Path) -> list[RoundRow]:
    store = Store(HubConfig(folder=folder / "hub").database_url)
    rows = store.rounds(store.runs()[0].plan.name)
    store.close()
    return rows


def test_what_a_swarm_sends_counts_once_whoever_drops_out(
    hub: Callable[[str], None], typed: Type, tmp_path: Path, broker_kind: str
) -> None:
    """Of 30 agents of which half drop out of each round, every update counts exactly once."""
    hub(broker_kind)
    (tmp_path / "swarm.toml").write_text("away_s = 0.3\nseed = 4\nheartbeat_s = 1.0")
    said = typed(
        "headwater-sim", "swarm", "--agents", "30", "--rounds", "3", "--drop", "0.5",
        "--hub", "hub.toml", "--config", "swarm.toml", "--json",
    )  # fmt: skip

    result = json.loads(said.succeeds())
    assert (result["status"], result["record"]["counted"]) == ("finished", 90)
    assert (result["record"]["lost"], result["record"]["double"]) == (0, 0)
    assert (result["asked"], result["unanswered"]) == (90, 0)
    assert {kind.split()[0] for kind in result["drops"]} == {"cut", "killed"}
    # Who drops out once more while away comes back only once.
    assert min(sum(result["drops"].values()), result["connections"]) > 20
    rows = rounds_in(tmp_path)
    assert [len(row.devices) for row in rows] == [30, 30, 30]
    # Agent n reports n + 1 samples, so the sum tells each of them apart.
    assert [row.report.samples for row in rows if row.report] == [465, 465, 465]


def test_a_swarm_may_train_for_real(
    hub: Callable[[str], None], typed: Type, tmp_path: Path
) -> None:
    """With the real trainer every digit is trained on by one agent, and the model learns."""
    hub("auto")
    (tmp_path / "swarm.toml").write_text('trainer = "real"\nupdate_kb = 10')
    said = typed(
        "headwater-sim", "swarm", "--agents", "6", "--rounds", "2", "--drop", "0",
        "--hub", "hub.toml", "--config", "swarm.toml", "--json",
    )  # fmt: skip

    assert json.loads(said.succeeds())["record"]["counted"] == 12
    first, second = (row.report for row in rounds_in(tmp_path))
    assert first is not None
    assert second is not None
    assert first.samples == second.samples == 1797
    assert second.loss_sum < first.loss_sum


def test_a_cut_is_told_by_the_last_will_and_a_goodbye_is_not(broker: Broker) -> None:
    """A connection that is cut has its last words published; one that is closed its goodbye."""
    heard: list[bytes] = []

    async def look_on() -> list[Ending]:
        def listen(event: Arrived | Link) -> None:
            if isinstance(event, Arrived):
                heard.append(event.payload)

        is_five = broker.kind == "mosquitto"
        witness = _connection(broker, "witness", listen, is_five=is_five, filters=("last/+",))
        watching = asyncio.create_task(witness.run(Route("none"), b""))
        endings = []
        for name in ("cut", "closed"):
            connection = _connection(broker, name, lambda _: None, is_five=is_five)
            life = asyncio.create_task(connection.run(Route(f"last/{name}"), b"last will"))
            await _until(lambda c=connection: c.is_up and witness.is_up)  # type: ignore[misc]
            if name == "cut":
                connection.abort("cut")
            else:
                await connection.close(Route(f"last/{name}"), b"goodbye")
            endings.append(await life)
            await _until(lambda: len(heard) == len(endings))
        witness.abort()
        await watching
        return endings

    endings = asyncio.run(look_on())

    assert heard == [b"last will", b"goodbye"]
    assert [ending.reason for ending in endings] == ["cut", "closed"]


def test_letters_arrive_whole_and_in_order(broker: Broker) -> None:
    """Letters of any size, more than the socket holds, arrive as sent, after the link is up."""
    sizes = [0, 1, 100, 65_536, 200_000, 5, 300_000, 65_000] * 5
    events: list[Arrived | Link] = []

    async def exchange() -> None:
        is_five = broker.kind == "mosquitto"
        connection = _connection(broker, "both", events.append, is_five=is_five, filters=("l",))
        life = asyncio.create_task(connection.run(Route("none"), b""))
        assert not connection.publish(Route("l"), b"too early")
        await _until(lambda: connection.is_up)
        for number, size in enumerate(sizes):
            assert connection.publish(Route("l"), bytes([number]) * size)
        await _until(lambda: len(events) == len(sizes) + 1)
        connection.abort()
        await life
        assert not connection.publish(Route("l"), b"too late")

    asyncio.run(exchange())

    first, *letters = events
    assert isinstance(first, Link)
    assert first.is_up
    expected = [bytes([number]) * size for number, size in enumerate(sizes)]
    assert [each.payload for each in letters if isinstance(each, Arrived)] == expected


def test_who_drops_out_is_drawn_anew_for_each_attempt() -> None:
    """About the wanted share drops out, at all phases and in both ways, alike for one seed."""
    dropping = Dropping(share=0.2, away_s=2.0, seed=1)
    attempts = [f"run_{number}_swarm-{place:04d}" for number in range(5) for place in range(400)]

    drops = [drop for each in attempts if (drop := drop_of(dropping, each)) is not None]
    again = [drop for each in attempts if (drop := drop_of(dropping, each)) is not None]

    assert drops == again
    assert 0.17 < len(drops) / len(attempts) < 0.23
    assert Counter(drop.phase for drop in drops).keys() == set(PHASES)
    assert {drop.kind for drop in drops} == {"cut", "killed"}
    assert all(1.0 <= drop.away_s <= 3.0 for drop in drops)


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_that_is_passed_over_does_not_save_from_dropping_out(phase: str) -> None:
    """A drop is due at its phase and at every later one, and at no earlier one."""
    drop = Drop("cut", phase, 1.0)

    due = [is_due(drop, each) for each in PHASES]

    assert due == [place >= PHASES.index(phase) for place in range(len(PHASES))]


def test_the_audit_finds_what_is_lost_and_what_is_double() -> None:
    """A promise that the record does not hold is a loss; a sum that is too large a double."""
    promised = {(1, "a"): 3, (1, "b"): 4, (2, "a"): 3, (2, "b"): 4}

    whole = audit([_row(1, ("a", "b"), 7), _row(2, ("a", "b"), 7)], promised)
    lossy = audit([_row(1, ("a", "b"), 7), _row(2, ("b",), 4)], promised)
    twice = audit([_row(1, ("a", "b"), 10), _row(2, ("a", "a", "b"), 7)], promised)
    unheard = audit([_row(1, ("a", "b", "c"), 9)], promised)

    assert (whole.counted, whole.lost, whole.double) == (4, 0, 0)
    assert (lossy.counted, lossy.lost, lossy.double) == (3, 1, 0)
    assert (twice.lost, twice.double) == (0, 3)
    assert (unheard.lost, unheard.double) == (0, 0)
    assert whole.updates_per_s == pytest.approx(4 / 11)


@pytest.mark.parametrize(
    ("words", "config", "said"),
    [
        ((), "", ("no broker is named", "--broker")),
        (("--hub", "absent.toml"), "", ("absent.toml", "hub.toml")),
        (("--broker", "127.0.0.1:1"), "", ("mqtt://host:port",)),
        (("--broker", "mqtt://127.0.0.1:1"), "update_kb = 0.0", ("update_kb is 0.0", "0.4")),
        (("--broker", "mqtt://127.0.0.1:1"), "update = 1", ("update",)),
        (("--broker", "mqtt://127.0.0.1:1"), "patience_s = 1.0", ("no broker answers", "within")),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    typed: Type, tmp_path: Path, words: tuple[str, ...], config: str, said: tuple[str, ...]
) -> None:
    """A swarm that cannot live says why, what was expected and what to do, and ends with 2."""
    (tmp_path / "swarm.toml").write_text(config)

    answer = typed("headwater-sim", "swarm", "--agents", "2", "--config", "swarm.toml", *words)

    answer.fails(*said)


def _connection(
    broker: Broker,
    name: str,
    deliver: Callable[[Arrived | Link], None],
    *,
    is_five: bool,
    filters: tuple[str, ...] = (),
) -> Connection:
    config = MailboxConfig(url=broker.url, client_id=name, filters=filters, session_expiry_s=0)
    return Connection(config, epoch=1, is_five=is_five, deliver=deliver)


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20.0):
        while not holds():
            await asyncio.sleep(0.01)


def _row(number: int, devices: tuple[str, ...], samples: int) -> RoundRow:
    return RoundRow(
        run="run", number=number, status="closed", reason="", base="", model="", deadline=0.0,
        opened_at=10.0 * number - 10.0, ended_at=10.0 * number - 9.0, asked=2,
        received=len(devices), excluded=0, devices=devices, report=Report(samples=samples),
        bytes_up=0, bytes_down=0, evaluations=(),
    )  # fmt: skip
