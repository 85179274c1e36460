"""OpenAI's completions for language models: `/v1/completions`, streamed or whole, `/v1/models`.

There is no chat: no model here comes with a template for one. What is not supported is refused
and not ignored.
"""

import itertools
import json
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from moe_serving.hosting import Hosted
from moe_serving.models.config import DecoderConfig
from moe_serving.requests import HTTP_STATUS, Ending, Generate, Generated, RefusedError, Scored
from moe_serving.serving.waiting import Desk
from moe_serving.tokens import Decoder, Tokenizer, decode, pieces

Token = Annotated[int, Field(ge=0, lt=2**31)]
Seconds = Annotated[float, Field(allow_inf_nan=False)]


class StreamOptions(BaseModel):
    """What a stream holds besides the text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """A request in OpenAI's words, and `deadline_s`, seconds from now, in ours."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(max_length=64)]
    prompt: str | list[Token]
    max_tokens: Annotated[int, Field(ge=0, le=1_000_000)] = 16
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=64)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=4)]
        | None
    ) = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str = ""
    n: Literal[1] = 1
    best_of: Literal[1] = 1
    deadline_s: Seconds | None = None


def router(desk: Desk, clock: Callable[[], float]) -> APIRouter:
    """The routes below `/v1`; `clock` is the time of day."""
    routes = APIRouter(prefix="/v1", tags=["completions"])
    numbers = itertools.count(1)
    prefix = secrets.token_hex(6)

    @routes.get("/models")
    async def served() -> dict[str, Any]:
        data = [
            {"id": each.name, "object": "model", "created": 0, "owned_by": "headwater"}
            for each in desk.host.hosted()
            if isinstance(each.loaded.record, DecoderConfig)
        ]
        return {"object": "list", "data": data}

    @routes.post("/completions", response_model=None)
    async def complete(request: Request, body: CompletionRequest) -> Response:
        hosted = desk.find(body.model)
        work = _work(hosted, body)
        head = {
            "id": f"cmpl-{prefix}-{next(numbers)}",
            "object": "text_completion",
            "created": int(clock()),
            "model": hosted.name,
        }
        if body.stream:
            hosted, parts = await desk.stream(request, hosted, work, body.deadline_s)
            has_usage = body.stream_options is not None and body.stream_options.include_usage
            told = _Stream(hosted.loaded.tokenizer, work, head, has_usage=has_usage)
            return StreamingResponse(told.events(parts), media_type="text/event-stream")
        hosted, ending = await desk.answer(request, hosted, work, body.deadline_s)
        return JSONResponse({**head, **_whole(hosted.loaded.tokenizer, work, ending)})

    return routes


def _work(hosted: Hosted, body: CompletionRequest) -> Generate:
    if not isinstance(hosted.loaded.record, DecoderConfig):
        raise RefusedError(
            "invalid",
            f"{hosted.name!r} is no language model; ask it at /v2/models/{hosted.name}/infer",
            pointer="model",
        )
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    tokenizer = hosted.loaded.tokenizer
    try:
        tokens = body.prompt if isinstance(body.prompt, list) else tokenizer.encode(body.prompt)
        stop = tuple(tuple(tokenizer.encode(each)) for each in stops)
    except ValueError as error:
        raise RefusedError("invalid", str(error), pointer="prompt") from error
    return Generate(
        tokens=tuple(tokens),
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed if body.seed is not None else secrets.randbits(63),
        stop=stop,
        top_logprobs=-1 if body.logprobs is None else body.logprobs,
        echo=body.echo,
        streams=body.stream,
    )


def _whole(tokenizer: Tokenizer, work: Generate, ending: Ending) -> dict[str, Any]:
    result = ending.result
    if not isinstance(result, Generated):
        raise RefusedError("failed", "the model gave no answer")
    texts = pieces(tokenizer, [scored.token for scored in result.tokens])
    logprobs = None
    if work.top_logprobs >= 0:
        logprobs = _logprobs(tokenizer, result.tokens, texts, offset=0)
    choice = _choice("".join(texts), logprobs, result.finish)
    return {"choices": [choice], "usage": _usage(work, len(result.tokens))}


def _choice(text: str, logprobs: dict[str, Any] | None, finish: str) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish or None}


def _usage(work: Generate, answered: int) -> dict[str, int]:
    read = len(work.tokens)
    made = answered - read if work.echo else answered
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def _logprobs(
    tokenizer: Tokenizer, scored: Sequence[Scored], texts: Sequence[str], offset: int
) -> dict[str, Any]:
    """As OpenAI has them, and the tokens' own numbers: a piece of a character has no text."""
    starts = itertools.accumulate((len(text) for text in texts[:-1]), initial=offset)
    return {
        "tokens": list(texts),
        "token_ids": [each.token for each in scored],
        "token_logprobs": [each.logprob for each in scored],
        "top_logprobs": [
            {decode(tokenizer, [token]): logprob for token, logprob in each.top}
            if each.top
            else None
            for each in scored
        ],
        "text_offset": list(starts) if scored else [],
    }


class _Stream:
    """One answer as server-sent events."""

    def __init__(
        self, tokenizer: Tokenizer, work: Generate, head: dict[str, Any], *, has_usage: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder: Decoder = tokenizer.decoder()
        self._work = work
        self._head = head
        self._has_usage = has_usage
        self._offset = 0
        self._answered = 0

    async def events(self, parts: AsyncIterator[Generated | Ending]) -> AsyncIterator[bytes]:
        """An event a part, the error if there is one, and `[DONE]`."""
        async for part in parts:
            if isinstance(part, Generated):
                yield self._event(part)
            elif isinstance(part.result, Generated):
                yield self._event(part.result)
                if self._has_usage:
                    usage = _usage(self._work, self._answered)
                    yield _line({**self._head, "choices": [], "usage": usage})
            else:
                status = HTTP_STATUS[part.outcome]
                fault = {"message": part.reason, "type": part.outcome, "code": status}
                yield _line({"error": fault})
        yield b"data: [DONE]\n\n"

    def _event(self, part: Generated) -> bytes:
        texts = [self._decoder.push(scored.token) for scored in part.tokens]
        if part.finish:
            texts = [*texts[:-1], (texts[-1] if texts else "") + self._decoder.flush()]
        text = "".join(texts)
        logprobs = None
        if self._work.top_logprobs >= 0:
            logprobs = _logprobs(self._tokenizer, part.tokens, texts, self._offset)
        self._offset += len(text)
        self._answered += len(part.tokens)
        return _line({**self._head, "choices": [_choice(text, logprobs, part.finish)]})


def _line(event: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(event, separators=(',', ':'))}\n\n".encode()
