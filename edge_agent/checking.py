"""Sees, before a device is left alone, whether its configuration will do."""

import dataclasses
import os
import queue
import random
from collections.abc import Iterator

from edge_agent.config import AgentConfig, password
from federation.errors import LinkError
from federation.protocol.effects import Link
from federation.protocol.link import Arrived, MailboxConfig
from federation.protocol.messages import Presence, seal
from federation.protocol.mqtt import Mailbox
from federation.protocol.topics import Route, route

PATIENCE_S = 10.0


def check_agent(config: AgentConfig) -> Iterator[str]:
    """One line for each thing that is in order.

    Raises:
        ConfigError, DataError: the data cannot be used.
        LinkError: the broker cannot be reached or refuses us.
    """
    yield f"configuration of {config.device} is in order"
    if config.data is not None:
        yield _check_data(config)
    yield _check_link(config)


def _check_data(config: AgentConfig) -> str:
    from federation.learning.data import load_entry, load_folder

    if config.data is None:
        return "no data: this device only infers"
    folder, entry = config.data.folder, config.data.entry
    data = load_folder(folder) if folder is not None else load_entry(entry)
    shape = " x ".join(str(size) for size in data.x.shape[1:])
    return f"data has {len(data.y)} samples of {shape}, labels 0 to {int(data.y.max())}"


def _check_link(config: AgentConfig) -> str:
    """Connect once under a name of our own, so that a running agent is not pushed out."""
    events: queue.SimpleQueue[Arrived | Link] = queue.SimpleQueue()
    mailbox = Mailbox(
        MailboxConfig(
            url=config.broker,
            client_id=f"{config.namespace}-{config.device}-check-{os.getpid()}",
            user=config.user,
            password=password(),
            ca_file=config.ca_file,
            session_expiry_s=0,
        ),
        deliver=events.put,
        next_epoch=lambda: 0,
        last_will=lambda _: _last_will(config),
        rng=random.Random(0),  # noqa: S311 -- jitter
    )
    mailbox.open()
    try:
        event = events.get(timeout=PATIENCE_S)
    except queue.Empty:
        raise LinkError(
            f"broker {config.broker} did not answer within {PATIENCE_S:.0f} s; "
            "see that it runs and that no firewall is between"
        ) from None
    finally:
        mailbox.close()
    if isinstance(event, Link) and not event.is_up:
        raise LinkError(event.reason)
    return f"broker {config.broker} lets this device in"


def _last_will(config: AgentConfig) -> tuple[Route, bytes]:
    # Of epoch 0, which every hub knows to be out of date: it changes nothing.
    letter = Presence(state="disconnected")
    unretained = dataclasses.replace(route(config.namespace, config.device, letter), retain=False)
    return unretained, seal(config.device, 0, letter)
