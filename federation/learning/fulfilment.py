"""Assignments turned into updates: by a device, by its digital agent, and by a simulation.

Whoever trains, the bytes of an update follow from the assignment, the base, the samples and what
the last training of the run left.
"""

from collections.abc import Sequence
from functools import lru_cache

from federation.errors import HeadwaterError
from federation.learning.data import LocalData
from federation.learning.mirroring import mirrored
from federation.learning.mixing import validation_split
from federation.learning.submodel import RESIDUAL, within
from federation.learning.training import LocalResult
from federation.learning.uplink import pack_update
from federation.protocol.codec import Weights, decode, encode
from federation.protocol.effects import Trained
from federation.protocol.messages import Assignment, HoldOut, LocalPlan
from federation.protocol.mirror import MIRROR


def fulfil_all(
    jobs: Sequence[tuple[Assignment, bytes, LocalData, bytes]],
    *,
    exact: bool = False,
    accelerator: str = "auto",
    threads: int = 1,
    in_place: bool = False,
) -> list[Trained]:
    """What a device gives for each of these jobs, in their order; they are trained together.

    A job that fails says so in its place, and the others never notice.

    Args:
        jobs: assignment, encoded base, local samples and memory (empty: nothing). A base that is
            many jobs' is decoded once.
        exact: give the very bits of a device alone; otherwise weights agree to 1e-5.
        accelerator: "cpu", "cuda", or "auto": CUDA where torch finds it.
        threads: how many cores torch may use.
        in_place: leave updates where they are, if whoever takes them shares this memory.

    Raises:
        ConfigError: an accelerator that is not there.
    """
    from federation.learning.cohort import Task, train_cohort

    tasks: dict[int, Task] = {}
    done: dict[int, Trained] = {}
    for place, (assignment, base, data, memory) in enumerate(jobs):
        if assignment.plan.method == MIRROR:
            done[place] = mirrored(assignment.attempt, data)
            continue
        try:
            kept = decode(memory) if memory else {}
            samples = training_part(data, assignment.plan)
            tasks[place] = Task(_decoded(base), samples, assignment.plan, kept)
        except HeadwaterError as error:
            done[place] = Trained(assignment.attempt, failure=str(error))
    results = train_cohort(
        list(tasks.values()), exact=exact, accelerator=accelerator, threads=threads
    )
    for (place, task), result in zip(tasks.items(), results, strict=True):
        assignment = jobs[place][0]
        try:
            if isinstance(result, HeadwaterError):
                raise result
            done[place] = answer(assignment, task.weights, task.memory, result, in_place=in_place)
        except HeadwaterError as error:
            done[place] = Trained(assignment.attempt, failure=str(error))
    return [done[place] for place in range(len(jobs))]


@lru_cache(maxsize=2)
def _decoded(base: bytes) -> Weights:
    """The tensors of a base that many ask for one after the other; nobody changes them."""
    return decode(base)


def answer(
    assignment: Assignment,
    weights: Weights,
    kept: Weights,
    result: LocalResult,
    *,
    in_place: bool = False,
) -> Trained:
    """The letter's worth of a training: the update as the plan wants it, and what stays here."""
    plan, missed = assignment.plan, within(kept, RESIDUAL)
    update, residual = pack_update(
        result.weights, weights, plan, missed, result.state, in_place=in_place
    )
    left = {**result.memory, **{f"{RESIDUAL}/{name}": part for name, part in residual.items()}}
    return Trained(
        assignment.attempt,
        update=update,
        report=result.report,
        memory=encode(left) if left else b"",
    )


def training_part(data: LocalData, plan: LocalPlan) -> LocalData:
    """The samples a plan lets be trained on.

    Raises:
        TrainingError: too few samples to hold any out, or a share out of range.
    """
    return data if plan.hold_out is None else held_apart(data, plan.hold_out)[0]


def held_apart(data: LocalData, hold_out: HoldOut) -> tuple[LocalData, LocalData]:
    """The samples to train on, and those to judge models by.

    Raises:
        TrainingError: too few samples to hold any out, or a share out of range.
    """
    return validation_split(data, hold_out.share, round=hold_out.turn, every=1)
