"""The same work with pfl-research's simulated backend.

Several processes are torchrun's, which pfl joins by `torch.distributed`; the first one marks.
"""
# mypy: ignore-errors
# pfl lives in an environment of its own, where nothing is type-checked.

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops.selector import get_framework_module
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import nn

from benchmarks.simulation_peers.marks import Marks
from benchmarks.simulation_peers.work import Arrays, Work, accuracy, first_model


class Net(nn.Module):
    """The work's model in the form pfl asks for."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.cross_entropy = nn.CrossEntropyLoss()

    def forward(self, x):
        """The logits."""
        return self.model(x)

    def loss(self, x, y, is_eval=False):
        """The loss of a batch."""
        self.train(not is_eval)
        return self.cross_entropy(self(x), y)

    @torch.no_grad()
    def metrics(self, _x, _y, is_eval=True):  # noqa: ARG002 - pfl names them
        """None: the model is measured centrally, once a round."""
        return {}


class RoundEnd(TrainingProcessCallback):
    """Measures the model and marks the end of each round."""

    def __init__(self, marks: Marks, net: Net, arrays: Arrays, per_round: int):
        self.marks, self.net, self.arrays, self.per_round = marks, net, arrays, per_round

    def after_central_iteration(self, _aggregate, _model, *, central_iteration):  # noqa: ARG002
        """A round is over."""
        self.marks.mark(self.per_round, accuracy(self.net.model, self.arrays.held_out))
        return False, Metrics()


def run(work: Work) -> Marks | None:
    """Do the work: its marks, which only the first process has."""
    torch.set_num_threads(1)
    np.random.seed(work.seed)  # noqa: NPY002, TID251 - pfl draws from NumPy's global state
    arrays, marks = Arrays(work), Marks(work.rounds)
    net = Net(first_model(work, arrays))
    model = PyTorchModel(
        model=net,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
    )

    def make_user(number):
        return Dataset(
            raw_data=list(arrays.tensors_of(number)),
            user_id=number,
            train_kwargs={"is_eval": False},
            eval_kwargs={"is_eval": True},
        )

    data = FederatedDataset(
        make_user, get_user_sampler("minimize_reuse", list(range(work.clients)))
    )
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=work.rounds,
            evaluation_frequency=work.rounds + 10,
            train_cohort_size=work.per_round,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data),
        model=model,
        model_train_params=_local_params(work),
        callbacks=[RoundEnd(marks, net, arrays, work.per_round)],
    )
    return marks if get_framework_module().distributed.global_rank == 0 else None


def _local_params(work: Work) -> NNTrainHyperParams:
    # Where nobody trains, not even a step on nothing is asked of pfl.
    steps = {"local_num_epochs": work.epochs}
    if work.epochs == 0:
        steps = {"local_num_epochs": None, "local_num_steps": 0}
    return NNTrainHyperParams(
        local_learning_rate=work.learning_rate, local_batch_size=work.batch_size, **steps
    )
