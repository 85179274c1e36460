"""The twins over HTTP: read, export, look into the past, and write what is desired.

A twin's ETag is its revision, that of its desired part its version: whoever writes says with
`If-Match` what he has seen (428 without, 412 where it is no longer so). Who gives the version
within the body instead, as AWS IoT's clients do, is told 409 with the current document.
"""

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse

from cloud.twins.store import ForecastRow, TwinRow
from federation.errors import ProtocolError, TwinConflictError, TwinError
from federation.protocol.wishes import check_wishes
from twin.exports import FORMATS, figures
from twin.merging import check_patch
from twin.shadow import Edit, Part, PartName, Shadow, is_in_sync, presence, staleness, wanting

router = APIRouter(tags=["twins"])

MOST = 1000

LARGEST = 2**63 - 1
"""Databases know no larger number."""

Limit = Annotated[int, Query(ge=1, le=MOST)]
After = Annotated[int, Query(ge=0, le=LARGEST)]


class OutdatedError(HTTPException):
    """Somebody wrote in between; `current` is what is there now."""

    def __init__(self, status: int, error: str, current: dict[str, Any]) -> None:
        super().__init__(status, error)
        self.current = current


@router.get("/twins")
def read_twins(
    request: Request, after: str = "", limit: Limit = 100, state: str = ""
) -> dict[str, Any]:
    """The twins in device order, in short; `next` names where the next page begins."""
    now = _now(request)
    rows = request.app.state.hub.twins.twins(after, limit)
    found = [_in_short(row, now) for row in rows]
    return {
        "twins": [each for each in found if not state or each["state"] == state],
        "next": rows[-1].shadow.device if len(rows) == limit else None,
    }


@router.get("/twins/{device}")
def read_twin(
    request: Request,
    device: str,
    revision: Annotated[int | None, Query(ge=0, le=LARGEST)] = None,
    at: Annotated[float | None, Query(ge=0.0, le=LARGEST)] = None,
) -> Response:
    """A twin as it is, or its shadow as it was at a revision or a time (seconds since 1970)."""
    row = _found(request, device)
    if revision is not None or at is not None:
        shadow = request.app.state.hub.twins.as_it_was(device, revision=revision, at=at)
        return JSONResponse(_shadow(shadow, _now(request)))
    return _tagged(request, _whole(row, _now(request)), f'"r{row.shadow.revision}"')


@router.patch("/twins/{device}")
async def patch_twin(request: Request, device: str) -> Response:
    """Merge a patch (RFC 7396) into what is desired and into the tags, both or neither."""
    body = _body(await request.body())
    version = body.pop("version", None)
    unknown = sorted(body.keys() - {"desired", "tags"})
    if unknown:
        raise TwinError(f"{unknown[0]} cannot be written; desired and tags can: leave it out")

    def check(shadow: Shadow) -> dict[PartName, int]:
        if version is not None:
            return {"desired": _version(version)}
        _match(request, f'"r{shadow.revision}"')
        return {"desired": shadow.desired.version, "tags": shadow.tags.version}

    shadow = await _write(request, device, body, check)
    return _tagged(request, _shadow(shadow, _now(request)), f'"r{shadow.revision}"')


@router.get("/twins/{device}/desired")
def read_desired(request: Request, device: str) -> Response:
    """What is desired of a device."""
    part = _found(request, device).shadow.desired
    return _tagged(request, part.state, f'"d{part.version}"')


@router.patch("/twins/{device}/desired")
async def patch_desired(request: Request, device: str) -> Response:
    """Merge a patch into what is desired; what the device reports meanwhile is no conflict."""
    body = {"desired": _body(await request.body())}

    def check(shadow: Shadow) -> dict[PartName, int]:
        _match(request, f'"d{shadow.desired.version}"')
        return {"desired": shadow.desired.version}

    part = (await _write(request, device, body, check)).desired
    return _tagged(request, part.state, f'"d{part.version}"')


@router.get("/twins/{device}/history")
def read_history(
    request: Request, device: str, after: After = 0, limit: Limit = 100
) -> dict[str, Any]:
    """What was changed, by whom and why, from the revision after this one on."""
    _found(request, device)
    changes = request.app.state.hub.twins.changes(device, after, limit)
    return {"changes": msgspec.to_builtins(changes)}


@router.get("/twins/{device}/forecasts")
def read_forecasts(request: Request, device: str, limit: Limit = 100) -> dict[str, Any]:
    """What the twin said of the device's parts in rounds, and what came of them."""
    _found(request, device)
    rows = request.app.state.hub.twins.forecasts(device=device, limit=limit)
    return {"forecasts": [_forecast(row) for row in rows]}


@router.get("/twins/{device}/export")
def export(request: Request, device: str, format: str = "ditto") -> Response:  # noqa: A002
    """A twin in the words of others: `aws`, `ditto` or `wot`."""
    row = _found(request, device)
    if format not in FORMATS:
        raise TwinError(f"there is no format {format[:40]!r}; there are {', '.join(FORMATS)}")
    namespace = request.app.state.hub.namespace
    return JSONResponse(FORMATS[format](row.shadow, row.model, namespace, _now(request)))


# Small matters ----------------------------------------------------------------------------


def _now(request: Request) -> float:
    now: float = request.app.state.hub.clock()
    return now


def _found(request: Request, device: str) -> TwinRow:
    """The twin of a device; 404 where there is none."""
    try:
        row: TwinRow = request.app.state.hub.twins.twin(device)
    except TwinError as error:
        raise HTTPException(404, str(error)) from error
    return row


def _body(data: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TwinError(f"the body is not JSON ({error}): send an object") from error
    return check_patch(found)


def _version(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TwinError(f"version is {value!r}; expected the desired part's whole number")
    return value


def _match(request: Request, current: str) -> None:
    """See that the writer has seen what is there now."""
    said = request.headers.get("if-match")
    if said is None:
        raise HTTPException(428, f"say with If-Match what you have seen; it is {current} now")
    if said.strip() != "*" and current not in [tag.strip() for tag in said.split(",")]:
        raise HTTPException(412, f"it is {current} now, and not {said[:80]}: read it again")


async def _write(
    request: Request,
    device: str,
    body: dict[str, Any],
    check: Callable[[Shadow], dict[PartName, int]],
) -> Shadow:
    from starlette.concurrency import run_in_threadpool

    return await run_in_threadpool(_write_now, request, device, body, check)


def _write_now(
    request: Request,
    device: str,
    body: dict[str, Any],
    check: Callable[[Shadow], dict[PartName, int]],
) -> Shadow:
    hub = request.app.state.hub
    seen = _found(request, device).shadow
    expected = check(seen)
    edits = [_edit(name, body[name], _now(request)) for name in ("desired", "tags") if name in body]
    try:
        shadow, changes = hub.twins.edit(device, edits, expected)
    except TwinConflictError as error:
        current = _shadow(_found(request, device).shadow, _now(request))
        status = 412 if "if-match" in request.headers else 409
        raise OutdatedError(status, str(error), current) from error
    if any(change.part == "desired" for change in changes):
        hub.wished(device)
    result: Shadow = shadow
    return result


def _edit(part: PartName, patch: Any, now: float) -> Edit:
    if part == "desired":
        try:
            check_wishes({k: v for k, v in check_patch(patch).items() if v is not None})
        except ProtocolError as error:
            raise TwinError(f"{error}: correct it") from error
    return Edit(writer="hub", part=part, patch=patch, actor="http", cause="patch", received_at=now)


def _tagged(request: Request, document: Any, tag: str) -> Response:
    seen = request.headers.get("if-none-match", "")
    if request.method == "GET" and tag in [each.strip() for each in seen.split(",")]:
        return Response(status_code=304, headers={"ETag": tag})
    return JSONResponse(document, headers={"ETag": tag})


def _in_short(row: TwinRow, now: float) -> dict[str, Any]:
    shadow = row.shadow
    is_there, away_s = presence(shadow, now)
    return {
        "device": shadow.device,
        "revision": shadow.revision,
        "state": shadow.reported.state.get("connection", {}).get("state", ""),
        "is_there": is_there,
        "away_s": away_s,
        "in_sync": is_in_sync(shadow),
        "weight": row.model.calibration.weight,
    }


def _whole(row: TwinRow, now: float) -> dict[str, Any]:
    return {**_shadow(row.shadow, now), "model": figures(row.model)}


def _shadow(shadow: Shadow, now: float) -> dict[str, Any]:
    return {
        "device": shadow.device,
        "revision": shadow.revision,
        "created_at": shadow.created_at,
        "modified_at": shadow.modified_at,
        "in_sync": is_in_sync(shadow),
        "desired": _part(shadow.desired),
        "reported": _part(shadow.reported),
        "tags": _part(shadow.tags),
        "delta": wanting(shadow),
        "freshness": staleness(shadow, now),
    }


def _part(part: Part) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(part)
    return found


def _forecast(row: ForecastRow) -> dict[str, Any]:
    said, trial = row.forecast, row.trial
    predicted = None
    if said is not None:
        predicted = {
            "finish_s": said.finish_s.median,
            "finish_s_10": said.finish_s.quantile(0.1),
            "finish_s_90": said.finish_s.quantile(0.9),
            "finishes_in_time": said.finishes_before(trial.work.deadline_s),
            "up_bytes": said.up_bytes,
            "down_bytes": said.down_bytes,
            "energy_j": said.energy_j,
        }
    return {
        "run": row.run,
        "round": row.round,
        "asked_at": row.asked_at,
        "deadline_s": trial.work.deadline_s,
        "outcome": row.outcome,
        "predicted": predicted,
        "observed": {"finish_s": trial.took_s, "up_bytes": trial.up_bytes or None},
    }
