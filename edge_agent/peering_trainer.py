"""What a peer's trainer does beside training: mix models, and judge them on held-out samples.

`carry_out` is called by the trainer's process on a device, and by the simulation.
"""

from federation.errors import CodecError, HeadwaterError
from federation.learning.data import LocalData
from federation.learning.fulfilment import held_apart
from federation.learning.mixers import mixer_named
from federation.learning.mixers.record import MixRule
from federation.learning.mixing import mix
from federation.protocol.codec import Weights, decode, encode
from federation.protocol.effects import Mix, Mixed


def carry_out(task: Mix, data: LocalData) -> Mixed:
    """A peer's next model, or why there is none.

    A model that cannot be read has a share of 0, as any other that is unfit.

    Args:
        task: the models and the rule.
        data: all local samples; those held out judge the models.
    """
    try:
        return _draw(task) if not task.own else _mix(task, data)
    except HeadwaterError as error:
        return Mixed(attempt=task.attempt, failure=str(error))


def _draw(task: Mix) -> Mixed:
    """The model all peers of a run begin with, once it is certain that the rule is one."""
    from federation.learning.models import initial_weights

    mixer_named(task.rule).settings(task.params)
    return Mixed(attempt=task.attempt, model=encode(initial_weights(task.model, task.seed)))


def _mix(task: Mix, data: LocalData) -> Mixed:
    received: dict[str, Weights] = {}
    unreadable: dict[str, str] = {}
    for peer, payload in task.received.items():
        try:
            received[peer] = decode(payload)
        except CodecError as error:
            unreadable[peer] = str(error)
    mixed = mix(
        MixRule(task.rule, task.params),
        decode(task.own),
        received,
        decode(task.trust) if task.trust else {},
        held_apart(data, task.hold_out)[1],
        task.model,
        me=task.me,
        round=task.round - 1,
        rounds=task.rounds,
    )
    return Mixed(
        attempt=task.attempt,
        model=encode(mixed.weights),
        trust=encode(mixed.trust) if mixed.trust else b"",
        row={**mixed.row, **dict.fromkeys(unreadable, 0.0)},
        refused={**mixed.refused, **unreadable},
    )
