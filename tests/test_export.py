import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from federation.errors import TrainingError
from federation.learning import export
from federation.learning.export import export_onnx
from federation.learning.models import (
    MODELS,
    build_model,
    initial_weights,
    input_shape,
    load_weights,
    sizes_of,
)
from federation.protocol.messages import ModelSpec


def example(spec, count=5, seed=0):
    shape = (count, *input_shape(spec))
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_an_exported_model_computes_what_torch_computes(name, capfd):
    """For every model and any batch size, logits agree; nothing is printed or warned."""
    spec = ModelSpec(name=name)
    weights = initial_weights(spec, 3)

    content = export_onnx(spec, weights, example=example(spec))

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    model = load_weights(build_model(spec), weights)
    assert [i.name for i in session.get_inputs()] == ["x"]
    assert [o.name for o in session.get_outputs()] == ["logits"]
    for count in (1, 2, 33):
        x = example(spec, count, seed=count)
        expected = model(torch.tensor(x)).detach().numpy()
        logits = session.run(["logits"], {"x": x})[0]
        assert logits.shape == (count, sizes_of(spec)["classes"])
        np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert capfd.readouterr() == ("", "")


def test_labels_travel_in_the_file():
    """The labels are in the model's metadata, in order."""
    spec = ModelSpec(name="mlp", sizes={"inputs": 4, "classes": 2})

    content = export_onnx(
        spec, initial_weights(spec, 0), example=example(spec), labels=["läuft", "steht"]
    )

    properties = {p.key: p.value for p in onnx.load_from_string(content).metadata_props}
    assert json.loads(properties["labels"]) == ["läuft", "steht"]


def test_the_same_weights_give_the_same_file():
    """Exporting twice gives identical bytes, so a release has one digest."""
    spec = ModelSpec(name="conv1d")
    weights = initial_weights(spec, 3)

    one, other = (export_onnx(spec, weights, example=example(spec)) for _ in range(2))

    assert one == other


def test_flat_examples_will_do():
    """An example of flat rows exports the same file as one in shape."""
    spec = ModelSpec(name="conv1d")
    weights, x = initial_weights(spec, 3), example(spec)

    assert export_onnx(spec, weights, example=x.reshape(5, -1)) == export_onnx(
        spec, weights, example=x
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"example": np.zeros((0, 64))}, "one sample or more"),
        ({"example": np.zeros((3, 5))}, r"\(3, 5\)"),
        ({"labels": ["only"]}, "1 labels for 10 classes"),
        ({"weights": {"w": np.zeros(1, np.float32)}}, "same model"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    """A misfitting example, label list or set of weights is named."""
    spec = ModelSpec(name="mlp")
    given = {"weights": initial_weights(spec, 0), "example": np.zeros((2, 64))} | change

    with pytest.raises(TrainingError, match=words):
        export_onnx(spec, given.pop("weights"), **given)


def test_a_file_that_computes_something_else_is_not_released(monkeypatch):
    """When the exported graph and torch disagree, there is no file but an error."""
    spec = ModelSpec(name="linear")
    trace = export._trace

    def spoilt(model, samples):
        with torch.no_grad():
            model.classifier.bias += 0.01
        return trace(model, samples)

    monkeypatch.setattr(export, "_trace", spoilt)

    with pytest.raises(TrainingError, match=r"differ by 0\.01"):
        export_onnx(spec, initial_weights(spec, 0), example=example(spec))
