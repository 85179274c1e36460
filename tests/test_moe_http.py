"""Models over HTTP: a real server on loopback, asked rightly and wrongly."""

import json
import math
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from federation.errors import ConfigError
from federation.protocol.clock import steady_clock
from moe_serving.config import HttpConfig, ModelConfig, MoeConfig
from moe_serving.serving.server import MoeServer
from tests.moe_models import ABOUT, LABELS, offline_logprobs, publish_tiny

TEXT = "It is no small thing to serve a text whole: æøå, 森林, and a bit of noise."
ZEROS = {"name": "windows", "shape": [1, 32, 3], "datatype": "FP32", "data": [0.0] * 96}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One version of each of the three."""
    folder = tmp_path_factory.mktemp("moe") / "repository"
    for name in ABOUT:
        publish_tiny(folder, name)
    return folder


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[MoeServer]:
    """A server over all three, in this process."""
    few = ModelConfig(slots=4, rows=32, target_wait_s=3600.0)
    config = MoeConfig(
        repository=repository,
        http=HttpConfig(port=0, body_mb=1.0, client_header="x-client"),
        models={"poet": few, "interpreter": few, "watch": ModelConfig()},
    )
    served = MoeServer(config, admin_token="key", clock=steady_clock(), rng=random.Random(1))
    served.start()
    yield served
    assert served.close() == 0


@pytest.fixture
def client(server: MoeServer) -> Iterator[httpx.Client]:
    """A client of its own connection."""
    with httpx.Client(base_url=server.url, timeout=30.0) as made:
        yield made


def complete(client: httpx.Client, **body: Any) -> httpx.Response:
    """Ask the language model."""
    return client.post("/v1/completions", json={"model": "poet", "prompt": "a", **body})


def classify(client: httpx.Client, tensor: dict[str, Any], **more: Any) -> httpx.Response:
    """Ask the classifier."""
    return client.post("/v2/models/watch/infer", json={"inputs": [tensor], **more})


def test_perplexity_over_http_is_that_of_the_model(client: httpx.Client, repository: Path) -> None:
    """From echoed log-probabilities, by completions and by the protocol: equal to 1e-4."""
    tokens = [byte + 3 for byte in TEXT.encode()]
    offline = -np.mean(offline_logprobs(repository / "poet" / "1", tokens))

    answer = complete(client, prompt=TEXT, max_tokens=0, echo=True, logprobs=0).json()
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [TEXT]}
    wanted = {"max_tokens": 0, "echo": True, "logprobs": True}
    body = {"inputs": [tensor], "parameters": wanted, "outputs": [{"name": "logprobs"}]}
    told = client.post("/v2/models/poet/infer", json=body).json()["outputs"]

    logprobs = answer["choices"][0]["logprobs"]
    served = -np.mean(logprobs["token_logprobs"][1:])
    assert answer["choices"][0]["text"] == TEXT
    assert math.exp(served) == pytest.approx(math.exp(offline), abs=1e-4)
    assert math.exp(-np.mean(told[0]["data"])) == pytest.approx(math.exp(offline), abs=1e-4)
    assert answer["usage"] == {
        "prompt_tokens": len(tokens),
        "completion_tokens": 0,
        "total_tokens": len(tokens),
    }


def test_a_stream_holds_the_same_answer_as_the_whole(client: httpx.Client) -> None:
    """Server-sent events give text, log-probabilities, the finish, the usage, and then [DONE]."""
    asked = {"prompt": TEXT, "max_tokens": 9, "seed": 3, "logprobs": 1}
    whole = complete(client, **asked).json()

    streamed = complete(client, stream=True, stream_options={"include_usage": True}, **asked)

    lines = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
    events = [json.loads(line) for line in lines[:-1]]
    choices = [event["choices"][0] for event in events[:-1]]
    assert lines[-1] == "[DONE]"
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert "".join(c["text"] for c in choices) == whole["choices"][0]["text"]
    for name in ("token_ids", "token_logprobs", "text_offset"):
        together = [value for c in choices for value in c["logprobs"][name]]
        assert together == whole["choices"][0]["logprobs"][name]
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]
    assert events[-1]["usage"] == whole["usage"]


def test_every_kind_of_model_is_described_and_answers(client: httpx.Client) -> None:
    """Metadata, readiness and inference of the three, by name and by version."""
    for name in ABOUT:
        described = client.get(f"/v2/models/{name}/versions/1").json()
        assert (described["name"], described["versions"]) == (name, ["1"])
        assert client.get(f"/v2/models/{name}/ready").json() == {"name": name, "ready": True}
    classified = classify(client, ZEROS, id="q7").json()
    source = {"name": "tokens", "shape": [3], "datatype": "INT64", "data": [70, 80, 90]}
    translated = client.post(
        "/v2/models/interpreter/versions/1/infer",
        json={"inputs": [source], "parameters": {"max_tokens": 4, "logprobs": True}},
    ).json()

    assert (classified["id"], classified["model_version"]) == ("q7", "1")
    assert [each["name"] for each in classified["outputs"]] == ["logits", "label"]
    assert classified["outputs"][0]["shape"] == [1, len(LABELS)]
    assert classified["outputs"][1]["data"][0] in LABELS
    assert [each["name"] for each in translated["outputs"]] == ["text", "tokens", "logprobs"]
    models = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["poet"]


BAD = {
    "garbage": ("/v1/completions", b"{nope", 400, "not JSON"),
    "garbage to the protocol": ("/v2/models/watch/infer", b"\xff\xfe", 400, "not JSON"),
    "deep": ("/v2/models/watch/infer", b"[" * 200_000, 400, "parsing"),
    "no prompt": ("/v1/completions", {"model": "poet"}, 422, "prompt"),
    "long": ("/v1/completions", {"model": "poet", "prompt": "a" * 300}, 422, "prompt"),
    "empty": ("/v1/completions", {"model": "poet", "prompt": ""}, 422, "empty"),
    "token": ("/v1/completions", {"model": "poet", "prompt": [259]}, 422, "outside"),
    "unknown": ("/v1/completions", {"model": "sage", "prompt": "a"}, 404, "no model sage"),
    "no lm": ("/v1/completions", {"model": "watch", "prompt": "a"}, 422, "language model"),
    "two": ("/v1/completions", {"model": "poet", "prompt": "a", "n": 2}, 422, "n:"),
    "other": ("/v1/completions", {"model": "poet", "prompt": "a", "best": 2}, 422, "best"),
    "late": ("/v1/completions", {"model": "poet", "prompt": "a", "deadline_s": 0}, 504, "deadline"),
    "no time": (
        "/v1/completions", b'{"model": "poet", "prompt": "a", "deadline_s": NaN}', 422, "finite",
    ),
    "version": ("/v2/models/watch/versions/9/infer", {"inputs": [ZEROS]}, 404, "watch (9)"),
    "name": ("/v2/models/watch/infer", {"inputs": [ZEROS | {"name": "x"}]}, 422, "[0].name"),
    "shape": ("/v2/models/watch/infer", {"inputs": [ZEROS | {"shape": [1, 3, 32]}]}, 422, "shape"),
    "endless": (
        "/v2/models/watch/infer",
        {"inputs": [ZEROS | {"shape": [4_000_000] * 8, "data": []}]},
        422,
        "shape",
    ),
    "nothing": (
        "/v2/models/watch/infer",
        {"inputs": [ZEROS | {"shape": [0, 4_000_000, 4_000_000, 4_000_000], "data": []}]},
        422,
        "shape",
    ),
    "short": ("/v2/models/watch/infer", {"inputs": [ZEROS | {"data": [1.0]}]}, 422, "shape"),
    "ragged": ("/v2/models/watch/infer", {"inputs": [ZEROS | {"data": [[1], 2]}]}, 422, "data"),
    "words": ("/v2/models/watch/infer", {"inputs": [ZEROS | {"data": ["x"] * 96}]}, 422, "data"),
    "parameter": (
        "/v2/models/watch/infer", {"inputs": [ZEROS], "parameters": {"x": 1}}, 422, "parameters.x",
    ),
    "output": (
        "/v2/models/watch/infer", {"inputs": [ZEROS], "outputs": [{"name": "x"}]}, 422, "outputs",
    ),
    "NaN": (
        "/v2/models/watch/infer",
        json.dumps({"inputs": [ZEROS | {"data": [math.nan] * 96}]}).encode(), 422, "data",
    ),
    "large": ("/v2/models/watch/infer", b" " * 100_000_000, 413, "larger"),
    "nowhere": ("/v3", {}, 404, "Not Found"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(BAD))
def test_bad_input_has_a_clear_status_and_the_server_lives(what: str, client: httpx.Client) -> None:
    """Each mistake is answered with its status and a reason; the next request is served."""
    path, body, status, word = BAD[what]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    answer = client.post(path, content=content)

    error = answer.json()["error"]
    assert answer.status_code == status
    assert word in (error if path.startswith(("/v2", "/v3")) else error["message"])
    assert "Traceback" not in answer.text
    assert complete(client, max_tokens=1).status_code == 200


def test_a_body_that_never_says_its_size_is_cut_off(client: httpx.Client) -> None:
    """A chunked body is refused with 413 as soon as it is too large."""
    answer = client.post("/v1/completions", content=(b" " * 100_000 for _ in range(40)))

    assert answer.status_code == 413


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_costs_no_more_work(
    client: httpx.Client, server: MoeServer, *, stream: bool
) -> None:
    """Whether it waits for the whole or a stream, its request ends as cancelled and is counted."""
    body = {"model": "poet", "prompt": "a", "max_tokens": 250, "stream": stream}
    text = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(text)
    before = counted(client, "cancelled")
    address = (server.url.split("/")[2].split(":")[0], int(server.url.rpartition(":")[2]))

    for _ in range(4):
        with socket.create_connection(address) as link:
            link.sendall(head + text)
            wait_until(lambda: any(h.engine.unfinished for h in server.host.hosted()))

    wait_until(lambda: counted(client, "cancelled") > before)
    wait_until(lambda: not any(h.engine.unfinished for h in server.host.hosted()))
    assert complete(client, max_tokens=1).status_code == 200


def counted(client: httpx.Client, outcome: str) -> float:
    """How many requests of the language model ended so, by /metrics."""
    start = f'headwater_moe_requests_total{{model="poet",outcome="{outcome}",version="1"}} '
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.removeprefix(start)) for line in lines if line.startswith(start))


def wait_until(is_so: Any) -> None:
    """Until a condition holds, at most 20 s."""
    until = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.005)


def test_the_repository_is_for_operators_only(client: httpx.Client) -> None:
    """Index, load and unload need their token; without it 401, and what fails says why."""
    key = {"authorization": "Bearer key"}
    assert client.post("/v2/repository/index").status_code == 401
    assert client.post("/v2/repository/models/watch/unload").status_code == 401

    unloaded = client.post("/v2/repository/models/watch/unload", headers=key)
    gone = classify(client, ZEROS)
    index = client.post("/v2/repository/index", headers=key).json()
    loaded = client.post("/v2/repository/models/watch/load", headers=key).json()
    failed = client.post("/v2/repository/models/watch/load", headers=key, json={"version": 7})

    assert (unloaded.status_code, gone.status_code) == (200, 404)
    assert {
        "name": "watch",
        "version": "1",
        "state": "UNAVAILABLE",
        "reason": "not loaded",
    } in index
    assert loaded == {"name": "watch", "version": "1", "state": "READY"}
    assert failed.status_code == 409
    assert "no version 7" in failed.json()["error"]
    assert classify(client, ZEROS).status_code == 200


def test_under_twice_the_load_every_client_gets_one_status(repository: Path) -> None:
    """Forty clients at once: 200, 429 or 503 with Retry-After, in time; then the server drains."""
    tight = ModelConfig(slots=4, rows=32, target_wait_s=0.1, deadline_s=10.0)
    http = HttpConfig(port=0, client_header="x-client")
    config = MoeConfig(repository=repository, http=http, models={"poet": tight})
    server = MoeServer(config, clock=steady_clock(), rng=random.Random(1))
    server.start()

    def ask(n: int) -> tuple[int, str]:
        body = {"model": "poet", "prompt": "ab" * (n % 20 + 1), "max_tokens": 8}
        answer = client.post("/v1/completions", json=body, headers={"x-client": f"c{n % 10}"})
        return answer.status_code, answer.headers.get("retry-after", "")

    with (
        ThreadPoolExecutor(40) as pool,
        httpx.Client(base_url=server.url, timeout=30.0) as client,
    ):
        statuses = list(pool.map(ask, range(80)))
    draining = threading.Thread(target=server.close)
    draining.start()
    draining.join(20)

    assert len(statuses) == 80
    assert {code for code, _ in statuses} <= {200, 429, 503}
    assert {code for code, _ in statuses} > {200}
    assert all(int(retry) >= 1 for code, retry in statuses if code != 200)
    assert not draining.is_alive()


def test_a_draining_server_is_not_ready_and_says_so(repository: Path) -> None:
    """Ready turns 503, requests are refused with 503 and Retry-After, what runs is finished."""
    models = {"poet": ModelConfig(slots=2, target_wait_s=3600.0)}
    config = MoeConfig(repository=repository, http=HttpConfig(port=0), models=models)
    server = MoeServer(config, clock=steady_clock(), rng=random.Random(1))
    server.start()
    with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=server.url, timeout=30.0) as client:
        long = [pool.submit(complete, client, prompt="a", max_tokens=120) for _ in range(4)]
        wait_until(lambda: server.host.find("poet").engine.unfinished == 4)
        closing = pool.submit(server.close)
        wait_until(lambda: server.host.is_draining)
        try:
            ready, late = client.get("/v2/health/ready"), complete(client)
        except httpx.ConnectError:
            pytest.skip("it drained before it could be asked")

        assert closing.result(30) == 0
        assert {each.result().status_code for each in long} == {200}
        assert (ready.status_code, late.status_code) == (503, 503)
        assert int(late.headers["retry-after"]) >= 1


def test_an_address_that_is_taken_is_said_to_be(server: MoeServer, repository: Path) -> None:
    """A second server on the same port does not start, and names the port."""
    port = int(server.url.rpartition(":")[2])
    config = MoeConfig(repository=repository, http=HttpConfig(port=port))

    with pytest.raises(ConfigError, match=f"port {port}"):
        MoeServer(config, clock=steady_clock(), rng=random.Random(1)).start()
