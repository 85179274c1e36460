"""The hub's HTTP API as an application: who may ask, what errors look like, what there is.

It shares nothing with the hub's thread but the database: it reads and writes there in
transactions of its own, and then says which device something is desired of.
"""

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from cloud.api import metrics, twins
from cloud.twins.store import TwinStore
from federation.errors import StoreError, TwinConflictError, TwinError

MAX_BODY_BYTES = 64 * 1024

OPEN = ("/health",)
"""What may be asked without a token."""


@dataclass(frozen=True)
class Hub:
    """What the API knows of the hub. `wished` tells it whom something is newly desired of."""

    namespace: str
    twins: TwinStore
    wished: Callable[[str], None]
    clock: Callable[[], float]
    token: str = ""


def build(hub: Hub) -> FastAPI:
    """The application."""
    app = FastAPI(title="Headwater hub", version="1", docs_url="/api/docs", redoc_url=None)
    app.state.hub = hub
    app.include_router(twins.router, prefix="/api/v1")
    app.include_router(metrics.router)
    app.middleware("http")(_guard)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _unprocessable)
    app.add_exception_handler(TwinConflictError, _conflict)
    app.add_exception_handler(TwinError, _twin_error)
    app.add_exception_handler(StoreError, _unavailable)
    return app


def failure(status: int, error: str, **more: object) -> JSONResponse:
    """An answer that says what is wrong, as every one of this API does."""
    return JSONResponse({"error": error, **more}, status)


async def _guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Let in who bears the token, with a body of bounded size."""
    hub: Hub = request.app.state.hub
    if hub.token and request.url.path not in OPEN:
        said = request.headers.get("authorization", "")
        if not hmac.compare_digest(said.encode(), f"Bearer {hub.token}".encode()):
            answer = failure(401, "a bearer token is required: send Authorization: Bearer ...")
            answer.headers["WWW-Authenticate"] = "Bearer"
            return answer
    length = request.headers.get("content-length", "")
    if request.method not in ("GET", "HEAD") and not length.isdecimal():
        return failure(411, "the length of the body is required: send Content-Length")
    if length.isdecimal() and int(length) > MAX_BODY_BYTES:
        return failure(413, f"the body has {length} bytes; at most {MAX_BODY_BYTES} are read")
    return await call_next(request)


async def _http_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    more = {"current": error.current} if isinstance(error, twins.OutdatedError) else {}
    answer = failure(error.status_code, str(error.detail), **more)
    answer.headers.update(error.headers or {})
    return answer


async def _unprocessable(_: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return failure(422, f"{place}: {first['msg']}")


async def _conflict(_: Request, error: Exception) -> Response:
    return failure(409, str(error))


async def _twin_error(_: Request, error: Exception) -> Response:
    return failure(422, str(error))


async def _unavailable(_: Request, error: Exception) -> Response:
    return failure(503, str(error))
