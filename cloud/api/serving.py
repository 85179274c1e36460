"""Serves the API from a thread of the hub's process, for as long as the hub runs."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from cloud.api.app import Hub, build
from cloud.config import HttpConfig, HubConfig
from cloud.twins.store import TwinStore
from federation.errors import ConfigError

VARIABLE = "HEADWATER_TOKEN"

START_S = 10.0
STOP_S = 5

_log = logging.getLogger("headwater.http")


@contextmanager
def serving_http(
    config: HubConfig,
    twins: TwinStore,
    *,
    wished: Callable[[str], None],
    clock: Callable[[], float],
) -> Iterator[str]:
    """The API's address, while it is served.

    Raises:
        ConfigError: the address cannot be used, or is open to others and there is no token.
    """
    http, token = config.http or HttpConfig(), os.environ.get(VARIABLE, "")
    if not token and not http.is_local:
        raise ConfigError(
            f"http.host is {http.host}, which others can reach, and there is no token: "
            f"set {VARIABLE}, or use 127.0.0.1"
        )
    hub = Hub(config.namespace, twins, wished, clock, token)
    with _listening(http) as listener:
        server = uvicorn.Server(
            uvicorn.Config(
                build(hub),
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=STOP_S,
            )
        )
        thread = threading.Thread(target=server.run, args=([listener],), name="http", daemon=True)
        thread.start()
        try:
            _await_start(server, thread)
            port = listener.getsockname()[1]
            _log.info("http api on http://%s:%d", http.host, port)
            yield f"http://{http.host}:{port}"
        finally:
            server.should_exit = True
            thread.join(2 * STOP_S)


@contextmanager
def _listening(http: HttpConfig) -> Iterator[socket.socket]:
    try:
        family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
        listener = socket.create_server((http.host, http.port), family=family)
    except OSError as error:
        raise ConfigError(
            f"http.host {http.host} with http.port {http.port} cannot be listened on "
            f"({error.strerror}): name another port, or 0 for any"
        ) from error
    with listener:
        yield listener


def _await_start(server: uvicorn.Server, thread: threading.Thread) -> None:
    give_up_at = time.monotonic() + START_S
    while not server.started and thread.is_alive() and time.monotonic() < give_up_at:
        time.sleep(0.01)
    if not server.started:
        raise ConfigError("the HTTP API did not start; see the log, or leave [http] out")
