"""What the newest model says of samples in a file: `headwater-agent predict`."""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.config import AgentConfig
from edge_agent.journal import find_release
from federation.errors import DataError, StoreError


def predict_file(config: AgentConfig, file: Path) -> Iterator[str]:
    """One line a sample of the array `x` in an `.npz`: its label, a tab, and its probability.

    An agent may be running meanwhile.

    Raises:
        StoreError: no released model was fetched yet, or it cannot be loaded.
        DataError: a file that cannot be read, or samples of another shape than the model takes.
    """
    from edge_agent.inference import Predictor

    found = find_release(config.folder)
    if found is None:
        raise StoreError(
            f"no released model in {config.folder}; an agent with infers = true fetches one when "
            "the hub releases it: run the agent, and see that the run has [release] and evaluation"
        )
    predictor = Predictor(found[1])
    probabilities = _softmax(predictor.predict(_read_samples(file)))
    for row in probabilities:
        best = int(row.argmax())
        label = predictor.labels[best] if predictor.labels else str(best)
        yield f"{label}\t{row[best]:.3f}"


def _read_samples(file: Path) -> NDArray[Any]:
    try:
        with file.open("rb") as content:
            arrays = np.load(content, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile) or "x" not in arrays.files:
                raise DataError(f"{file} has no array 'x'; expected an .npz with x: save it so")
            samples: NDArray[Any] = arrays["x"]
    except OSError as error:
        raise DataError(
            f"cannot read {file} ({error.strerror or error}); expected an .npz with the array x: "
            "correct the path"
        ) from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{file} is not a readable .npz ({error}); expected the array x: write it again"
        ) from error
    if samples.dtype.kind not in "buif":
        raise DataError(f"x in {file} is of {samples.dtype}; expected numbers: save it so")
    return samples


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    grown = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float32] = grown / grown.sum(axis=1, keepdims=True)
    return shares
