"""The server as a whole: it comes up, follows the repository, and goes without losing anything."""

import logging
import random
import socket
import threading
import time
from collections.abc import Callable

import uvicorn

from federation.errors import ConfigError, HeadwaterError
from moe_serving.config import MoeConfig
from moe_serving.hosting import Host
from moe_serving.serving.app import build_app
from moe_serving.serving.metrics import Metrics
from moe_serving.serving.mqtt import MqttGateway

CONNECTIONS = 4096
"""More at a time are answered 503 by the HTTP layer itself."""

_log = logging.getLogger("headwater.moe")


class MoeServer:
    """HTTP and MQTT over one host. `start` it, then `run`, and `stop` it from anywhere.

    `clock` gives the time of day in seconds and never jumps.
    """

    def __init__(
        self,
        config: MoeConfig,
        *,
        data_token: str = "",
        admin_token: str = "",
        broker_password: str = "",
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self._config = config
        self._metrics = Metrics()
        self.host = Host(config, observe=self._metrics.observer)
        self._stopping = threading.Event()
        app = build_app(
            self.host, self._metrics, data_token=data_token, admin_token=admin_token, clock=clock
        )
        self._http = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=2,
            )
        )
        self._gateway: MqttGateway | None = None
        if config.mqtt is not None:
            self._gateway = MqttGateway(
                config.mqtt,
                self.host,
                self._metrics,
                password=broker_password,
                clock=clock,
                rng=rng,
            )
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve_http, name="http", daemon=True)

    @property
    def url(self) -> str:
        """Where HTTP is spoken, once it is started."""
        if self._socket is None:
            return ""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def gateway(self) -> MqttGateway | None:
        """The way in over MQTT, if the configuration has one."""
        return self._gateway

    def start(self) -> None:
        """Answer health at once, load all models, and then take requests.

        Raises:
            ConfigError: the address cannot be listened on.
            StoreError: no model could be loaded.
        """
        self._socket = _listen(self._config.http.host, self._config.http.port)
        self._thread.start()
        try:
            self.host.begin()
        except HeadwaterError:
            self._end_http()
            raise
        if self._gateway is not None:
            self._gateway.open()

    def run(self) -> int:
        """Serve until `stop`, then finish what was accepted; how many requests were not finished.

        Until then newer versions take over as they are published.
        """
        if self._config.poll_s:
            # Beside this thread: a model that takes minutes to load must not delay the end.
            threading.Thread(target=self._follow, name="follow", daemon=True).start()
        self._stopping.wait()
        return self.close()

    def stop(self) -> None:
        """Let `run` come to its end; from any thread, or a signal handler."""
        self._stopping.set()

    def close(self) -> int:
        """Take nothing more, finish what was accepted, end; how many requests were not finished."""
        self._stopping.set()
        left = self.host.drain(self._config.grace_s)
        if self._gateway is not None:
            self._gateway.close()
        self._end_http()
        return left

    def _follow(self) -> None:
        while not self._stopping.wait(self._config.poll_s):
            try:
                self.host.follow()
            except Exception:  # the outermost loop: what serves must not depend on it
                _log.exception("repository could not be followed")

    def _serve_http(self) -> None:
        self._http.run(sockets=[self._socket] if self._socket is not None else None)

    def _end_http(self) -> None:
        # Answers are on their way from the loop to their sockets; uvicorn waits for them.
        while self._thread.is_alive() and not self._http.started:
            time.sleep(0.01)
        self._http.should_exit = True
        self._thread.join()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {host} port {port} ({error}); a free port of this machine was "
            "expected: correct [http], or end who has it"
        ) from error
