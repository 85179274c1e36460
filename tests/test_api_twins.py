"""The twins over HTTP: one real server on loopback, a real database behind it."""

import threading
from collections.abc import Iterator

import httpx
import pytest

from cloud.api.serving import serving_http
from cloud.config import HttpConfig, HubConfig
from cloud.record.registry import Registry
from cloud.record.store import Store
from cloud.twins.store import TwinStore
from federation.errors import ConfigError
from tests.histories import commit, send, with_open_round

NOW = 5000.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def served(folder) -> Iterator[tuple[httpx.Client, list[str]]]:
    """A client of a served API with the twins d1 and d2, and who was wished something of."""
    config = HubConfig(folder=folder, http=HttpConfig(port=0))
    store, twins = Store(config.database_url), TwinStore(config.database_url)
    history = with_open_round(store)
    history.mark("demo_1_d1", "training", "")
    send(history, "demo_1_d1")
    history.accept("demo_1_d1")
    history.present("d2", "lost")
    commit(store, history, Registry(folder))
    twins.follow()
    wished: list[str] = []
    with (
        serving_http(config, twins, wished=wished.append, clock=lambda: NOW) as url,
        httpx.Client(base_url=url) as client,
    ):
        yield client, wished
    twins.close()
    store.close()


@pytest.fixture
def client(served) -> httpx.Client:
    return served[0]


def patch(client, document, path="/api/v1/twins/d1", **headers):
    return client.patch(path, json=document, headers=headers)


def tag(client, path="/api/v1/twins/d1"):
    return client.get(path).headers["ETag"]


def test_twins_are_listed_by_page(client) -> None:
    """The list is in device order and says where the next page begins."""
    first = client.get("/api/v1/twins", params={"limit": 1}).json()
    second = client.get("/api/v1/twins", params={"after": first["next"]}).json()

    assert [each["device"] for each in first["twins"] + second["twins"]] == ["d1", "d2"]
    assert second["next"] is None
    assert [each["is_there"] for each in first["twins"] + second["twins"]] == [True, False]
    lost = client.get("/api/v1/twins", params={"state": "lost"}).json()
    assert [each["device"] for each in lost["twins"]] == ["d2"]


def test_a_twin_is_read_whole(client) -> None:
    """A twin has its documents with times of their leaves, its freshness and its model."""
    twin = client.get("/api/v1/twins/d1").json()

    assert twin["reported"]["state"]["hardware"]["agent"] == "agent of d1"
    assert twin["reported"]["leaves"]["/connection/state"]["source"] == "configured"
    assert twin["freshness"]["connection"] == "live"
    assert twin["model"]["outcomes"] == {"received": 1}
    unchanged = client.get("/api/v1/twins/d1", headers={"If-None-Match": tag(client)})
    assert unchanged.status_code == 304


def test_a_wish_is_written_by_who_has_seen_the_newest(served) -> None:
    """A patch without If-Match is 428, with an old one 412; the right one tells the hub."""
    client, wished = served
    path = "/api/v1/twins/d1/desired"
    seen = tag(client, path)

    assert patch(client, {"enabled": False}, path).status_code == 428
    written = patch(client, {"enabled": False}, path, **{"If-Match": seen})
    outdated = patch(client, {"enabled": True}, path, **{"If-Match": seen})

    assert (written.status_code, written.json()) == (200, {"enabled": False})
    assert outdated.status_code == 412
    assert wished[-1] == "d1"
    assert client.get("/api/v1/twins/d1").json()["delta"] == {"enabled": False}
    assert client.get("/api/v1/twins/d1").json()["in_sync"] is False


def test_a_version_in_the_body_conflicts_with_the_document(client) -> None:
    """An old version within the body is 409, and the answer has what is there now."""
    now = client.get("/api/v1/twins/d2").json()["desired"]["version"]

    good = patch(client, {"desired": {"heartbeat_s": 9}, "version": now}, "/api/v1/twins/d2")
    bad = patch(client, {"desired": {"heartbeat_s": 8}, "version": now}, "/api/v1/twins/d2")

    assert good.status_code == 200
    assert bad.status_code == 409
    assert bad.json()["current"]["desired"]["state"]["heartbeat_s"] == 9


def test_of_many_writers_one_wins(client) -> None:
    """Of writers that have seen the same version exactly one is heard."""
    seen, path, statuses = tag(client), "/api/v1/twins/d1", []

    def write(number: int) -> None:
        body = {"tags": {"owner": f"o{number}"}}
        answer = httpx.patch(f"{client.base_url}{path}", json=body, headers={"If-Match": seen})
        statuses.append(answer.status_code)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(5)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)

    assert sorted(statuses) == [200, 412, 412, 412, 412]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not JSON"),
        (b"[1]", "an object was expected"),
        (b'{"reported": {"a": 1}}', "reported cannot be written"),
        (b'{"desired": {"enabled": "yes"}}', "expected true or false"),
        (b'{"desired": {"allowed_hours": [25, 3]}}', "two hours from 0 to 24"),
        (b'{"desired": 5}', "an object was expected"),
        (b'{"desired": {"a": [null]}}', "null"),
        (b'{"desired": {"a": "\\u0000"}}', "NUL"),
        (b'{"desired": {"x": ' + b'"' + b"y" * 20_000 + b'"}}', "at most 16384"),
        (b'{"desired": {}, "version": true}', "whole number"),
        (b"[" * 3000, "not JSON"),
    ],
)
def test_bad_bodies_are_unprocessable(client, body, says) -> None:
    """A body that cannot be merged is 422 and says why; nothing is written."""
    before = tag(client)

    answer = client.patch("/api/v1/twins/d1", content=body, headers={"If-Match": "*"})

    assert answer.status_code == 422
    assert says in answer.json()["error"]
    assert tag(client) == before


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/v1/twins/nobody", 404),
        ("/api/v1/twins/nobody/history", 404),
        ("/api/v1/twins/d1?revision=99", 422),
        ("/api/v1/twins/d1?at=1", 422),
        ("/api/v1/twins/d1?revision=x", 422),
        (f"/api/v1/twins/d1?revision={10**30}", 422),
        ("/api/v1/twins/d1?at=nan", 422),
        (f"/api/v1/twins/d1/history?after={10**30}", 422),
        ("/api/v1/twins?limit=0", 422),
        ("/api/v1/twins/d1/export?format=xml", 422),
        ("/elsewhere", 404),
    ],
)
def test_bad_questions_are_answered_in_words(client, path, status) -> None:
    """Every failure is JSON with an error that a person understands."""
    answer = client.get(path)

    assert answer.status_code == status
    assert answer.json()["error"]


def test_too_large_a_body_is_not_read(client) -> None:
    """A body beyond the limit is 413."""
    assert client.patch("/api/v1/twins/d1", content=b" " * 70_000).status_code == 413


def test_the_past_can_be_read(client) -> None:
    """The history names who changed what, and a shadow can be read at any of its revisions."""
    changes = client.get("/api/v1/twins/d2/history").json()["changes"]
    past = client.get("/api/v1/twins/d2", params={"revision": 1}).json()

    assert changes[0]["actor"] == "d2"
    assert past["reported"]["state"]["connection"]["state"] == "ready"
    assert [change["revision"] for change in changes] == list(range(1, len(changes) + 1))


def test_forecasts_are_shown_with_what_came(client) -> None:
    """A device's parts are listed with what was predicted and what was observed."""
    (row,) = client.get("/api/v1/twins/d1/forecasts").json()["forecasts"]

    assert (row["outcome"], row["run"]) == ("received", "demo")
    assert row["observed"]["finish_s"] > 0
    assert row["predicted"] is None  # Nobody had trained such a model before.


def test_health_and_metrics(client) -> None:
    """The hub's health and figures for Prometheus are served beside the API."""
    assert client.get("/health").json() == {"status": "ok", "twins": 2}
    text = client.get("/metrics").text
    assert "headwater_devices 2.0" in text
    assert 'headwater_parts{outcome="received"} 1.0' in text


def test_a_token_is_required_where_one_is_set(tmp_path, monkeypatch) -> None:
    """With a token only who bears it is let in, to all but health; others need one to be set."""
    monkeypatch.setenv("HEADWATER_TOKEN", "secret")
    config = HubConfig(folder=tmp_path, http=HttpConfig(port=0))
    twins = TwinStore(config.database_url)
    with serving_http(config, twins, wished=lambda _: None, clock=lambda: NOW) as url:
        wrong = httpx.get(f"{url}/api/v1/twins", headers={"Authorization": "Bearer other"})
        none = httpx.get(f"{url}/metrics")
        right = httpx.get(f"{url}/api/v1/twins", headers={"Authorization": "Bearer secret"})
        health = httpx.get(f"{url}/health")

    assert [each.status_code for each in (wrong, none, right, health)] == [401, 401, 200, 200]
    assert "token" in wrong.json()["error"]
    monkeypatch.delenv("HEADWATER_TOKEN")
    open_to_all = HubConfig(folder=tmp_path, http=HttpConfig(host="0.0.0.0", port=0))
    with (
        pytest.raises(ConfigError, match="HEADWATER_TOKEN"),
        serving_http(open_to_all, twins, wished=lambda _: None, clock=lambda: NOW),
    ):
        pass
    twins.close()


def test_a_port_in_use_is_said(tmp_path) -> None:
    """Where another program listens, the hub says so and what to do."""
    config = HubConfig(folder=tmp_path, http=HttpConfig(port=0))
    twins = TwinStore(config.database_url)
    with serving_http(config, twins, wished=lambda _: None, clock=lambda: NOW) as url:
        taken = HubConfig(folder=tmp_path, http=HttpConfig(port=int(url.rsplit(":", 1)[1])))
        with (
            pytest.raises(ConfigError, match="cannot be listened on"),
            serving_http(taken, twins, wished=lambda _: None, clock=lambda: NOW),
        ):
            pass
    twins.close()
