"""The errors Headwater raises on purpose.

```
HeadwaterError
├── ProtocolError     a letter, a topic or a version that may not be acted upon
│   ├── CodecError    bytes that are not the tensors they should be
│   └── TransferError chunks that do not add up to their content
├── ConfigError       a TOML file, an option or a data folder that cannot be used
├── LinkError         a broker that cannot be reached, refuses, or cannot be started
├── StoreError        a database or a model file that cannot be read or written
├── TrainingError     local training that cannot begin or go on
├── DataError         a data set that is absent, damaged or of another shape
├── PlanError         no plan can be made
│   ├── InvalidProblem    the fleet's description has faults, all of them named
│   └── Infeasible        no plan keeps every rule; says which one, and by how much
└── TwinError         a twin that is not known, or may not be read or written so
    └── TwinConflictError   somebody else has written it in between
```

A message holds the fact, the expectation and the remedy. Commands print it as one line and
exit with 2; a traceback on a user's screen is a bug.
"""

from collections.abc import Sequence


class HeadwaterError(Exception):
    """Anything Headwater raises on purpose."""


class ProtocolError(HeadwaterError):
    """A letter, topic or version that may not be acted upon."""


class CodecError(ProtocolError):
    """Bytes that are not the tensors they should be."""


class TransferError(ProtocolError):
    """Chunks that do not add up to their content."""


class ConfigError(HeadwaterError):
    """A configuration that cannot be used."""


class LinkError(HeadwaterError):
    """A broker that cannot be reached, refuses us, or cannot be started."""


class StoreError(HeadwaterError):
    """A database or model file that cannot be read or written."""


class TrainingError(HeadwaterError):
    """Local training that cannot begin or go on."""


class PlanError(HeadwaterError):
    """A plan that cannot be made."""


class InvalidProblem(PlanError):  # noqa: N818 - it is the problem that is at fault, not we
    """A fleet's description with faults; `faults` names all of them."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(self.faults))


class Infeasible(PlanError):  # noqa: N818 - a verdict
    """No plan keeps every rule. The message names the rule and the least relaxation known."""


class DataError(HeadwaterError):
    """A data set that is absent, damaged or of another shape."""


class TwinError(HeadwaterError):
    """A twin that is not known, or may not be read or written so."""


class TwinConflictError(TwinError):
    """A twin that somebody else has written in between."""
