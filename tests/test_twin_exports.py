"""Twins in the words of others have the shape that those expect."""

import json
from datetime import datetime

import msgspec
import pytest

from twin.exports import FORMATS, aws_shadow, ditto_thing, thing_description
from twin.model import Trial, TwinModel, Work, learn
from twin.shadow import Edit, Shadow, write

NOW = 1_800_000_000.75


@pytest.fixture
def shadow() -> Shadow:
    made = Shadow(device="pump-1", created_at=NOW - 100, modified_at=NOW - 100)
    edits = [
        ("reported", {"hardware": {"cores": 4, "models": ["mlp"]}}),
        ("reported", {"settings": {"enabled": True, "heartbeat_s": 30.0}}),
        ("desired", {"enabled": False}),
        ("tags", {"hall": "b"}),
    ]
    for number, (part, patch) in enumerate(edits):
        edit = Edit(
            writer="device" if part == "reported" else "hub",
            part=part,
            patch=patch,
            actor="a",
            cause="c",
            received_at=NOW - 50 + number,
        )
        made, _ = write(made, edit)
    return made


@pytest.fixture
def model() -> TwinModel:
    work = Work(family="mlp()", epochs=1, deadline_s=9.0)
    seen = Trial(
        work=work,
        asked_at=0.0,
        is_cold=False,
        accepted_at=0.1,
        training_at=0.1,
        opened_at=1.0,
        received_at=1.0,
        samples=10,
        seconds=0.5,
    )
    return learn(TwinModel(), seen)


def test_the_aws_shadow_has_its_delta_and_its_times(shadow, model) -> None:
    """State has desired, reported and delta; metadata mirrors them with whole seconds."""
    document = aws_shadow(shadow, model, "fleet", NOW)

    assert document["state"]["delta"] == {"enabled": False}
    assert document["state"]["desired"] == {"enabled": False}
    assert document["metadata"]["reported"]["hardware"]["cores"] == {"timestamp": int(NOW - 50)}
    assert document["metadata"]["desired"]["enabled"] == {"timestamp": int(NOW - 48)}
    assert (document["version"], document["timestamp"]) == (4, int(NOW))


def test_the_ditto_thing_has_features(shadow, model) -> None:
    """Each feature has properties; wishes are the settings' desired properties."""
    thing = ditto_thing(shadow, model, "fleet", NOW)

    assert thing["thingId"] == thing["policyId"] == "fleet:pump-1"
    assert len(thing["definition"].split(":")) == 3
    assert thing["attributes"] == {"hall": "b"}
    assert all("properties" in feature for feature in thing["features"].values())
    assert thing["features"]["settings"]["desiredProperties"] == {"enabled": False}
    rate = thing["features"]["model"]["properties"]["seconds_per_sample"]["mlp()"]
    assert rate["median"] == pytest.approx(0.05)
    assert (rate["count"], rate["source"]) == (1, "inferred")
    assert datetime.fromisoformat(thing["_modified"]).timestamp() == pytest.approx(NOW - 47)


def test_the_thing_description_has_what_the_standard_demands(shadow, model) -> None:
    """Context, title, security and its definitions are there, and a form for each property."""
    td = thing_description(shadow, model, "fleet", NOW)

    assert td["@context"][0] == "https://www.w3.org/2022/wot/td/v1.1"
    assert td["title"] == "pump-1"
    assert set(td["security"]) <= td["securityDefinitions"].keys()
    for name, each in td["properties"].items():
        assert each["type"] in ("object", "array", "string", "number", "integer", "boolean")
        assert all(form["href"] and form["op"] for form in each["forms"])
        assert each.get("readOnly", False) is (name != "desired")
    cores = td["properties"]["hardware"]["properties"]["cores"]
    assert cores == {"type": "integer"}


@pytest.mark.parametrize("name", FORMATS)
def test_every_export_is_json(shadow, model, name) -> None:
    """A view is plain JSON, of a device about which nothing is known as well."""
    empty = Shadow(device="new", created_at=NOW, modified_at=NOW)

    for view in (
        FORMATS[name](shadow, model, "fleet", NOW),
        FORMATS[name](empty, TwinModel(), "fleet", NOW),
    ):
        assert json.loads(msgspec.json.encode(view)) == json.loads(json.dumps(view))
