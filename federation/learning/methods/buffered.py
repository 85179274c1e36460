"""Methods that take updates as they come."""

from federation.learning.aggregation.buffered import buffered_mean
from federation.learning.methods.record import Method

METHODS: tuple[Method, ...] = (
    Method(
        name="fedbuff",
        title="Buffered asynchronous aggregation",
        paper="arXiv:2106.06639",
        equation="Alg. 1",
        departs="A round's settling closes the buffer: K is the number of updates that counted in "
        "it, and an age counts rounds. Updates travel as differences to their own base, and the "
        "hub adds them to the newest. No differential privacy.",
        when_to_use='with late = "keep", where many devices are much slower than the others: '
        "what a late update says is a change, which does not drag the model back to its old base",
        params={"server_lr": 1.0, "alpha": 0.5},
        aggregate=buffered_mean,
        tolerates_stale=True,
        needs_delta=True,
        stands_in=True,
    ),
)
