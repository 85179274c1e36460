"""Tensors that never leave this process, in the place of the bytes they would be sent as.

In a simulation device and hub share their memory: encoding an update on one side of a
function call, only to decode it on the other, is most of what a round without training costs.
"""

from collections.abc import Mapping
from typing import cast

import numpy as np
from numpy.typing import NDArray


class InPlace:
    """Stands in for an encoded update wherever nobody looks inside; as long as its encoding.

    What would look inside fails at once: it is no buffer, and cannot be sliced or hashed as
    one. `codec.decode` gives the tensors. They are shared, so leave them unchanged.
    """

    __slots__ = ("_size", "tensors")

    def __init__(self, tensors: Mapping[str, NDArray[np.float32]], size: int) -> None:
        self.tensors = dict(tensors)
        self._size = size

    def __len__(self) -> int:
        """How many bytes the encoding of these tensors has."""
        return self._size

    def as_bytes(self) -> bytes:
        """Itself, typed as what it stands in for."""
        return cast(bytes, self)
