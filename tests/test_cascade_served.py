"""The cascade over a real broker, with a real server of a real model; and its command."""

import random
import sys

import msgspec
import numpy as np
import pytest
import torch

import edge_agent.__main__
from edge_agent.asking import HubAsker
from edge_agent.cascade import NoAdvice
from edge_agent.cascade_config import CascadeConfig
from edge_agent.config import AgentConfig, read_agent_config
from edge_agent.durable import write_sealed
from federation.learning.export import export_onnx
from federation.learning.models import initial_weights
from federation.protocol.clock import steady_clock
from federation.protocol.messages import ModelSpec, Release
from federation.protocol.transfer import content_of
from moe_serving.checkpoint import load
from moe_serving.config import HttpConfig, MoeConfig, MqttConfig
from moe_serving.repository import open_version
from moe_serving.serving.server import MoeServer
from tests.moe_models import LABELS, publish_tiny

X = np.random.default_rng(3).standard_normal((6, 32, 3)).astype(np.float32)
STUDENT = ModelSpec(name="conv1d", sizes={"length": 32, "channels": 3, "filters": 4, "classes": 4})


@pytest.fixture
def server(tmp_path, broker):
    publish_tiny(tmp_path / "repository", "watch")
    config = MoeConfig(
        repository=tmp_path / "repository",
        http=HttpConfig(port=0),
        mqtt=MqttConfig(broker=broker.url),
    )
    served = MoeServer(config, clock=steady_clock(), rng=random.Random(1))
    served.start()
    assert served.gateway.wait_until_up(20)
    yield served
    served.close()


def asker(broker, folder, model="watch", datatype="FP32"):
    cascade = CascadeConfig(model=model, datatype=datatype)
    config = AgentConfig(device="w1", broker=broker.url, folder=folder, cascade=cascade)
    return HubAsker(config, cascade, password="", clock=steady_clock(), rng=random.Random(2))


@pytest.mark.usefixtures("server")
def test_the_hub_answers_what_its_model_says(broker, tmp_path):
    """Logits over the broker are the model's own; in 16 bits nearly so, for half the bytes."""
    model = load(open_version(tmp_path / "repository", "watch").folder)
    with asker(broker, tmp_path) as ask:
        assert ask.wait_until_up(20)
        exact = ask(X, 20.0)
    with asker(broker, tmp_path, datatype="FP16") as halved:
        assert halved.wait_until_up(20)
        near = halved(X, 20.0)

    expected = model(torch.from_numpy(X)).detach().numpy()
    np.testing.assert_allclose(exact.logits, expected, atol=1e-5)
    np.testing.assert_allclose(near.logits, expected, atol=0.02)
    assert (exact.labels, exact.version) == (LABELS, 1)
    assert exact.up_bytes - near.up_bytes == X.size * 2


@pytest.mark.usefixtures("server")
def test_what_the_hub_refuses_is_no_advice(broker, tmp_path):
    """An unknown model is said at once, and not waited for."""
    with asker(broker, tmp_path, model="ghost") as ask:
        assert ask.wait_until_up(20)
        said = ask(X, 20.0)

    assert isinstance(said, NoAdvice)
    assert said.reason.startswith("unknown")


def test_without_a_server_there_is_no_advice_by_the_deadline(broker, tmp_path):
    """A broker with nobody behind it costs the deadline; a link that is down costs nothing."""
    clock = steady_clock()
    with asker(broker, tmp_path) as ask:
        assert ask.wait_until_up(20)
        began = clock()
        said = ask(X, 0.2)
        took = clock() - began
    broker.stop()
    with asker(broker, tmp_path) as ask:
        down = ask(X, 20.0)

    assert said.reason == "no answer by the deadline"
    assert 0.2 <= took < 5.0
    assert down == NoAdvice("the link to the broker is down")


@pytest.fixture
def device(tmp_path, broker):
    """A device with a released model, unseen windows, and labelled ones to calibrate with."""
    folder = tmp_path / "device"
    (folder / "models").mkdir(parents=True)
    model = export_onnx(STUDENT, initial_weights(STUDENT, 1), example=X, labels=LABELS)
    content = content_of(model, 4096)
    (folder / "models" / f"{content.digest}.onnx").write_bytes(model)
    release = Release(run="r", round=1, content=content)
    write_sealed(folder / "release", msgspec.msgpack.encode(release))
    (tmp_path / "labelled").mkdir()
    np.savez(tmp_path / "labelled" / "a.npz", x=X, y=np.array([0, 1, 2, 3, 0, 1]))
    np.savez(tmp_path / "x.npz", x=X)
    (tmp_path / "agent.toml").write_text(
        f'device = "w1"\nbroker = "{broker.url}"\nfolder = "device"\n[cascade]\nmodel = "watch"\n'
        'share = 1.0\ncost = 0.0\nexplore = 1.0\ndeadline_s = 20.0\ncalibration = "labelled"\n'
    )
    return tmp_path


def predicted(folder, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        ["headwater-agent", "predict", str(folder / "agent.toml"), str(folder / "x.npz")],
    )
    with pytest.raises(SystemExit) as ended:
        edge_agent.__main__.main()
    said = capsys.readouterr()
    assert ended.value.code == 0
    return [line.split("\t") for line in said.out.splitlines()], said.err


def test_predict_asks_the_hub_as_agent_toml_says(server, device, monkeypatch, capsys):
    """Each line names who answered, and what was learned is kept; with no server it goes alone."""
    model = load(open_version(device / "repository", "watch").folder)

    lines, account = predicted(device, monkeypatch, capsys)

    assert [line[0] for line in lines] == [LABELS[c] for c in model(torch.from_numpy(X)).argmax(1)]
    assert [line[2] for line in lines] == ["hub"] * 6
    assert "6 windows, 6 asked (100.0 %), 0 unanswered" in account
    assert (device / "device" / "cascade").is_file()

    server.close()
    (device / "agent.toml").write_text((device / "agent.toml").read_text().replace("20.0", "0.2"))
    alone, account = predicted(device, monkeypatch, capsys)

    assert [line[2] for line in alone] == ["local"] * 6
    assert "6 unanswered" in account


def test_paths_of_the_cascade_are_relative_to_the_file(device):
    """`calibration` is found beside agent.toml, wherever the command is typed."""
    assert read_agent_config(device / "agent.toml").cascade.calibration == device / "labelled"
