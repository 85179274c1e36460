"""Runs a hub or an agent that kills itself with SIGKILL at a phase, once.

`python crashing.py PHASE MARK MODULE ARGUMENT...`: MODULE is `cloud` or `edge_agent`. The
file MARK is written just before the kill; where it exists already, the process just runs. The
kill is real: no handler, no flush, no goodbye.
"""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from cloud.coordination import facts as hub_facts
from edge_agent import facts
from federation.protocol import messages as m

PHASE, MARK = sys.argv[1], Path(sys.argv[2])
counts: dict[str, int] = {}


def die_if(phase: str, at_count: int = 1) -> None:
    """Die if this is the phase, and its so-manyth time."""
    counts[phase] = counts.get(phase, 0) + 1
    if phase == PHASE and counts[phase] >= at_count and not MARK.exists():
        MARK.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def wrap(owner: Any, name: str, *, before: Any = None, after: Any = None) -> None:
    """Look at the calls of a method, before or after it does its work."""
    original = getattr(owner, name)

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        if before is not None:
            before(*arguments, **options)
        result = original(self, *arguments, **options)
        if after is not None:
            after(*arguments, **options)
        return result

    setattr(owner, name, watched)


def on_agent_event(event: Any, _now: float) -> None:
    if getattr(event, "share", 0.0) > 0.3:
        die_if("mid-training")


def watch_agent() -> None:
    from edge_agent.agent import Agent
    from edge_agent.journal import Journal
    from edge_agent.runner import AgentRunner
    from federation.protocol.mqtt import Mailbox

    def on_publish(_route: Any, payload: bytes) -> None:
        match m.unseal(payload).body:
            case m.BlobRequest():
                die_if("before-download")
            case m.UpdateChunk():
                die_if("mid-upload", 4)
            case _:
                pass

    def on_kept(fact: Any) -> None:
        if isinstance(fact, facts.ChunkKept):
            die_if("mid-download", 3)
        if isinstance(fact, facts.UpdateKept):
            die_if("before-upload")

    def on_letter(envelope: m.Envelope, _now: float) -> None:
        if isinstance(envelope.body, m.UpdateAck) and envelope.body.verdict == "stored":
            die_if("before-ack")

    wrap(Mailbox, "publish", before=on_publish)
    wrap(Journal, "record", after=on_kept)
    wrap(Agent, "on_message", before=on_letter)
    wrap(AgentRunner, "_react", before=on_agent_event)


def watch_hub() -> None:
    from cloud.coordination.run import ActiveRun
    from cloud.record.store import Store
    from cloud.runner import HubRunner

    def on_committed(recorded: list[Any], _registry: Any) -> None:
        kinds = {type(fact) for fact in recorded}
        if hub_facts.RoundOpened in kinds:
            die_if("round-open", 2)
        if hub_facts.UpdateAccepted in kinds:
            die_if("commit-ack")

    def on_performed(effects: list[Any], _arrived: Any) -> None:
        recorded = [getattr(effect, "fact", None) for effect in effects]
        if any(isinstance(fact, hub_facts.UpdateAccepted) for fact in recorded):
            die_if("mid-gathering")

    wrap(Store, "record", after=on_committed)
    wrap(HubRunner, "_perform", after=on_performed)
    wrap(ActiveRun, "close_round", before=lambda: die_if("mid-aggregation", 2))


module = sys.argv[3]
(watch_hub if module == "cloud" else watch_agent)()
sys.argv = [module, *sys.argv[4:]]
runpy.run_module(module, run_name="__main__", alter_sys=True)
