"""What the newest model says of samples in a file: `headwater-agent predict`."""

import logging
import random
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.calibration import fit_temperature, probabilities
from edge_agent.cascade import Cascade, CascadeState, Student
from edge_agent.cascade_config import CascadeConfig
from edge_agent.cascade_report import CascadeReport
from edge_agent.config import AgentConfig, password
from edge_agent.durable import peek_sealed, write_sealed
from edge_agent.journal import find_release
from federation.errors import DataError, StoreError
from federation.protocol.clock import steady_clock

if TYPE_CHECKING:
    from edge_agent.inference import Predictor

STATE_FILE = "cascade"
"""The file in the agent's folder that keeps what its cascade has learned."""

_log = logging.getLogger(__name__)


def predict_file(
    config: AgentConfig, file: Path, tell: Callable[[CascadeReport], object]
) -> Iterator[str]:
    """One line a sample of the array `x` in an `.npz`: its label, a tab, and its probability.

    With `[cascade]` a second tab and who answered follow: `local`, `hub` or `cache`; at the end
    `tell` is given the cascade's account. An agent may be running meanwhile.

    Raises:
        StoreError: no released model was fetched yet, or it cannot be loaded.
        DataError: a file that cannot be read, or samples of another shape than the model takes.
        ConfigError: a broker's certificate that is not there.
    """
    from edge_agent.inference import Predictor

    found = find_release(config.folder)
    if found is None:
        raise StoreError(
            f"no released model in {config.folder}; an agent with infers = true fetches one when "
            "the hub releases it: run the agent, and see that the run has [release] and evaluation"
        )
    predictor = Predictor(found[1])
    samples = _read_samples(file)
    if config.cascade is not None:
        state = _state(config.folder / STATE_FILE, found[0].content.digest)
        yield from _cascade(config, config.cascade, predictor, state, samples, tell)
        return
    for row in probabilities(predictor.predict(samples), 1.0):
        best = int(row.argmax())
        label = predictor.labels[best] if predictor.labels else str(best)
        yield f"{label}\t{row[best]:.3f}"


def _cascade(
    config: AgentConfig,
    settings: CascadeConfig,
    predictor: "Predictor",
    state: CascadeState,
    samples: NDArray[Any],
    tell: Callable[[CascadeReport], object],
) -> Iterator[str]:
    from edge_agent.asking import HubAsker

    clock, rng = steady_clock(), random.Random()  # noqa: S311 -- jitter, exploration
    student = _student(predictor, settings)
    kept = config.folder / STATE_FILE
    with ExitStack() as stack:
        asker = HubAsker(config, settings, password=password(), clock=clock, rng=rng)
        stack.enter_context(asker)
        if not asker.wait_until_up(settings.deadline_s):
            _log.warning("broker not reached url=%s; the device answers alone", config.broker)
        cascade = Cascade(student, asker, settings, state=state, clock=clock, rng=rng)
        stack.callback(
            lambda: write_sealed(kept, msgspec.msgpack.encode(cascade.state)),
        )
        windows = samples.astype(np.float32)
        for at in range(0, len(windows), settings.together):
            for each in cascade.answer(windows[at : at + settings.together]):
                yield f"{each.label}\t{each.probability:.3f}\t{each.source}"
        tell(cascade.report())


def _student(predictor: "Predictor", settings: CascadeConfig) -> Student:
    """The device's model, calibrated with labelled samples of this device where there are any."""
    if settings.calibration is None:
        return Student(predictor.predict, predictor.labels)
    from federation.learning.data import load_folder

    found = load_folder(settings.calibration)
    temperature = fit_temperature(predictor.predict(found.x), found.y)
    _log.info("calibrated temperature=%.3f samples=%d", temperature, found.samples)
    return Student(predictor.predict, predictor.labels, temperature, (found.x, found.y))


def _state(path: Path, model: str) -> CascadeState:
    """What an earlier start has learned; what it learned about another model is left behind."""
    try:
        state = msgspec.msgpack.decode(peek_sealed(path) or b"", type=CascadeState)
    except msgspec.DecodeError:
        return CascadeState(model=model)
    if state.model == model:
        return state
    return CascadeState(allowance=state.allowance, at=state.at, model=model)


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
