"""Devices that lie: what they do to weights and to data, as functions of a seed alone."""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from cloud.coordination.run import parse_attempt
from federation.learning.data import LocalData
from federation.learning.layers import method_part, model_part
from federation.learning.submodel import leading_slice
from federation.learning.uplink import absolute, pack_update, unpack_update
from federation.protocol.codec import Weights, decode, encode
from federation.protocol.effects import Trained
from federation.protocol.messages import Assignment
from simulations.tables import AttackPlan, require
from simulations.workshop.job import Trainer
from simulations.world import draws_of


def sign_flipped(weights: Weights, base: Weights, boost: float = 1.0) -> Weights:
    """Weights moved the other way from the base, `boost` times as far: b - boost (w - b)."""
    return {
        name: (base[name] - np.float32(boost) * (tensor - base[name])).astype(np.float32)
        for name, tensor in weights.items()
    }


def noise(weights: Weights, rng: np.random.Generator, scale: float = 1.0) -> Weights:
    """Normal noise of this standard deviation in place of the weights."""
    return {
        name: rng.normal(0.0, scale, weights[name].shape).astype(np.float32)
        for name in sorted(weights)
    }


def non_finite(weights: Weights) -> Weights:
    """Weights of which the first entry of each tensor is infinite, and the last is NaN."""
    spoilt = {name: tensor.copy() for name, tensor in weights.items()}
    for tensor in spoilt.values():
        tensor.flat[:1], tensor.flat[-1:] = np.inf, np.nan
    return spoilt


def labels_shifted(data: LocalData, by: int, classes: int) -> LocalData:
    """The same samples under wrong labels: (y + by) mod `classes`."""
    return LocalData(data.x, (data.y + by) % classes)


def liars(plan: AttackPlan, devices: Sequence[str], seed: int) -> frozenset[str]:
    """Which of these devices lie.

    Raises:
        ConfigError: more liars than devices, or one that is not among them.
    """
    if plan.kind == "none":
        return frozenset()
    if isinstance(plan.devices, int):
        require(
            plan.devices <= len(devices),
            "attack.devices",
            plan.devices,
            f"at most the {len(devices)} of the fleet",
        )
        return frozenset(draws_of(seed, "liars").sample(sorted(devices), plan.devices))
    for name in plan.devices:
        known = f"one of the fleet's, {devices[0]} to {devices[-1]}"
        require(name in devices, "attack.devices", name, known)
    return frozenset(plan.devices)


def attacking(train: Trainer, plan: AttackPlan, whose: Collection[str]) -> Trainer:
    """Trains as `train` does, but what these devices send is a lie.

    A liar keeps to its plan: the layers that were asked for, in the encoding that was asked
    for. Only what is not finite travels dense, since int8 cannot say it. The method's tensors
    beside the model stay honest.
    """
    if not whose:
        return train

    def train_and_lie(
        assignment: Assignment, base: bytes, data: LocalData, memory: bytes
    ) -> Trained:
        attempt = parse_attempt(assignment.attempt)
        if attempt is None or attempt[2] not in whose:
            return train(assignment, base, data, memory)
        if plan.kind == "label_flip":
            from federation.learning.models import sizes_of

            classes = sizes_of(assignment.plan.model)["classes"]
            return train(assignment, base, labels_shifted(data, plan.shift, classes), memory)
        honest = train(assignment, base, data, memory)
        if honest.failure:
            return honest
        return dataclasses.replace(honest, update=_lie(honest.update, base, assignment, plan))

    return train_and_lie


def _lie(update: bytes, base: bytes, assignment: Assignment, plan: AttackPlan) -> bytes:
    origin, task = decode(base), assignment.plan
    told = absolute(unpack_update(update, origin, task, narrower=True), origin, task.uplink)
    weights, state = model_part(told), method_part(told)
    match plan.kind:
        case "sign_flip":
            begun = {n: leading_slice(n, origin[n], tensor.shape) for n, tensor in weights.items()}
            lie = sign_flipped(weights, begun, plan.boost)
        case "noise":
            lie = noise(weights, np.random.default_rng([task.seed, 1]), plan.scale)
        case "non_finite":
            return encode({**non_finite(weights), **state})
        case _:
            lie = weights
    packed, _ = pack_update(lie, origin, task, {}, state)
    return packed
