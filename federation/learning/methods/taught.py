"""Methods whose devices each train a student of their own, which a teacher at the hub teaches."""

from federation.learning.methods.record import Method

METHODS: tuple[Method, ...] = (
    Method(
        name="logit_kd",
        title="Knowledge distillation from the twins' teacher",
        paper="arXiv:2303.06155",
        equation="Eq. 25, 26: cross entropy + T^2 KL(teacher || student)",
        departs=(
            "The paper gives no temperature; ours is 4. Without a teacher's answers a device "
            "learns from its own labels alone."
        ),
        when_to_use=(
            "devices differ too much for one model, their owners let the hub mirror their data, "
            "and all devices have seen most classes"
        ),
        loss="logit_distillation",
        stands_in=True,
        is_personal=True,
        params={"tau": 4.0, "weight": 1.0},
    ),
    Method(
        name="simkd",
        title="Students that reuse their teacher's classifier",
        paper="arXiv:2303.06155",
        equation="Eq. 27 (SimKD): the squared distance of projected features to the teacher's",
        departs=(
            "The distance is a part of the mean square of the teacher's features, times `weight`, "
            "so that the rate of other losses will do, whatever the teacher. The projector is one "
            "dense layer and a rectifier on what a zoo model's classifier would get, where SimKD "
            "has three convolutions. `labels` adds so much of the cross entropy through the "
            "teacher's classifier: 0 is the paper's. Without a teacher's answers a device learns "
            "from its own labels alone."
        ),
        when_to_use=(
            "devices have seen few of the classes each and want to know the others too, and "
            "their owners let the hub mirror their data"
        ),
        loss="feature_imitation",
        stands_in=True,
        is_personal=True,
        params={"weight": 15.0, "labels": 0.0},
    ),
)
