"""The HTTP application: its routes, and who may use which."""

import importlib.metadata
from collections.abc import Callable

from fastapi import Depends, FastAPI, Response

from moe_serving.hosting import Host
from moe_serving.serving import admin, completions, inference_protocol
from moe_serving.serving.guards import BearerToken, BodyLimit, install_error_handlers
from moe_serving.serving.metrics import CONTENT_TYPE, Metrics
from moe_serving.serving.waiting import Desk


def build_app(
    host: Host,
    metrics: Metrics,
    *,
    data_token: str,
    admin_token: str,
    clock: Callable[[], float],
) -> FastAPI:
    """All routes over one host.

    An empty `data_token` lets everybody ask; an empty `admin_token` shuts the repository's routes.
    Health and metrics are open: whoever watches a server needs no right to use it.
    """
    version = importlib.metadata.version("headwater")
    app = FastAPI(
        title="Headwater models",
        version=version,
        docs_url=None,
        redoc_url=None,
        strict_content_type=False,  # a body is JSON, whatever a small device calls it
    )
    http = host.config.http
    desk = Desk(host, metrics, http.client_header)
    guarded = [Depends(BearerToken(data_token, open_to_all=True))]
    about = {"name": "headwater-moe", "version": version}
    app.include_router(admin.router(host, BearerToken(admin_token, open_to_all=False)))
    app.include_router(inference_protocol.router(desk), dependencies=guarded)
    app.include_router(completions.router(desk, clock), dependencies=guarded)
    app.include_router(inference_protocol.health_router(host, about))

    @app.get("/health", tags=["health"])
    async def health(response: Response) -> dict[str, object]:
        response.status_code = 200 if host.is_ready else 503
        served = {each.name: each.version for each in host.hosted()}
        return {"ready": host.is_ready, "draining": host.is_draining, "models": served}

    @app.get("/metrics", tags=["health"])
    async def read_metrics() -> Response:
        return Response(metrics.exposition(host.hosted()), media_type=CONTENT_TYPE)

    install_error_handlers(app)
    app.add_middleware(BodyLimit, limit_bytes=int(http.body_mb * 1e6))
    return app
