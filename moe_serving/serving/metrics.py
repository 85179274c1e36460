"""What is counted, for Prometheus: names end in their unit, labels are few.

A label has as many values as there are models, versions or outcomes; what a client sends never
becomes a label.
"""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from moe_serving.requests import Ending, Generated, Outcome, Ticket

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """One server's counters, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            full = f"headwater_moe_{name}"
            return Histogram(full, about, ["model"], buckets=buckets, registry=self._registry)

        def gauge(name: str, about: str, labels: list[str]) -> Gauge:
            return Gauge(f"headwater_moe_{name}", about, labels, registry=self._registry)

        self._requests = Counter(
            "headwater_moe_requests",
            "Requests by how they ended; each is counted once.",
            ["model", "version", "outcome"],
            registry=self._registry,
        )
        self._tokens = Counter(
            "headwater_moe_tokens",
            "Tokens (windows, for a classifier) that the model worked off.",
            ["model"],
            registry=self._registry,
        )
        self._seconds = histogram("request_seconds", "From acceptance to the end.", _SECONDS)
        self._first = histogram(
            "time_to_first_token_seconds", "From acceptance to the first token.", _SECONDS
        )
        self._each = histogram(
            "time_per_output_token_seconds", "Between tokens after the first.", _TOKEN_SECONDS
        )
        self._batch = histogram("batch_tokens", "Tokens a step.", tuple(map(float, _BATCHES)))
        self._step = histogram("step_seconds", "Time a step.", _TOKEN_SECONDS)
        self._waiting = gauge("queue_tokens", "Tokens that wait.", ["model"])
        self._running = gauge("running_requests", "Requests in the batch.", ["model"])
        self._rate = gauge("rate_tokens_per_second", "What admission goes by.", ["model"])
        self._version = gauge("served_version", "The version that serves.", ["model"])

    def observer(self, model: str, version: int) -> "ModelObserver":
        """What the engine of this version tells."""
        return ModelObserver(self, model, version)

    def on_ended(self, model: str, version: int, outcome: Outcome) -> None:
        """A request has ended; of one that was not accepted, the model may be empty."""
        self._requests.labels(model, str(version or ""), outcome).inc()

    def on_answered(self, model: str, ticket: Ticket, result: object, now: float) -> None:
        """A request was answered."""
        self._seconds.labels(model).observe(now - ticket.accepted_at)
        if ticket.first_at:
            self._first.labels(model).observe(ticket.first_at - ticket.accepted_at)
        made = ticket.made
        if isinstance(result, Generated) and made > 1:
            self._each.labels(model).observe((now - ticket.first_at) / (made - 1))

    def on_step(self, model: str, tokens: int, seconds: float, waiting: int, running: int) -> None:
        """A model did a step."""
        self._tokens.labels(model).inc(tokens)
        self._batch.labels(model).observe(tokens)
        self._step.labels(model).observe(seconds)
        self._waiting.labels(model).set(waiting)
        self._running.labels(model).set(running)

    def exposition(self, served: Iterable[tuple[str, int, float, int]]) -> bytes:
        """The text that Prometheus reads.

        Args:
            served: each served model's name, version, measured rate and tokens that wait.
        """
        for model, version, rate, waiting in served:
            self._version.labels(model).set(version)
            self._rate.labels(model).set(rate)
            self._waiting.labels(model).set(waiting)
        return generate_latest(self._registry)


class ModelObserver:
    """Counts for one version of one model."""

    def __init__(self, metrics: Metrics, model: str, version: int) -> None:
        self._metrics = metrics
        self._model = model
        self._version = version

    def on_settled(self, ticket: Ticket, ending: Ending, now: float) -> None:
        """A ticket has ended."""
        self._metrics.on_ended(self._model, self._version, ending.outcome)
        if ending.outcome == "ok":
            self._metrics.on_answered(self._model, ticket, ending.result, now)

    def on_step(self, tokens: int, seconds: float, waiting_tokens: int, running: int) -> None:
        """A step was done."""
        self._metrics.on_step(self._model, tokens, seconds, waiting_tokens, running)
