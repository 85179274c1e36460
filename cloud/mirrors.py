"""Keeps what devices mirror apart from the record, as their owners allow it.

Called with each batch of facts before it is recorded: a mirror is on disk before its device hears
that it is, and a permission that was taken back has been obeyed before the birth that said so is
answered.
"""

import logging
from collections.abc import Iterable

from cloud.coordination.facts import DeviceBorn, HubFact, MirrorTaken
from federation.errors import CodecError, DataError
from twin.mirror import MirrorStore

_log = logging.getLogger("headwater.hub")


def follow(store: MirrorStore, facts: Iterable[HubFact]) -> None:
    """Allow, keep and delete as these facts say; again is as once.

    Raises:
        StoreError: the disk is full, read-only or broken.
    """
    for fact in facts:
        match fact:
            case DeviceBorn(device=device, capability=capability, at=at):
                if capability.mirrors:
                    store.allow(device, at)
                elif (gone := store.revoke(device, at)) is not None:
                    _log.info(
                        "mirror deleted device=%s digest=%s bytes=%d",
                        device,
                        gone.digest,
                        gone.size_bytes,
                    )
            case MirrorTaken(device=device, data=data, at=at):
                try:
                    store.put(device, data, at)
                except (CodecError, DataError) as error:
                    _log.warning("mirror refused device=%s: %s", device, error)
            case _:
                pass
