"""The same work as a plain loop over torch, in one process or with a pool."""

import multiprocessing
import random
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from benchmarks.simulation_peers.marks import Marks
from benchmarks.simulation_peers.work import Arrays, Work, accuracy, first_model, train

Sum: TypeAlias = tuple[list[Tensor], int]
"""Weights times samples, summed over clients, and the samples of all of them."""


class Trainer:
    """One model that is set to the global weights and trained, client after client."""

    def __init__(self, work: Work) -> None:
        torch.set_num_threads(1)
        self.work, self.arrays = work, Arrays(work)
        self.model = first_model(work, self.arrays)
        self.parameters = [parameter.data for parameter in self.model.parameters()]

    def set_to(self, weights: Sequence[Tensor]) -> None:
        """Make these the model's weights."""
        for own, given in zip(self.parameters, weights, strict=True):
            own.copy_(given)

    def sum_over(self, clients: Sequence[int], weights: Sequence[Tensor]) -> Sum:
        """Train for each of these clients from the same weights."""
        total = [torch.zeros_like(tensor) for tensor in weights]
        samples = 0
        for number in clients:
            x, y = self.arrays.tensors_of(number)
            self.set_to(weights)
            train(self.model, (x, y), self.work)
            for summed, own in zip(total, self.parameters, strict=True):
                summed.add_(own, alpha=len(y))
            samples += len(y)
        return total, samples


_of_this_worker: dict[str, Trainer] = {}


def _prepare(work: Work) -> None:
    _of_this_worker["trainer"] = Trainer(work)


def _in_worker(task: tuple[Sequence[int], list[Tensor]]) -> Sum:
    clients, arrays = task
    total, samples = _of_this_worker["trainer"].sum_over(clients, arrays)
    return total, samples


def run(work: Work) -> Marks:
    """Do the work: its marks."""
    trainer, marks = Trainer(work), Marks(work.rounds)
    weights = [tensor.clone() for tensor in trainer.parameters]
    rng = random.Random(work.seed)
    context = multiprocessing.get_context("fork")
    pool = context.Pool(work.processes, _prepare, (work,)) if work.processes > 1 else None
    for _ in range(work.rounds):
        chosen = rng.sample(range(work.clients), work.per_round)
        if pool is None:
            parts = [trainer.sum_over(chosen, weights)]
        else:
            # Each worker sums its share, so that two sets of weights come back and not ten.
            shares = [chosen[place :: work.processes] for place in range(work.processes)]
            parts = pool.map(_in_worker, [(share, weights) for share in shares], chunksize=1)
        samples = sum(part[1] for part in parts)
        weights, others = parts[0][0], [total for total, _ in parts[1:]]
        for place, summed in enumerate(weights):
            summed.add_(sum(other[place] for other in others)).div_(samples)
        trainer.set_to(weights)
        marks.mark(len(chosen), accuracy(trainer.model, trainer.arrays.held_out))
    if pool is not None:
        pool.terminate()
    return marks
