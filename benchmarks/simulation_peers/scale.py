"""What a million registered devices cost, and what a thousand rounds leave behind."""

from dataclasses import replace

from benchmarks.claims import Claim, Options, claim
from benchmarks.processes import MIB
from benchmarks.simulation_peers.harness import Outcome, headwater, perform
from benchmarks.simulation_peers.tasks import make_work

CHOSEN = 10_000

REGISTERED = (10_000, 100_000, 1_000_000)

PATIENCE_S = 900.0

MEMORY_GOAL_GB = 2.0

EVEN = 1.2
"""What counts as not growing, times the smaller one: figures differ by so much on one machine."""


def measure_scale(options: Options) -> list[Claim]:
    """Headwater alone: no peer was found that takes a million devices on two cores."""
    if options.is_quick:
        options.tell(
            "scale is left out of --quick: a million devices and 1,000 rounds take minutes"
        )
        return []
    by_registered = {number: _run(options, number, CHOSEN, 5) for number in REGISTERED}
    most = REGISTERED[-1]
    fewer = _run(options, most, CHOSEN // 10, 5)
    claims = []
    for registered, outcome in by_registered.items():
        claims.append(_cpu_claim(outcome, registered, CHOSEN))
        claims.append(_memory_claim(outcome, registered, CHOSEN))
    claims.append(_cpu_claim(fewer, most, CHOSEN // 10))
    claims.append(_growth(by_registered[most], by_registered[REGISTERED[1]], "registered", 10.0))
    claims.append(_growth(by_registered[most], fewer, "chosen", 10.0))
    started = by_registered[most].start_s[0]
    claims.append(claim(f"{most:,} registered: start to the end of the first round", started, "s"))
    return [*claims, _long_run(options)]


def _run(options: Options, registered: int, chosen: int, rounds: int) -> Outcome:
    options.tell(f"{registered:,} registered, {chosen:,} chosen, {rounds} rounds")
    work = make_work(options.folder, "linear", clients=registered, per_round=chosen, rounds=rounds)
    outcome = Outcome()
    outcome.add(*perform(headwater(), work, options.folder, patience_s=PATIENCE_S))
    return outcome


def _each_ms(outcome: Outcome) -> float:
    """CPU for each update that counted, in ms: who is not on cannot be chosen."""
    marks = outcome.marks
    updates = marks.updates / len(marks.ends) if marks else 0.0
    return 1e3 * outcome.median_cpu_s / updates


def _cpu_claim(outcome: Outcome, registered: int, chosen: int) -> Claim:
    name = f"{registered:,} registered, {chosen:,} chosen: CPU a round for each update"
    return claim(name, _each_ms(outcome), "ms")


def _memory_claim(outcome: Outcome, registered: int, chosen: int) -> Claim:
    name = f"{registered:,} registered, {chosen:,} chosen: most memory"
    return claim(name, outcome.peak_mb[0] * MIB / 1e9, "GB", goal=MEMORY_GOAL_GB)


def _growth(more: Outcome, less: Outcome, what: str, times: float) -> Claim:
    name = f"{times:g} times the {what}: CPU a round for each update"
    value, peer = _each_ms(more), _each_ms(less)
    return claim(name, value, "ms", peer="with a tenth", peer_value=peer, goal=EVEN * peer)


def _long_run(options: Options) -> Claim:
    options.tell("1,000 rounds")
    work = make_work(options.folder, "linear", clients=100, per_round=10, rounds=1000)
    marks, _ = perform(headwater(), replace(work, epochs=0), options.folder, patience_s=PATIENCE_S)
    first, last = marks.rss_mb[0], max(marks.rss_mb)
    name = "1,000 rounds of 10 of 100: most memory after round 100"
    return claim(name, last, "MiB", peer="after round 100", peer_value=first, goal=1.05 * first)
