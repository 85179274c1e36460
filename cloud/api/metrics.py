"""Health, and figures for Prometheus."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest

from cloud.twins.store import TwinStore
from twin.shadow import is_in_sync, presence

router = APIRouter()

MOST = 10_000
"""So many twins are counted; a larger fleet's figures are of its first."""


@router.get("/health")
def health(request: Request) -> dict[str, Any]:
    """Whether the hub's database answers."""
    return {"status": "ok", "twins": request.app.state.hub.twins.count()}


@router.get("/metrics")
def metrics(request: Request) -> Response:
    """Figures of the fleet, in Prometheus' text format."""
    hub = request.app.state.hub
    return Response(generate_latest(_measured(hub.twins, hub.clock())), 200, None, _TYPE)


_TYPE = CONTENT_TYPE_LATEST


def _measured(twins: TwinStore, now: float) -> CollectorRegistry:
    registry = CollectorRegistry()
    rows, fleet = twins.twins(limit=MOST), twins.fleet()
    there = sum(presence(row.shadow, now)[0] for row in rows)
    _gauge(registry, "devices", "Devices that were ever born.", twins.count())
    _gauge(registry, "devices_there", "Devices whose link is up.", there)
    in_sync = sum(is_in_sync(row.shadow) for row in rows)
    _gauge(registry, "twins_in_sync", "Twins whose device answered the newest wish.", in_sync)
    outcomes = Gauge(
        "headwater_parts", "Parts in rounds, by outcome.", ["outcome"], registry=registry
    )
    for outcome, count in fleet.outcomes.items():
        outcomes.labels(outcome).set(count)
    errors = [e for row in rows if (e := row.model.calibration.median_error) is not None]
    if errors:
        middle = sorted(errors)[len(errors) // 2]
        _gauge(registry, "forecast_error", "Median of twins' median errors of time.", middle)
    scores = [b for row in rows if (b := row.model.calibration.brier) is not None]
    if scores:
        _gauge(registry, "forecast_brier", "Mean Brier score of twins.", sum(scores) / len(scores))
    return registry


def _gauge(registry: CollectorRegistry, name: str, about: str, value: float) -> None:
    Gauge(f"headwater_{name}", about, registry=registry).set(value)
