"""The table `[cascade]` of `agent.toml`: when a device asks the hub's model beside its own."""

from pathlib import Path
from typing import Literal

import msgspec

from federation.errors import ConfigError, ProtocolError
from federation.protocol.topics import check_name


class CascadeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model of the hub is asked, how often, and how long its answer is waited for.

    Attributes:
        model: the name under which the hub serves it.
        share: at most this share of the windows goes up (0 to 1).
        cost: what asking costs, in right answers: it is not done where it is less likely than
            this to change the answer.
        explore: share of the windows asked about although the device is sure, so that it learns
            when that is no longer justified.
        deadline_s: after this the device's own answer stands.
        bytes_per_hour: how much may be sent up; a quarter of it at once (0: no bound).
        together: up to so many windows of one call travel in one letter.
        datatype: how numbers travel; FP16 is half as long.
        cached: how many of the hub's answers are remembered.
        calibration: a folder of labelled samples, as `data.folder`, that the device's model was
            not trained on; its confidence is calibrated with them (None: taken as it is).
        corrects: whether the hub's answers teach the device to correct its own model.
    """

    model: str
    share: float = 0.3
    cost: float = 0.02
    explore: float = 0.02
    deadline_s: float = 2.0
    bytes_per_hour: int = 0
    together: int = 16
    datatype: Literal["FP16", "FP32"] = "FP16"
    cached: int = 1024
    calibration: Path | None = None
    corrects: bool = True

    def __post_init__(self) -> None:
        try:
            check_name("cascade.model", self.model)
        except ProtocolError as error:
            raise ConfigError(str(error)) from error
        for name, least, most in (
            ("share", 0.0, 1.0),
            ("cost", 0.0, 1.0),
            ("explore", 0.0, 1.0),
            ("deadline_s", 0.01, 3600.0),
            ("bytes_per_hour", 0, 10**12),
            ("together", 1, 1024),
            ("cached", 0, 10**6),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ConfigError(
                    f"cascade.{name} is {value:g}; it lies between {least:g} and {most:g}: "
                    "correct it"
                )
