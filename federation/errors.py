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
└── DataError         a data set that is absent, damaged or of another shape
```

A message holds the fact, the expectation and the remedy. Commands print it as one line and
exit with 2; a traceback on a user's screen is a bug.
"""


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


class DataError(HeadwaterError):
    """A data set that is absent, damaged or of another shape."""
