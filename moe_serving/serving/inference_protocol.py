"""The Open Inference Protocol v2 (KServe, Triton) over HTTP, for every kind of model.

A classifier takes `windows` FP32 [windows, steps, channels] and gives `logits` FP32 and `label`
BYTES. A language model or translation takes `text` BYTES [1] or `tokens` INT64 [n], with
`max_tokens` and its companions as parameters, and gives `text`, `tokens` and, if asked for,
`logprobs` FP32. Of an echoed prompt the first token has none, so there is one fewer.
"""

import math
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_serving.hosting import Host, Hosted
from moe_serving.models.config import ClassifierConfig
from moe_serving.requests import Classified, Classify, Generate, Generated, RefusedError, Work
from moe_serving.serving.waiting import Desk
from moe_serving.tokens import decode

MAX_ITEMS = 4_000_000

Seconds = Annotated[float, Field(allow_inf_nan=False)]

Parameters = TypeVar("Parameters", bound=BaseModel)


class InputTensor(BaseModel):
    """A tensor that is sent: its numbers flat or nested, in row-major order."""

    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0, le=MAX_ITEMS)]], Field(max_length=8)]
    datatype: Literal["FP32", "FP64", "FP16", "INT64", "INT32", "BYTES"]
    data: list[Any]
    parameters: dict[str, Any] = {}


class WantedTensor(BaseModel):
    """An output that is asked for by name."""

    name: str
    parameters: dict[str, Any] = {}


class GenerationParameters(BaseModel):
    """What may be said of an answer; the deadline is in seconds from now."""

    model_config = ConfigDict(extra="forbid")

    deadline_s: Seconds | None = None
    max_tokens: Annotated[int, Field(ge=0, le=1_000_000)] = 64
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    logprobs: bool = False
    echo: bool = False


class ClassificationParameters(BaseModel):
    """The deadline is in seconds from now."""

    model_config = ConfigDict(extra="forbid")

    deadline_s: Seconds | None = None


class InferenceRequest(BaseModel):
    """A request as the protocol has it."""

    id: str = ""
    parameters: dict[str, Any] = {}
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1)]
    outputs: list[WantedTensor] = []


class OutputTensor(BaseModel):
    """A tensor that is answered, its numbers flat."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any]


class InferenceResponse(BaseModel):
    """An answer as the protocol has it."""

    id: str
    model_name: str
    model_version: str
    outputs: list[OutputTensor]


def health_router(host: Host, about: Mapping[str, str]) -> APIRouter:
    """The server's own routes; `about` is its name and version."""
    routes = APIRouter(prefix="/v2", tags=["health"])

    @routes.get("")
    async def server() -> dict[str, Any]:
        return {**about, "extensions": ["model_repository"]}

    @routes.get("/health/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @routes.get("/health/ready")
    async def ready(response: Response) -> dict[str, bool]:
        response.status_code = 200 if host.is_ready else 503
        return {"ready": host.is_ready}

    return routes


def router(desk: Desk) -> APIRouter:
    """The models' routes below `/v2`."""
    routes = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

    @routes.get("/models/{name}")
    @routes.get("/models/{name}/versions/{version}")
    async def model(name: str, version: int | None = None) -> dict[str, Any]:
        return _metadata(desk.find(name, version))

    @routes.get("/models/{name}/ready")
    @routes.get("/models/{name}/versions/{version}/ready")
    async def model_ready(name: str, version: int | None = None) -> dict[str, Any]:
        hosted = desk.find(name, version)
        return {"name": hosted.name, "ready": True}

    @routes.post("/models/{name}/infer")
    @routes.post("/models/{name}/versions/{version}/infer")
    async def infer(
        request: Request, body: InferenceRequest, name: str, version: int | None = None
    ) -> InferenceResponse:
        hosted = desk.find(name, version)
        work, deadline_s = _work(hosted, body)
        hosted, ending = await desk.answer(request, hosted, work, deadline_s)
        outputs = _outputs(hosted, work, ending.result)
        return InferenceResponse(
            id=body.id,
            model_name=hosted.name,
            model_version=str(hosted.version),
            outputs=_only_wanted(outputs, body.outputs),
        )

    return routes


def _metadata(hosted: Hosted) -> dict[str, Any]:
    record = hosted.loaded.record
    if isinstance(record, ClassifierConfig):
        inputs = [("windows", "FP32", [-1, record.window_length, record.n_channels])]
        outputs = [("logits", "FP32", [-1, record.n_classes]), ("label", "BYTES", [-1])]
    else:
        inputs = [("text", "BYTES", [1]), ("tokens", "INT64", [-1])]
        outputs = [("text", "BYTES", [1]), ("tokens", "INT64", [-1]), ("logprobs", "FP32", [-1])]

    def described(tensors: list[tuple[str, str, list[int]]]) -> list[dict[str, Any]]:
        return [{"name": n, "datatype": d, "shape": s} for n, d, s in tensors]

    return {
        "name": hosted.name,
        "versions": [str(hosted.version)],
        "platform": "headwater_moe",
        "inputs": described(inputs),
        "outputs": described(outputs),
    }


def _work(hosted: Hosted, body: InferenceRequest) -> tuple[Work, float | None]:
    tensor = body.inputs[0]
    if isinstance(hosted.loaded.record, ClassifierConfig):
        limits = _parameters(ClassificationParameters, body.parameters)
        _check_name(tensor, "windows")
        if not all(tensor.shape):
            raise RefusedError("invalid", "a size is 0: send a window", pointer="inputs[0].shape")
        windows = _numbers(tensor, np.float32).reshape(tensor.shape)
        return Classify(np.ascontiguousarray(windows)), limits.deadline_s
    _check_name(tensor, "text", "tokens")
    asked = _parameters(GenerationParameters, body.parameters)
    work = Generate(
        tokens=_tokens(hosted, tensor),
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        seed=asked.seed if asked.seed is not None else secrets.randbits(63),
        top_logprobs=0 if asked.logprobs else -1,
        echo=asked.echo,
    )
    return work, asked.deadline_s


def _parameters(kind: type[Parameters], sent: dict[str, Any]) -> Parameters:
    try:
        return kind.model_validate(sent)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in ("parameters", *fault["loc"]))
        raise RefusedError("invalid", fault["msg"], pointer=place) from error


def _check_name(tensor: InputTensor, *known: str) -> None:
    if tensor.name not in known:
        raise RefusedError(
            "invalid",
            f"{tensor.name[:40]!r} is no input of this model; expected {' or '.join(known)}",
            pointer="inputs[0].name",
        )


def _numbers(tensor: InputTensor, kind: type[np.generic]) -> npt.NDArray[Any]:
    """The numbers, flat, as many as the shape says."""
    if tensor.datatype == "BYTES":
        raise RefusedError("invalid", "expected numbers, not BYTES", pointer="inputs[0].datatype")
    try:
        found = np.asarray(tensor.data, dtype=kind).ravel()
    except (ValueError, TypeError, OverflowError) as error:
        raise RefusedError("invalid", f"not numbers: {error}", pointer="inputs[0].data") from error
    expected = math.prod(tensor.shape)
    if len(found) != expected:
        raise RefusedError(
            "invalid",
            f"{len(found)} numbers and a shape of {expected}: correct one of them",
            pointer="inputs[0].shape",
        )
    return found


def _tokens(hosted: Hosted, tensor: InputTensor) -> tuple[int, ...]:
    if tensor.name == "tokens":
        return tuple(_numbers(tensor, np.int64).tolist())
    text = tensor.data[0] if len(tensor.data) == 1 else None
    if not isinstance(text, str):
        raise RefusedError("invalid", "expected one text", pointer="inputs[0].data")
    try:
        return tuple(hosted.loaded.tokenizer.encode(text))
    except ValueError as error:
        raise RefusedError("invalid", str(error), pointer="inputs[0].name") from error


def _outputs(hosted: Hosted, work: Work, result: object) -> list[OutputTensor]:
    if isinstance(result, Classified):
        logits, labels = result.logits_BK, hosted.loaded.published.about.labels
        outputs = [_tensor("logits", "FP32", list(logits.shape), logits.ravel().tolist())]
        if labels:
            named = [labels[k] for k in logits.argmax(axis=1)]
            outputs.append(_tensor("label", "BYTES", [len(named)], named))
        return outputs
    if not isinstance(result, Generated) or not isinstance(work, Generate):
        raise RefusedError("failed", "the model gave no answer")
    tokens = [scored.token for scored in result.tokens]
    outputs = [
        _tensor("text", "BYTES", [1], [decode(hosted.loaded.tokenizer, tokens)]),
        _tensor("tokens", "INT64", [len(tokens)], tokens),
    ]
    if work.top_logprobs >= 0:
        known = [each.logprob for each in result.tokens if each.logprob is not None]
        outputs.append(_tensor("logprobs", "FP32", [len(known)], known))
    return outputs


def _tensor(name: str, datatype: str, shape: list[int], data: list[Any]) -> OutputTensor:
    return OutputTensor(name=name, datatype=datatype, shape=shape, data=data)


def _only_wanted(outputs: list[OutputTensor], wanted: list[WantedTensor]) -> list[OutputTensor]:
    if not wanted:
        return outputs
    there = {output.name: output for output in outputs}
    for place, each in enumerate(wanted):
        if each.name not in there:
            raise RefusedError(
                "invalid",
                f"{each.name[:40]!r} is no output of this request; there are {', '.join(there)}",
                pointer=f"outputs[{place}].name",
            )
    return [there[each.name] for each in wanted]
