"""Methods against skewed labels: their losses are calibrated to the device's own."""

from federation.learning.aggregation.prototypes import mean_with_prototypes, no_prototypes
from federation.learning.methods.record import Method

METHODS: tuple[Method, ...] = (
    Method(
        name="rebafl",
        title="Prior-calibrated softmax and prototype augmentation",
        paper="arXiv:2303.06314",
        equation="local loss L_PC + lam L_aug, and the aggregation of prototypes by class count",
        departs=(
            "A class that no device of a round holds keeps its last prototype (carry_over 0: it "
            "has none, as in the paper). A device counts its labels directly, where the authors' "
            "code leaves out the last batch that is not full. What a device says of its class "
            "counts is bounded by its number of samples."
        ),
        when_to_use=(
            "devices hold few of the classes and most are away in a round; "
            "it needs a sample or more of two classes on a device to do its part"
        ),
        loss="rebalanced_softmax",
        params={"lam": 0.5, "eps": 0.01, "calibrate": 1.0, "carry_over": 1.0},
        aggregate=mean_with_prototypes,
        state=no_prototypes,
    ),
    Method(
        name="balanced_softmax",
        title="Softmax calibrated to each device's labels",
        paper="arXiv:2007.10740",
        equation="Theorem 1; the logit-adjusted loss of arXiv:2007.07314 with tau = 1",
        departs=(
            "The prior is each device's own, as L_PC of arXiv:2303.06314 has it, not that of all "
            "data; it is mixed with a share eps of the uniform, so a class that a device lacks "
            "stays in its softmax (eps 0: it leaves)."
        ),
        when_to_use="devices' labels are skewed and nothing but the model may travel",
        loss="calibrated_softmax",
        params={"eps": 0.01},
        stands_in=True,
    ),
    Method(
        name="fedlc",
        title="Logits calibrated by a margin for rare classes",
        paper="arXiv:2209.00189",
        equation="the calibrated loss: logits less tau n^(-1/4)",
        departs=(
            "The softmax runs over all classes, the label's own among them, so the loss cannot "
            "fall below zero. A class that a device lacks counts as 1e-8 samples: its margin is "
            "100 tau, which all but leaves it out."
        ),
        when_to_use="devices hold most classes, in very unequal numbers",
        loss="label_margin",
        params={"tau": 1.0},
        stands_in=True,
    ),
    Method(
        name="fedrs",
        title="Restricted softmax",
        paper="doi:10.1145/3447548.3467254",
        equation="the restricted softmax: logits of missing classes times alpha",
        departs="The bias of the classifier is scaled with the rest of the logit.",
        when_to_use="devices lack whole classes, and one extra multiplication is all they can pay",
        loss="restricted_softmax",
        params={"alpha": 0.5},
        stands_in=True,
    ),
)
