"""What is counted, for Prometheus: names end in their unit, labels are few.

A label has as many values as there are models, versions or outcomes; what a client sends never
becomes a label.
"""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from moe_serving.buffering.store import Counters
from moe_serving.hosting import Hosted
from moe_serving.requests import Ending, Generated, Outcome, Ticket

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_FIGURES = (
    ("hits", "Uses of experts that were resident.", "hits"),
    ("misses", "Uses of experts that were not.", "misses"),
    ("bytes_read", "Bytes of experts that were read.", "read_bytes"),
    ("stall_s", "Waiting for experts.", "stall_seconds"),
    ("resident_bytes", "Held of experts now.", "resident_bytes"),
)
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
        self._stores = _Stores()
        self._registry.register(self._stores)

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

    def exposition(self, served: Iterable[Hosted]) -> bytes:
        """The text that Prometheus reads, with what these models have to say of themselves."""
        self._stores.counters = {}
        for each in served:
            self._version.labels(each.name).set(each.version)
            self._rate.labels(each.name).set(each.engine.tokens_per_s)
            self._waiting.labels(each.name).set(each.engine.waiting_tokens)
            if each.loaded.store is not None:
                self._stores.counters[each.name] = each.loaded.store.counters()
        return generate_latest(self._registry)


class _Stores(Collector):
    """What stores of experts count by themselves, as they stand when they are asked."""

    def __init__(self) -> None:
        self.counters: dict[str, Counters] = {}

    def collect(self) -> Iterator[Metric]:
        """One family a count, a model each."""
        for name, about, kind in _FIGURES:
            is_count = name != "resident_bytes"
            family = (CounterMetricFamily if is_count else GaugeMetricFamily)(
                f"headwater_moe_expert_cache_{kind}", about, labels=["model"]
            )
            for model, counters in self.counters.items():
                family.add_metric([model], getattr(counters, name))
            yield family


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
