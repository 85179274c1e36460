"""Plain averaging, and averaging with a pull towards the base."""

from federation.learning.methods.record import Method

METHODS = (
    Method(
        name="fedavg",
        title="Federated averaging",
        paper="arXiv:1602.05629",
        equation="Alg. 1",
        when_to_use="first: the baseline, and hard to beat while devices resemble each other",
        stands_in=True,
    ),
    Method(
        name="fedprox",
        title="Federated averaging with a proximal term",
        paper="arXiv:1812.06127",
        equation="Eq. 2",
        when_to_use="devices differ, or train for many epochs or unequal numbers of steps",
        loss="proximal",
        params={"mu": 0.01},
        tolerates_stale=True,
        stands_in=True,
    ),
)
