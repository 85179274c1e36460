"""A trained model where others find it: the hub's registry, or the repository that is served."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from cloud.record.registry import ManifestEntry, Registry
from cloud.trainers.plans import TrainPlan
from cloud.trainers.task import Task
from federation.learning.export import export_onnx
from federation.protocol import codec
from federation.protocol.messages import ModelSpec
from moe_serving import checkpoint, repository
from moe_serving.models.config import ModelConfig
from moe_serving.models.families import build

Weights: TypeAlias = Mapping[str, Tensor]

MODELS = "served"
"""The folder of the repository of served models, beside the hub's registry."""


def publish(plan: TrainPlan, task: Task, weights: Weights, hub: Path, now: float) -> str:
    """Put the result where it is used; where that is, in words for a person.

    A model of the zoo becomes a run of the hub's registry, with its ONNX file, so that rounds
    can start from it and devices can infer with it. A mixture of experts becomes the next
    version in the repository that `headwater-moe serve` serves from.

    Raises:
        StoreError: a folder that cannot be written to.
        TrainingError: an ONNX file that computes something else than the model.
    """
    if plan.model is not None:
        return _register(plan.name, plan.model, task, weights, hub, now)
    if plan.moe is not None:
        return _offer(plan.name, plan.moe, task, weights, hub)
    return "nowhere: the plan has no model"


def _register(
    name: str, spec: ModelSpec, task: Task, weights: Weights, hub: Path, now: float
) -> str:
    registry = Registry(hub)
    arrays = {tensor_name: tensor.numpy() for tensor_name, tensor in weights.items()}
    encoded = codec.encode(arrays)
    example, _ = task.test.batch(np.arange(min(8, len(task.test))))
    onnx = export_onnx(spec, arrays, example=example.numpy(), labels=task.labels)
    entry = ManifestEntry(
        round=0,
        weights=registry.put(encoded),
        weights_bytes=len(encoded),
        onnx=registry.put(onnx),
        onnx_bytes=len(onnx),
        at=now,
    )
    registry.write_manifest(name, [entry])
    return f"model {entry.weights[:12]} as run {name!r} in the registry of {hub}"


def _offer(name: str, config: ModelConfig, task: Task, weights: Weights, hub: Path) -> str:
    model = build(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(weights[parameter_name])
    kind: repository.Kind = config.__struct_config__.tag  # type: ignore[assignment]
    about = repository.About(kind=kind, labels=task.labels, note="trained at the hub")
    with tempfile.TemporaryDirectory(prefix="trained-") as aside:
        checkpoint.save(model, Path(aside))
        version = repository.publish(hub / MODELS, name, Path(aside), about)
    return f"version {version} of {name!r} in {hub / MODELS}"
