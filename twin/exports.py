"""A twin in the words of others: AWS IoT's shadow document, an Eclipse Ditto thing, a W3C thing.

They are views: what a format has no place for is left out, and nothing is read back from them.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from twin.merging import JsonObject
from twin.model import TwinModel
from twin.shadow import Leaf, Shadow, wanting

DEFINITION = "headwater:device:1.0.0"
"""Names the schema of a thing in Ditto's way: namespace, name and version."""

TD_CONTEXT = "https://www.w3.org/2022/wot/td/v1.1"

_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}


def aws_shadow(shadow: Shadow, _model: TwinModel, _namespace: str, now: float) -> JsonObject:
    """The document that `GetThingShadow` of AWS IoT Core would answer; times in whole seconds.

    Its delta holds what is desired and not in effect.
    """
    state: JsonObject = {"desired": shadow.desired.state, "reported": shadow.reported.state}
    if missing := wanting(shadow):
        state["delta"] = missing
    return {
        "state": state,
        "metadata": {
            name: _stamped(part.state, part.leaves)
            for name, part in (("desired", shadow.desired), ("reported", shadow.reported))
        },
        "version": shadow.revision,
        "timestamp": int(now),
    }


def ditto_thing(shadow: Shadow, model: TwinModel, namespace: str, _now: float) -> JsonObject:
    """The thing of Eclipse Ditto's API 2: tags as attributes, what was reported as features.

    What is desired of the device stands under `settings`, and what the hub estimates of it is a
    feature `model`.
    """
    features: JsonObject = {
        name: {"properties": value if isinstance(value, dict) else {"value": value}}
        for name, value in shadow.reported.state.items()
    }
    if shadow.desired.state:
        settings = features.setdefault("settings", {})
        settings["desiredProperties"] = shadow.desired.state
    features["model"] = {"properties": figures(model)}
    return {
        "thingId": f"{namespace}:{shadow.device}",
        "policyId": f"{namespace}:{shadow.device}",
        "definition": DEFINITION,
        "attributes": shadow.tags.state,
        "features": features,
        "_revision": shadow.revision,
        "_created": _iso(shadow.created_at),
        "_modified": _iso(shadow.modified_at),
    }


def thing_description(shadow: Shadow, _model: TwinModel, namespace: str, _now: float) -> JsonObject:
    """The W3C Thing Description 1.1: each reported feature can be read, wishes can be written.

    Its forms are relative to the address of the hub's HTTP API.
    """
    base = f"/api/v1/twins/{shadow.device}"
    properties: JsonObject = {
        name: {
            **_schema(value),
            "readOnly": True,
            "forms": [{"href": base, "op": ["readproperty"]}],
        }
        for name, value in shadow.reported.state.items()
    }
    properties["desired"] = {
        **_schema(shadow.desired.state),
        "forms": [
            {"href": f"{base}/desired", "op": ["readproperty"]},
            {
                "href": f"{base}/desired",
                "op": ["writeproperty"],
                "htv:methodName": "PATCH",
                "contentType": "application/merge-patch+json",
            },
        ],
    }
    return {
        "@context": [TD_CONTEXT, {"htv": "http://www.w3.org/2011/http#"}],
        "@type": "Thing",
        "id": f"urn:headwater:{namespace}:{shadow.device}",
        "title": shadow.device,
        "created": _iso(shadow.created_at),
        "modified": _iso(shadow.modified_at),
        "version": {"instance": str(shadow.revision)},
        "securityDefinitions": {"token": {"scheme": "bearer", "in": "header"}},
        "security": ["token"],
        "properties": properties,
    }


View = Callable[[Shadow, TwinModel, str, float], JsonObject]

FORMATS: Mapping[str, View] = MappingProxyType(
    {"aws": aws_shadow, "ditto": ditto_thing, "wot": thing_description}
)
"""The views by the names people ask for: (shadow, model, namespace, now) to a document."""


def figures(model: TwinModel) -> JsonObject:
    """What is estimated of a device as a plain document: medians, deviations and counts."""
    found: JsonObject = {}
    for name in ("delay_s", "down_bytes_per_s", "up_bytes_per_s", "beside_s", "start_s"):
        if (known := getattr(model, name)) is not None:
            found[name] = _figure(known)
    rates = model.seconds_per_sample
    if rates:
        found["seconds_per_sample"] = {family: _figure(known) for family, known in rates.items()}
    record = model.calibration
    return {
        **found,
        "samples": model.samples,
        "memory_mb": model.memory_mb,
        "outcomes": dict(model.outcomes),
        "completes": {"mean": model.completes.mean(), "count": model.completes.count},
        "streak": model.streak,
        "calibration": {
            "bias": record.bias,
            "median_error": record.median_error,
            "brier": record.brier,
            "base_brier": record.base_brier,
            "count": len(record.said),
            "weight": record.weight,
        },
    }


def _figure(known: Any) -> JsonObject:
    figure = known.figure
    return {
        "median": figure.median,
        "mean": figure.mean,
        "variance": figure.variance,
        "count": figure.count,
        "source": "inferred",
    }


def _stamped(state: JsonObject, leaves: Mapping[str, Leaf], above: str = "") -> JsonObject:
    """The same shape with the time of each leaf in its place."""
    stamped: JsonObject = {}
    for key, value in state.items():
        pointer = f"{above}/{key.replace('~', '~0').replace('/', '~1')}"
        if isinstance(value, dict) and value:
            stamped[key] = _stamped(value, leaves, pointer)
        elif pointer in leaves:
            stamped[key] = {"timestamp": int(leaves[pointer].at)}
    return stamped


def _schema(value: Any) -> JsonObject:
    if isinstance(value, dict):
        return {"type": "object", "properties": {key: _schema(each) for key, each in value.items()}}
    return {"type": _KINDS.get(type(value), "string")}


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
