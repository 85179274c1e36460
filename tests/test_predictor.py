import subprocess
import sys
import threading

import numpy as np
import onnx
import pytest
import torch

from edge_agent.inference import Predictor
from federation.errors import DataError, StoreError
from federation.learning.export import export_onnx
from federation.learning.models import build_model, initial_weights, load_weights
from federation.protocol.messages import ModelSpec

SPEC = ModelSpec(name="conv1d", sizes={"length": 20, "channels": 2, "filters": 4, "classes": 3})
X = np.random.default_rng(0).standard_normal((6, 20, 2)).astype(np.float32)


def write_model(path, seed, labels=("a", "b", "c")):
    path.write_bytes(export_onnx(SPEC, initial_weights(SPEC, seed), example=X, labels=labels))
    return path


def expected(seed, x=X):
    model = load_weights(build_model(SPEC), initial_weights(SPEC, seed))
    return model(torch.tensor(x)).detach().numpy()


def test_it_predicts_what_torch_would(tmp_path):
    """Logits, labels and shapes are those of the exported model."""
    predictor = Predictor(write_model(tmp_path / "m.onnx", 1))

    np.testing.assert_allclose(predictor.predict(X), expected(1), atol=1e-4)
    np.testing.assert_allclose(predictor.predict(X.reshape(6, -1)), expected(1), atol=1e-4)
    assert predictor.predict(X).dtype == np.float32
    assert predictor.labels == ("a", "b", "c")
    assert predictor.classify(X) == ["abc"[i] for i in expected(1).argmax(1)]


def test_classes_without_labels_are_numbers(tmp_path):
    """Where labels are not said, the class's number stands in."""
    predictor = Predictor(write_model(tmp_path / "m.onnx", 1, labels=()))

    assert predictor.labels == ()
    assert predictor.classify(X) == [str(i) for i in expected(1).argmax(1)]


def test_a_swap_is_atomic_under_concurrent_predictions(tmp_path):
    """Every prediction comes from one model or the other, none fails, none is mixed."""
    paths = [write_model(tmp_path / f"{seed}.onnx", seed) for seed in (1, 2)]
    predictor = Predictor(paths[0])
    answers = [predictor.predict(X).tobytes()]
    predictor.swap(paths[1])
    answers.append(predictor.predict(X).tobytes())
    seen, failures, done = [set(), set(), set()], [], threading.Event()

    def predict(mine):
        try:
            while not done.is_set():
                mine.add(predictor.predict(X).tobytes())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=predict, args=(mine,)) for mine in seen]
    for thread in threads:
        thread.start()
    for turn in range(40):
        predictor.swap(paths[turn % 2])
    done.set()
    for thread in threads:
        thread.join(30)

    assert failures == []
    assert set.union(*seen) <= set(answers)
    assert answers[0] != answers[1]


def test_a_file_replaced_on_disk_changes_nothing_until_the_swap(tmp_path):
    """The model in use does not depend on its file any more."""
    path = write_model(tmp_path / "m.onnx", 1)
    predictor = Predictor(path)

    path.write_bytes(b"gone")

    np.testing.assert_allclose(predictor.predict(X), expected(1), atol=1e-4)


@pytest.mark.parametrize("content", [None, b"", b"not a model", "torn"])
def test_a_bad_file_is_refused_and_the_old_model_stays(tmp_path, content):
    """An absent, empty, foreign or torn file raises StoreError; predictions go on."""
    good = write_model(tmp_path / "good.onnx", 1)
    predictor = Predictor(good)
    bad = tmp_path / "bad.onnx"
    if content is not None:
        bad.write_bytes(good.read_bytes()[:-400] if content == "torn" else content)

    with pytest.raises(StoreError, match=r"bad\.onnx"):
        predictor.swap(bad)
    with pytest.raises(StoreError, match=r"bad\.onnx"):
        Predictor(bad)

    np.testing.assert_allclose(predictor.predict(X), expected(1), atol=1e-4)


def test_a_model_of_other_makings_is_refused(tmp_path):
    """An ONNX file without x and logits is not ours."""
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 2])
        for name in ("speech", "words")
    ]
    node = onnx.helper.make_node("Relu", ["speech"], ["words"])
    graph = onnx.helper.make_graph([node], "other", ends[:1], ends[1:])
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    path = tmp_path / "other.onnx"
    path.write_bytes(model.SerializeToString())

    with pytest.raises(StoreError, match="expected x and logits"):
        Predictor(path)


@pytest.mark.parametrize("shape", [(), (3,), (0, 20, 2), (2, 5), (2, 2, 20), (1, 2, 20, 2)])
def test_samples_of_another_shape_are_refused(tmp_path, shape):
    """The refusal says what came and what the model takes."""
    predictor = Predictor(write_model(tmp_path / "m.onnx", 1))

    with pytest.raises(DataError, match=r"takes \(N, 20, 2\)"):
        predictor.predict(np.zeros(shape))


def test_inference_loads_no_torch(tmp_path):
    """A device that only infers never loads torch."""
    path = write_model(tmp_path / "m.onnx", 1)
    code = (
        "import sys, numpy as np; from edge_agent.inference import Predictor;"
        f"Predictor({str(path)!r}).predict(np.zeros((1, 20, 2)));"
        "print('torch' in sys.modules)"
    )

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "False"
