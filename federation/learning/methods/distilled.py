"""Methods that keep what the global model knows."""

from federation.learning.methods.record import Method

METHODS: tuple[Method, ...] = (
    Method(
        name="fedntd",
        title="Not-true distillation",
        paper="arXiv:2106.03097",
        equation="cross entropy + beta times the not-true distillation loss",
        when_to_use=(
            "devices forget in training what the global model knew of other classes, "
            "and can pay a second forward pass a step"
        ),
        loss="not_true_distillation",
        params={"beta": 1.0, "tau": 1.0},
        stands_in=True,
    ),
    Method(
        name="fedvls",
        title="Vacant-class distillation and logit suppression",
        paper="arXiv:2401.02329",
        equation="calibrated loss + lam times vacant-class distillation + logit suppression",
        departs=(
            "The prior is mixed with a share eps of the uniform, where the authors' code adds "
            "1e-9 to each class. Suppressed are the logits themselves, of samples of other classes "
            "only; the authors' code shifts them by the prior first, and counts the samples of "
            "the class as logits of zero. Its weight, `suppression`, is theirs."
        ),
        when_to_use=(
            "whole classes are missing on devices, most devices take part in a round, "
            "and they can pay a second forward pass a step"
        ),
        loss="vacant_distillation",
        params={"lam": 0.1, "suppression": 0.005, "eps": 1e-8},
        stands_in=True,
    ),
    Method(
        name="moon",
        title="Model-contrastive learning",
        paper="arXiv:2103.16257",
        equation="Alg. 1: cross entropy + mu times the model-contrastive loss",
        departs=(
            "Representations are what the classifier gets; there is no projection head. A device "
            "that has not trained in this run before has nothing to move away from: its loss is "
            "the cross entropy."
        ),
        when_to_use=(
            "the same devices come back often, can keep a copy of their last model, "
            "and can pay two more forward passes a step"
        ),
        loss="contrastive",
        params={"mu": 1.0, "tau": 0.5},
    ),
)
