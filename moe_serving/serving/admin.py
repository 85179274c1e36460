"""The repository over HTTP, for operators: what is there, load it, unload it."""

from typing import Any

from fastapi import APIRouter, Depends
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel

from moe_serving.hosting import Host
from moe_serving.serving.guards import BearerToken


class LoadRequest(BaseModel):
    """Which version; none is the newest."""

    version: int | None = None


def router(host: Host, token: BearerToken) -> APIRouter:
    """The routes below `/v2/repository`, behind a token of their own."""
    routes = APIRouter(prefix="/v2/repository", tags=["repository"], dependencies=[Depends(token)])

    @routes.post("/index")
    async def index() -> list[dict[str, Any]]:
        rows = await run_in_threadpool(host.index)
        return [
            {"name": r.name, "version": str(r.version), "state": r.state, "reason": r.reason}
            for r in rows
        ]

    @routes.post("/models/{name}/load")
    async def load(name: str, body: LoadRequest | None = None) -> dict[str, Any]:
        hosted = await run_in_threadpool(host.load, name, body.version if body else None)
        return {"name": hosted.name, "version": str(hosted.version), "state": "READY"}

    @routes.post("/models/{name}/unload")
    async def unload(name: str) -> dict[str, Any]:
        await run_in_threadpool(host.unload, name)
        return {"name": name, "state": "UNAVAILABLE"}

    return routes
