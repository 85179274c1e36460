"""What the flags of `headwater-sim swarm` leave open: `swarm.toml`."""

from pathlib import Path
from typing import Literal

import msgspec

from federation.config import read_config
from federation.errors import ConfigError, ProtocolError
from federation.protocol.topics import check_name


class SwarmPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a swarm behaves, and what it asks the hub for.

    The trainer `echo` sends the base model back as it came; `real` trains on a share of the 8x8
    digits. A run that is asked for has updates of about `update_kb` kilobytes. Who drops out is
    away for about `away_s` seconds. After `patience_s` seconds a swarm that waits gives up, and
    one that only takes part leaves. `namespace` is the fleet's (empty: the hub's own).
    """

    trainer: Literal["echo", "real"] = "echo"
    update_kb: float = 100.0
    away_s: float = 1.0
    patience_s: float = 600.0
    keepalive_s: int = 30
    heartbeat_s: float = 30.0
    namespace: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "update_kb": (0.4, 1e6),
            "away_s": (0.0, 3600.0),
            "patience_s": (1.0, 7 * 24 * 3600.0),
            "keepalive_s": (5, 3600),
            "heartbeat_s": (1.0, 7 * 24 * 3600.0),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ConfigError(
                    f"{name} is {value}; it lies between {least:g} and {most:g}: correct it"
                )
        if self.namespace:
            try:
                check_name("namespace", self.namespace)
            except ProtocolError as error:
                raise ConfigError(str(error)) from error


def read_swarm_plan(path: Path | None) -> SwarmPlan:
    """The plan in a TOML file, or the usual one.

    Raises:
        ConfigError: absent, unreadable, an unknown key, a wrong type or a number out of range.
    """
    return SwarmPlan() if path is None else read_config(path, SwarmPlan)
