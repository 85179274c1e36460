"""What no loop can be faster than: a round's sums at the rate of this machine's matrix products."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.simulation_peers.tasks import (
    DIGITS_EACH,
    IMAGES_EACH,
    MODELS,
    TEST_DIGITS,
    TEST_IMAGES,
    TRAININGS,
)
from benchmarks.simulation_peers.work import Task
from federation.learning.models import build_model

SIZE = 768
"""Rows and columns of the matrices whose product is timed."""


def bound_cpu_s(task: Task, per_round: int) -> float:
    """CPU seconds of a round in which nothing is done but its sums, on one thread.

    They are those of training `per_round` clients and of measuring the new model once.
    """
    each, tests = (DIGITS_EACH, TEST_DIGITS) if task == "mlp" else (IMAGES_EACH, TEST_IMAGES)
    epochs = TRAININGS[task].epochs
    operations = per_round * epochs * each * _operations(task, trains=True)
    return (operations + tests * _operations(task, trains=False)) / matrix_rate()


def matrix_rate(device: str = "cpu", seconds: float = 0.5) -> float:
    """Floating-point operations a second of float32 matrix products, the best seen."""
    left, right = torch.rand(SIZE, SIZE, device=device), torch.rand(SIZE, SIZE, device=device)
    before, best = torch.get_num_threads(), 0.0
    torch.set_num_threads(1)
    try:
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            began = time.thread_time()
            torch.mm(left, right)
            best = max(best, 2 * SIZE**3 / (time.thread_time() - began))
    finally:
        torch.set_num_threads(before)
    return best


def _operations(task: Task, *, trains: bool) -> float:
    """Floating-point operations for one sample, counted by torch."""
    model, samples = build_model(MODELS[task]), 4
    x = torch.rand(samples, 64) if task == "mlp" else torch.rand(samples, 1, 28, 28)
    with FlopCounterMode(display=False) as counter:
        out = model(x)
        if trains:
            out.sum().backward()
    return float(counter.get_total_flops()) / samples
