"""Digital agents: what trains at a twin, in a device's place, from what the device mirrors.

An agent fulfils the very letter the device would get, from the same base, with the same loop:
exactly it gives the bits of the device, and many side by side the same to 1e-5.
"""

from collections.abc import Sequence
from dataclasses import replace

from federation.errors import HeadwaterError
from federation.learning.fulfilment import fulfil_all
from federation.learning.methods import method_named
from federation.protocol.effects import Trained
from federation.protocol.messages import Assignment, LocalPlan
from twin.mirror import MirrorStore


def why_not(mirrors: MirrorStore, device: str, plan: LocalPlan) -> str:
    """Why this device's agent may not train by this plan in its place; empty where it may.

    The owner must allow it, there must be data, and all that the update depends on must be
    here: what a method remembers on the device stays there.
    """
    if not mirrors.allows(device):
        return f"the owner of {device} allows no mirror"
    if device not in mirrors.devices:
        return f"{device} has mirrored no data yet"
    if not method_named(plan.method).stands_in:
        return f"method {plan.method!r} needs what only the device remembers"
    if plan.uplink.residual:
        return "the residual of earlier updates is on the device"
    return ""


class DigitalAgents:
    """The agents of all twins that mirror data. They remember nothing between trainings."""

    def __init__(
        self, mirrors: MirrorStore, *, accelerator: str = "auto", threads: int = 1
    ) -> None:
        self._mirrors = mirrors
        self._accelerator, self._threads = accelerator, threads

    def fulfil(
        self, jobs: Sequence[tuple[str, Assignment, bytes]], *, exact: bool = False
    ) -> list[Trained]:
        """What each of these devices would give for its assignment, in their order.

        A job that may not or cannot be done says why in its place, and the others never notice.

        Args:
            jobs: device, assignment and encoded base.
            exact: give the device's very bits; otherwise train side by side, to 1e-5 the same.

        Raises:
            ConfigError: an accelerator that is not there.
        """
        done: dict[int, Trained] = {}
        ready = []
        for place, (device, assignment, base) in enumerate(jobs):
            try:
                reason = why_not(self._mirrors, device, assignment.plan)
                if not reason:
                    ready.append((place, (assignment, base, self._mirrors.read(device), b"")))
            except HeadwaterError as error:
                reason = str(error)
            if reason:
                done[place] = Trained(assignment.attempt, failure=reason)
        found = fulfil_all(
            [job for _, job in ready],
            exact=exact,
            accelerator=self._accelerator,
            threads=self._threads,
        )
        for (place, _), trained in zip(ready, found, strict=True):
            # What a device would remember is not the twin's to keep.
            done[place] = replace(trained, memory=b"")
        return [done[place] for place in range(len(jobs))]
