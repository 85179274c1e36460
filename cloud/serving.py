"""Brings up what a hub needs, in order, and takes it down again: the broker, then the runner."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from cloud.broker import start_broker
from cloud.config import HubConfig
from cloud.runner import HubRunner
from federation.protocol.link import MailboxConfig
from federation.protocol.topics import hub_filters
from optimizer.baselines import select_uniformly


@contextmanager
def serving(
    config: HubConfig, *, clock: Callable[[], float], rng: random.Random
) -> Iterator[tuple[HubRunner, str]]:
    """A runner that is ready to `run`, and the address of its broker.

    Raises:
        LinkError: the broker could not be started.
        StoreError: the record cannot be opened.
    """
    with ExitStack() as stack:
        url = config.broker.url
        if not url:
            folder = config.folder / "broker"
            broker = stack.enter_context(
                start_broker(config.broker.kind, folder, port=config.broker.port)
            )
            url = broker.url
        mailbox = MailboxConfig(
            url=url,
            client_id=f"{config.namespace}-hub",
            filters=tuple(hub_filters(config.namespace)),
            keepalive_s=config.broker.keepalive_s,
            user=config.broker.user,
            password=os.environ.get("HEADWATER_PASSWORD", ""),
            ca_file=config.broker.ca_file,
            manual_ack=True,
            session_expiry_s=7 * 24 * 3600,
            receive_maximum=200,
            window=200,
            backoff_s=(0.2, 5.0),
        )
        yield HubRunner(config, mailbox, select=select_uniformly, clock=clock, rng=rng), url
