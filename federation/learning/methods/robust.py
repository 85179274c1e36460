"""Methods that survive devices which lie."""

from federation.learning.aggregation.krum import krum, multi_krum
from federation.learning.aggregation.rank import coordinate_median, trimmed_mean
from federation.learning.methods.record import Method

_ALIKE = (
    "Each vote counts alike, whatever samples it reports, since they could be a lie too; the "
    "paper's machines hold equally many."
)
_KRUM_DEPARTS = (
    f"{_ALIKE} `byzantine` = 0 assumes as many liars as the votes allow, floor((n - 3) / 2), and "
    "a larger number is lowered to that: devices drop out, and n is not known before. Of one or "
    "two votes none can be told from the other, and all count. Distances run over the tensors "
    "that all voters sent, of models instead of gradients."
)

METHODS: tuple[Method, ...] = (
    Method(
        name="median",
        title="Coordinate-wise median",
        paper="arXiv:1803.01498",
        equation="Definition 1 and Alg. 1, option I",
        departs=f"{_ALIKE} It ranks models after local training, not gradients.",
        when_to_use="up to half the devices may lie, and honest ones resemble each other; "
        "under skewed labels it loses more accuracy than the trimmed mean",
        aggregate=coordinate_median,
        stands_in=True,
    ),
    Method(
        name="trimmed_mean",
        title="Coordinate-wise trimmed mean",
        paper="arXiv:1803.01498",
        equation="Definition 2 and Alg. 1, option II",
        departs=f"{_ALIKE} It ranks models after local training, not gradients. The number cut at "
        "each end is `trim` times the votes, rounded up, and one or two votes always stay: with "
        "few votes this is the median.",
        when_to_use="at most the share `trim` of the devices may lie: closer to the mean than the "
        "median where nobody does",
        params={"trim": 0.3},
        aggregate=trimmed_mean,
        stands_in=True,
    ),
    Method(
        name="krum",
        title="Krum",
        paper="arXiv:1703.02757",
        equation="section 4: the lowest sum of squared distances to n - f - 2 neighbours",
        departs=_KRUM_DEPARTS,
        when_to_use="devices hold alike data and many may lie; it throws away all updates but "
        "one, so first try multi_krum",
        params={"byzantine": 0.0},
        aggregate=krum,
        stands_in=True,
    ),
    Method(
        name="multi_krum",
        title="Multi-Krum",
        paper="arXiv:1703.02757",
        equation="section 4's score; the mean of the m lowest",
        departs=f"{_KRUM_DEPARTS} `keep` = 0 takes m = n - f.",
        when_to_use="some devices send boosted or random updates: whole updates are refused, "
        "and the honest rest is averaged",
        params={"byzantine": 0.0, "keep": 0.0},
        aggregate=multi_krum,
        stands_in=True,
    ),
)
