"""Who waits, who goes next, and who is sent away: the queue before a model."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_serving.admission import Admission, Limits, Pace
from moe_serving.fairness import QUANTUM, FairQueue
from moe_serving.requests import Generate, RefusedError, Ticket

MANY = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(1, 900), st.floats(0.0, 100.0, allow_nan=False)),
    max_size=60,
)


def ticket(client: str, cost: int, deadline: float = 1e9) -> Ticket:
    """A request of this cost."""
    work = Generate(tokens=(1,), max_tokens=cost - 1)
    return Ticket(client, work, accepted_at=0.0, deadline=deadline, deliver=lambda _: None)


def drain(queue: FairQueue) -> list[Ticket]:
    """All that waits, in its turn."""
    found = []
    while (each := queue.pop()) is not None:
        found.append(each)
    return found


@given(MANY)
def test_everything_that_waits_comes_out_once_and_its_tokens_with_it(
    asked: list[tuple[str, int, float]],
) -> None:
    """Each ticket is popped, removed or expired exactly once, and the sums of tokens stay right."""
    queue = FairQueue()
    tickets = [ticket(*each) for each in asked]
    for each in tickets:
        queue.put(each)
    gone = tickets[::5]

    out = [each for each in gone if queue.remove(each)]
    out += queue.expire(30.0)
    assert queue.tokens == sum(each.cost for each in tickets if each not in out)
    out += drain(queue)

    assert Counter(map(id, out)) == Counter(map(id, tickets))
    assert (queue.tokens, len(queue), queue.clients) == (0, 0, 0)


@given(MANY)
def test_inside_a_client_the_earliest_deadline_goes_first(
    asked: list[tuple[str, int, float]],
) -> None:
    """Of one client's tickets none overtakes one with an earlier deadline."""
    queue = FairQueue()
    for each in asked:
        queue.put(ticket(*each))

    order = drain(queue)

    for client in "abcd":
        deadlines = [each.deadline for each in order if each.client == client]
        assert deadlines == sorted(deadlines)


@settings(max_examples=30)
@given(st.dictionaries(st.sampled_from("abcd"), st.integers(20, 600), min_size=2))
def test_clients_with_work_get_the_same_share_whatever_the_size_of_their_requests(
    costs: dict[str, int],
) -> None:
    """While all clients wait, what any two were given differs by a turn and a request at most."""
    queue = FairQueue()
    for client, cost in costs.items():
        for _ in range(6_000 // cost + 1):
            queue.put(ticket(client, cost))
    given_tokens: Counter[str] = Counter(dict.fromkeys(costs, 0))

    while queue.clients == len(costs):
        each = queue.pop()
        assert each is not None
        given_tokens[each.client] += each.cost

        spread = max(given_tokens.values()) - min(given_tokens.values())
        assert spread <= 2 * (QUANTUM + max(costs.values()))


def test_a_flood_of_one_client_does_not_delay_another() -> None:
    """A client that sends one request after another's thousand is served among the first."""
    queue = FairQueue()
    for _ in range(1000):
        queue.put(ticket("flood", 100))
    queue.put(ticket("single", 100))

    order = [each.client for each in drain(queue)]

    assert order.index("single") <= 2 * QUANTUM // 100


def test_the_bound_on_what_waits_is_a_time() -> None:
    """Tickets are accepted until the wait would be longer than the target, then `busy`."""
    queue = FairQueue()
    admission = Admission(Limits(target_wait_s=2.0), Pace(1000.0))
    for n in range(20):
        each = ticket(f"c{n}", 100)
        admission.admit(each, queue, 0.0)
        queue.put(each)

    with pytest.raises(RefusedError) as refused:
        admission.admit(ticket("late", 100), queue, 0.0)

    assert refused.value.outcome == "busy"
    assert refused.value.retry_after_s == 2.0


def test_who_asks_for_more_than_its_share_is_told_that_it_is_the_one() -> None:
    """One client may hold half of the bound alone; another is let in where it is refused."""
    queue = FairQueue()
    admission = Admission(Limits(target_wait_s=2.0), Pace(1000.0))
    for _ in range(10):
        each = ticket("greedy", 100)
        admission.admit(each, queue, 0.0)
        queue.put(each)

    with pytest.raises(RefusedError) as refused:
        admission.admit(ticket("greedy", 100), queue, 0.0)
    admission.admit(ticket("modest", 100), queue, 0.0)

    assert refused.value.outcome == "over-share"
    assert refused.value.retry_after_s >= 1.0


def test_an_empty_queue_takes_what_no_bound_would() -> None:
    """A request larger than the whole bound is accepted when nothing waits."""
    admission = Admission(Limits(target_wait_s=0.1), Pace(10.0))

    admission.admit(ticket("a", 10_000), FairQueue(), 0.0)


def test_a_deadline_that_has_passed_is_not_accepted() -> None:
    """A ticket whose deadline is now is `expired` at once."""
    with pytest.raises(RefusedError) as refused:
        Admission(Limits(), Pace(10.0)).admit(ticket("a", 1, deadline=5.0), FairQueue(), 5.0)

    assert refused.value.outcome == "expired"


def test_the_rate_follows_the_model_and_forgets() -> None:
    """After a few times its memory, the rate is what was seen of late and not the first guess."""
    pace = Pace(1e6, memory_s=5.0)

    for _ in range(1000):
        pace.observe(50, 0.1, is_pressed=True)
        pace.observe(1, 0.1, is_pressed=False)

    assert pace.tokens_per_s == pytest.approx(500.0, rel=0.01)
    assert pace.step_s == pytest.approx(0.1)


def test_what_could_not_be_answered_in_time_is_refused_at_once() -> None:
    """With work ahead of it and steps of 0.1 s, 50 tokens are not promised for in 4 s."""
    queue = FairQueue()
    admission = Admission(Limits(), Pace(1000.0, step_s=0.1))
    queue.put(ticket("a", 100))

    with pytest.raises(RefusedError) as refused:
        admission.admit(ticket("b", 50, deadline=4.0), queue, 0.0)
    admission.admit(ticket("b", 50, deadline=6.0), queue, 0.0)

    assert refused.value.outcome == "busy"
    with pytest.raises(RefusedError):
        admission.admit(ticket("b", 10, deadline=6.0), FairQueue(), 0.0, running=6000)
    admission.admit(ticket("b", 10, deadline=6.0), FairQueue(), 0.0, running=5000)


def test_those_who_are_sent_away_are_not_told_to_come_back_together() -> None:
    """Each is told a later moment, as far apart as the work of one takes; none beyond a bound."""
    queue = FairQueue()
    admission = Admission(Limits(target_wait_s=1.0, deadline_s=30.0), Pace(100.0))
    queue.put(ticket("a", 100))
    pauses = []
    for n in range(60):
        with pytest.raises(RefusedError) as refused:
            admission.admit(ticket(f"b{n}", 100), queue, 0.0)
        pauses.append(refused.value.retry_after_s)

    assert pauses[:3] == [2.0, 3.0, 4.0]
    assert max(pauses) == 30.0
