"""What stands before every route: the size of bodies, tokens, and the one form of errors."""

import hmac
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from federation.errors import HeadwaterError
from moe_serving.requests import HTTP_STATUS, RefusedError

LINGER_FACTOR, LINGER_S = 16, 2.0
"""How much of a body that is too large is read and thrown away, so that its sender hears why."""


class _TooLargeError(Exception):
    pass


@dataclass(slots=True)
class _Seen:
    """How much of a body has come."""

    size_bytes: int = 0


class BodyLimit:
    """Answers 413 to bodies above `limit_bytes`, whatever their headers say, and keeps none."""

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _declared(scope) > self._limit_bytes:
            await self._refuse(scope, receive, send)
            return
        seen = _Seen()

        async def counted() -> Message:
            message = await receive()
            seen.size_bytes += len(message.get("body", b""))
            if seen.size_bytes > self._limit_bytes:
                raise _TooLargeError
            return message

        async def watched(message: Message) -> None:
            # Whoever read the body may make an error of their own of ours: it is not sent.
            if seen.size_bytes <= self._limit_bytes:
                await send(message)

        with suppress(_TooLargeError):
            await self._app(scope, counted, watched)
        if seen.size_bytes > self._limit_bytes:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        until, thrown = time.monotonic() + LINGER_S, 0
        while thrown < LINGER_FACTOR * self._limit_bytes and time.monotonic() < until:
            message = await receive()
            thrown += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        reason = f"the body is larger than {self._limit_bytes} bytes: split the request"
        response = error_response(scope["path"], 413, reason, {"connection": "close"})
        await response(scope, receive, send)


def _declared(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0


def error_response(
    path: str, status: int, reason: str, headers: dict[str, str] | None = None, kind: str = ""
) -> JSONResponse:
    """An error in the words of the protocol that the path belongs to."""
    if path.startswith("/v1/"):
        kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        error = {"message": reason, "type": kind, "param": None, "code": status}
        return JSONResponse({"error": error}, status, headers)
    return JSONResponse({"error": reason}, status, headers)


def refusal(path: str, error: RefusedError) -> JSONResponse:
    """A request that was not answered, with its status, and when to ask again."""
    retry_s = error.retry_after_s
    headers = {"retry-after": str(math.ceil(retry_s))} if retry_s > 0 else None
    reason = f"{error.pointer}: {error.reason}" if error.pointer else error.reason
    return error_response(path, HTTP_STATUS[error.outcome], reason, headers)


def install_error_handlers(app: FastAPI) -> None:
    """Make one kind of answer of every error, and never a traceback."""

    async def on_refused(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, RefusedError):
            return error_response(request.url.path, 500, "the server failed: see its log")
        return refusal(request.url.path, error)

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        faults = error.errors() if isinstance(error, RequestValidationError) else []
        if any(fault["type"] == "json_invalid" for fault in faults):
            return error_response(request.url.path, 400, "the body is not JSON")
        reason = "; ".join(f"{_place(fault['loc'])}: {fault['msg']}" for fault in faults[:3])
        return error_response(request.url.path, 422, reason)

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        status, reason = getattr(error, "status_code", 500), getattr(error, "detail", "")
        return error_response(request.url.path, status, str(reason))

    async def on_own(request: Request, error: Exception) -> JSONResponse:
        return error_response(request.url.path, 409, str(error))

    app.add_exception_handler(RefusedError, on_refused)
    app.add_exception_handler(HeadwaterError, on_own)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)


def _place(location: tuple[Any, ...]) -> str:
    """As in `inputs[0].shape`."""
    place = ""
    for part in location:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part != "body":
            place += f".{part}" if place else str(part)
    return place or "body"


class BearerToken:
    """A dependency that lets in who sends this token; an empty one is `open_to_all` or shut."""

    def __init__(self, token: str, *, open_to_all: bool) -> None:
        self._token = token
        self._open_to_all = open_to_all

    def __call__(self, request: Request) -> None:
        """Let the request in.

        Raises:
            HTTPException: 401, or 403 where there is no token that could be sent.
        """
        if not self._token:
            if self._open_to_all:
                return
            raise HTTPException(403, "no token was set for this; it is shut until one is")
        sent = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(sent.encode(), self._token.encode()):
            raise HTTPException(401, "another bearer token is expected in Authorization")
