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

SIZES = {"cpu": 768, "cuda": 4096}
"""Rows and columns of the matrices whose product is timed."""


def bound_cpu_s(task: Task, per_round: int) -> float:
    """CPU seconds of a round in which nothing is done but its sums, on one thread.

    They are those of training `per_round` clients and of measuring the new model once.
    """
    tests = TEST_DIGITS if task == "mlp" else TEST_IMAGES
    operations = per_round * training_operations(task) + tests * _operations(task, trains=False)
    return operations / matrix_rate("cpu")


def training_operations(task: Task) -> float:
    """Floating-point operations of one client's training."""
    each = DIGITS_EACH if task == "mlp" else IMAGES_EACH
    return TRAININGS[task].epochs * each * _operations(task, trains=True)


def matrix_rate(device: str, seconds: float = 0.5) -> float:
    """Floating-point operations a second of float32 matrix products, the best seen.

    On the CPU it is that of one thread, by the thread's own clock, which others do not disturb.
    """
    size, now = SIZES[device], time.thread_time if device == "cpu" else time.perf_counter
    left, right = torch.rand(size, size, device=device), torch.rand(size, size, device=device)
    before, best = torch.get_num_threads(), 0.0
    torch.set_num_threads(1)
    try:
        until = now() + seconds
        while now() < until:
            began = now()
            torch.mm(left, right)
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * size**3 / (now() - began))
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
