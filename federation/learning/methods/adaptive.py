"""Methods with an optimiser at the hub."""

from federation.learning.aggregation.adaptive import server_adam, server_momentum, server_yogi
from federation.learning.methods.record import Method

_DEPARTS = (
    "Devices weigh by their samples in the mean change; a tensor that nobody sent stays, and its "
    "moments with it. The paper tunes `server_lr` for each task; our default did well on digits."
)
_MOMENTS = {"server_lr": 0.02, "beta1": 0.9, "beta2": 0.99, "tau": 0.001}

METHODS: tuple[Method, ...] = (
    Method(
        name="fedavgm",
        title="Federated averaging with momentum at the hub",
        paper="arXiv:1909.06335",
        equation="section 4.3: v = beta v + change, w = w + v",
        departs="A tensor that nobody sent stays, and its momentum with it. `server_lr` scales "
        "the step (1 in the paper).",
        when_to_use="rounds pull in different directions, as under skewed labels with few "
        "devices a round; with very few a round it overshoots, unless `server_lr` is 0.3 or less",
        params={"server_lr": 1.0, "momentum": 0.9},
        aggregate=server_momentum,
        stands_in=True,
    ),
    Method(
        name="fedadam",
        title="Federated averaging with Adam at the hub",
        paper="arXiv:2003.00295",
        equation="Alg. 2",
        departs=_DEPARTS,
        when_to_use="layers or entries need steps of very different size, as with text or "
        "sparse features; tune `server_lr` and `tau` together",
        params=_MOMENTS,
        aggregate=server_adam,
        stands_in=True,
    ),
    Method(
        name="fedyogi",
        title="Federated averaging with Yogi at the hub",
        paper="arXiv:2003.00295",
        equation="Alg. 2",
        departs=_DEPARTS,
        when_to_use="as fedadam, where changes are rare and large: the steps grow again more "
        "slowly after one",
        params=_MOMENTS,
        aggregate=server_yogi,
        stands_in=True,
    ),
)
