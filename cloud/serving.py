"""Brings up what a hub needs and takes it down again: its folder, the broker, the runner."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from cloud.broker import start_broker
from cloud.config import HubConfig
from cloud.holder import Holder, hold, introduce
from cloud.runner import HubRunner
from federation.protocol.link import MailboxConfig
from federation.protocol.topics import hub_filters


@contextmanager
def serving(
    config: HubConfig, *, clock: Callable[[], float], rng: random.Random
) -> Iterator[tuple[HubRunner, str]]:
    """A runner that is ready to `run`, and the address of its broker.

    Raises:
        ConfigError: another hub works in the folder, or the broker's address is none.
        LinkError: the broker could not be started.
        StoreError: the record cannot be opened.
    """
    with ExitStack() as stack:
        handle = stack.enter_context(hold(config.folder))
        url, tend = config.broker.url, _leave_alone
        if not url:
            folder = config.folder / "broker"
            broker = stack.enter_context(
                start_broker(config.broker.kind, folder, port=config.broker.port)
            )
            url, tend = broker.url, broker.revive
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
        runner = HubRunner(config, mailbox, tend_broker=tend, clock=clock, rng=rng)
        if config.http is not None:
            stack.enter_context(_http(config, runner, clock))
        introduce(handle, Holder(pid=os.getpid(), broker=url, since=clock()))
        yield runner, url


def _http(
    config: HubConfig, runner: HubRunner, clock: Callable[[], float]
) -> AbstractContextManager[str]:
    # Late: a hub without [http] needs no web framework.
    from cloud.api.serving import serving_http

    return serving_http(config, runner.twins, wished=runner.wished, clock=clock)


def _leave_alone() -> bool:
    return False
