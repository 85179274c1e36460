"""What of a run belongs to one device alone: its student, what it is taught, its mirrored data.

The model of a run whose models are personal holds them all, as `<device>/<tensor>`. A device that
has none of its own yet begins with the tensors that are nobody's.
"""

from federation.errors import CodecError, DataError
from federation.learning.layers import model_part
from federation.learning.mirroring import unpack_mirror
from federation.protocol.codec import Weights, decode


def own_base(weights: Weights, device: str) -> Weights:
    """What this device trains from: its student, and what a teacher says of its samples."""
    prefix = f"{device}/"
    own = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
    return own or model_part(weights)


def read_mirror(data: bytes) -> Weights:
    """The tensors of mirrored samples, checked.

    Raises:
        CodecError: they are no samples with labels.
    """
    try:
        unpack_mirror(data)
    except DataError as error:
        raise CodecError(str(error)) from error
    return decode(data)
