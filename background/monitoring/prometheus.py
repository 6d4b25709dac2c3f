"""Writes the figures in Prometheus's text format, by its own client library."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from ..history.browsing.topics import Topic
from ..history.records import STATES
from ..history.status import WorkerStatus
from ..ledger.counters import DURATIONS, LATENESSES
from .fleet_figures import NOTHING, Figures, Total

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Sample = tuple[dict[str, str], float]

_ENDED = STATES[1:]


class _Fleet(Collector):
    def __init__(self, figures: Figures | None) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        up = int(self._figures is not None)
        yield _gauge("background_up", "1 if the database answered, else 0, without figures of the fleet.", up)
        if self._figures is not None:
            yield from _executions(self._figures)
            yield from _workers(self._figures.statuses)
            yield from _instances(self._figures)
            yield from _messages(self._figures.topics)


class _More(Collector):
    def __init__(self, metrics: Callable[[], Iterable[Metric]]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics()


class RequestSeries:
    """The requests to one application in this process.

    Each series has the process as a label. Without it, several processes behind one port would share one series.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry, labels = CollectorRegistry(), ("method", "endpoint", "process")
        counted, timed = "Requests that this process answered.", "Time that this process took for a request."
        self.requests = Counter("http_requests", counted, (*labels, "status"), registry=self.registry)
        self.durations = Histogram("http_request_duration_seconds", timed, labels, registry=self.registry)


def text(figures: Figures | None, requests: RequestSeries, more: Callable[[], Iterable[Metric]]) -> bytes:
    """Write the fleet's `figures` (None if the database is away), the `requests` to this process, and `more`."""
    own = CollectorRegistry()
    own.register(_Fleet(figures))
    own.register(_More(more))
    return generate_latest(own) + generate_latest(requests.registry)


def _executions(figures: Figures) -> Iterator[Metric]:
    states = figures.totals.get("state", {})
    ended = CounterMetricFamily(
        "background_executions", "Executions by state. A range of missed ticks counts once.", labels=("worker", "state")
    )
    since = GaugeMetricFamily(
        "background_seconds_since_last_success",
        "Seconds since the worker last succeeded. Absent if it never did.",
        labels=("worker",),
    )
    for name in sorted({status.name for status in figures.statuses} | states.keys()):
        total = states.get(name, NOTHING)
        for state in _ENDED:  # also with 0: Prometheus sees no increase in a series that begins with 1
            ended.add_metric((name, state), total.numbers.get(state, 0))
        if total.age is not None:
            since.add_metric((name,), max(total.age, 0))
    yield ended
    yield since
    took, late = figures.totals.get("duration", {}), figures.totals.get("lateness", {})
    yield _histogram("background_execution_duration_seconds", "Duration of executions.", DURATIONS, took)
    lateness = "Time from a tick to the start of its first attempt."
    yield _histogram("background_execution_lateness_seconds", lateness, LATENESSES, late)


def _histogram(name: str, meaning: str, declared: Iterable[float], found: Mapping[str, Total]) -> Metric:
    """Build a histogram with the same buckets for all workers, so that Prometheus can add them up.

    The buckets are the buckets of this release, and all buckets in which another release has counted.
    """
    ours = {*map("{:g}".format, declared), "inf"}
    bounds = sorted(ours.union(*(filter(_is_bound, total.numbers) for total in found.values())), key=float)
    family = HistogramMetricFamily(name, meaning, labels=("worker",))
    for worker, total in sorted(found.items()):
        sums = accumulate(total.numbers.get(bound, 0) for bound in bounds)
        family.add_metric((worker,), list(zip([*bounds[:-1], "+Inf"], sums, strict=True)), total.seconds)
    return family


def _is_bound(label: str) -> bool:
    """Return whether a release wrote the label. A user may have typed another text into the row."""
    try:
        return f"{float(label):g}" == label and float(label) > 0
    except ValueError:
        return False


def _workers(found: Sequence[WorkerStatus]) -> Iterator[Metric]:
    overdue = "1 if a tick still waits after two later ticks became due, else 0."
    yield _gauges(
        "background_worker_running", "1 if an instance runs the worker, else 0.", _by_worker(found, "is_running")
    )
    yield _gauges("background_worker_paused", "1 if the worker is paused, else 0.", _by_worker(found, "is_paused"))
    yield _gauges("background_worker_overdue", overdue, _by_worker(found, "is_overdue"))
    intervals = [({"worker": each.name}, each.interval.total_seconds()) for each in found if each.interval]
    interval = "Time from tick to tick of the workers that should run."
    yield _gauges("background_worker_interval_seconds", interval, intervals)


def _by_worker(found: Iterable[WorkerStatus], name: str) -> list[Sample]:
    return [({"worker": each.name}, int(getattr(each, name))) for each in found]


def _instances(figures: Figures) -> Iterator[Metric]:
    yield _gauge("background_instances", "Number of instances that are alive.", figures.alive)
    ahead = "Seconds by which the clock of the process's host is ahead of the database's."
    # Not the label `instance`, which Prometheus uses for the scraped target.
    offsets: list[Sample] = [({"process": name}, offset) for name, offset in sorted(figures.offsets.items())]
    yield _gauges("background_clock_offset_seconds", ahead, offsets)


def _messages(topics: Sequence[Topic]) -> Iterator[Metric]:
    depths: list[Sample] = [
        ({"topic": topic.topic, "state": state}, getattr(topic, state))
        for topic in topics
        for state in ("waiting", "running", "dead")
    ]
    yield _gauges("background_messages", "Messages that are not done, by state.", depths)
    paused: list[Sample] = [({"topic": topic.topic}, int(topic.paused_at is not None)) for topic in topics]
    yield _gauges("background_topic_paused", "1 if the topic is paused, else 0.", paused)
    oldest: list[Sample] = [
        ({"topic": topic.topic}, 0 if topic.paused_at else topic.oldest_seconds or 0) for topic in topics
    ]
    meaning = "Time since the oldest waiting message was due. 0 while the topic is paused."
    yield _gauges("background_message_oldest_seconds", meaning, oldest)


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return _gauges(name, meaning, [({}, value)])


def _gauges(name: str, meaning: str, samples: Iterable[Sample]) -> Metric:
    family = Metric(name, meaning, "gauge")
    for labels, value in samples:
        family.add_sample(name, labels, value)
    return family
