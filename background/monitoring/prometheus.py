"""Names the metrics: of the fleet, whose names begin with `background_`, and of this process.

The client library writes the metrics of the process. They are few.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, disable_created_metrics, generate_latest
from prometheus_client.registry import Collector

from ..history.browsing.topics import Topic
from ..history.records import STATES
from ..history.status import WorkerStatus
from ..ledger.counters import DURATIONS, LATENESSES
from .exposition import count, gauge, label, metric, seconds
from .fleet_figures import Figures, Total

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_ENDED = {state: label("state", state) for state in STATES[1:]}
_ALSO_ZERO = {"succeeded", "failed", "missed"}  # with many workers, too: alerts wait for these states


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


def of_process(requests: RequestSeries, more: Callable[[], Iterable[Metric]]) -> bytes:
    """Write the `requests` to this process, and `more`."""
    registry = CollectorRegistry()
    registry.register(_More(more))
    return generate_latest(registry) + generate_latest(requests.registry)


def of_fleet(figures: Figures | None) -> bytes:
    """Write the fleet's `figures`. None if the database is away."""
    return "".join(_of_fleet(figures)).encode()


def _of_fleet(figures: Figures | None) -> Iterator[str]:
    up = "1 if the database answered, else 0, without figures of the fleet."
    yield gauge("background_up", up, [("", count(figures is not None))])
    if figures is None:
        return
    names = {status.name for status in figures.statuses}.union(*figures.totals.values())
    workers = {name: label("worker", name) for name in sorted(names)}
    yield from _executions(figures, workers)
    yield from _statuses(figures.statuses, workers)
    yield from _instances(figures)
    yield from _messages(figures.topics)


def _executions(figures: Figures, workers: Mapping[str, str]) -> Iterator[str]:
    states = figures.totals.get("state", {})
    ended = "Executions by state. A range of missed ticks counts once."
    yield metric("background_executions_total", "counter", ended, _by_state(figures, states, workers))
    yield gauge(
        "background_seconds_since_last_success",
        "Seconds since the worker last succeeded. Absent if it never did.",
        [(workers[name], seconds(max(each.age, 0))) for name, each in sorted(states.items()) if each.age is not None],
    )
    took = _histogram(figures, "duration", DURATIONS, workers)
    yield metric("background_execution_duration_seconds", "histogram", "Duration of executions.", took)
    late = _histogram(figures, "lateness", LATENESSES, workers)
    lateness = "Time from a tick to the start of its first attempt."
    yield metric("background_execution_lateness_seconds", "histogram", lateness, late)


def _by_state(figures: Figures, states: Mapping[str, Total], workers: Mapping[str, str]) -> Iterator[str]:
    """Yield counts, also with 0: Prometheus sees no increase in a series that begins with 1."""
    known = {status.name for status in figures.statuses} | states.keys()
    zeros = _ALSO_ZERO if figures.are_many else _ENDED.keys()
    heads = [(state, f"background_executions_total{{{labelled}", state in zeros) for state, labelled in _ENDED.items()]
    for name, worker in workers.items():
        if name in known:
            numbers = states[name].numbers if name in states else {}
            for state, head, is_always in heads:
                number = numbers.get(state, 0)
                if number or is_always:
                    yield f"{head},{worker}}} {count(number)}\n"


def _histogram(figures: Figures, kind: str, declared: Iterable[float], workers: Mapping[str, str]) -> Iterator[str]:
    """Yield a histogram with the same buckets for all workers, so that Prometheus can add them up.

    The buckets are the buckets of this release, and all buckets in which another release has counted. The buckets of
    many workers are added up here, and have no label `worker`.
    """
    name, found = f"background_execution_{kind}_seconds", figures.totals.get(kind, {})
    shared = figures.buckets.get(kind, {})
    ours = {*map("{:g}".format, declared), "inf"}
    counted = ours.union(*(filter(_is_bound, total.numbers) for total in found.values()), filter(_is_bound, shared))
    bounds = sorted(counted, key=float)
    heads = [f"{name}_bucket{{{label('le', bound)}" for bound in [*bounds[:-1], "+Inf"]]
    for worker, total in sorted(found.items()):
        labelled, number = workers[worker], total.executions
        if not figures.are_many:
            for head, number in zip(heads, accumulate(total.numbers.get(bound, 0) for bound in bounds), strict=True):
                yield f"{head},{labelled}}} {count(number)}\n"
        yield f"{name}_count{{{labelled}}} {count(number)}\n"
        yield f"{name}_sum{{{labelled}}} {seconds(total.seconds)}\n"
    if shared:
        for head, number in zip(heads, accumulate(shared.get(bound, 0) for bound in bounds), strict=True):
            yield f"{head}}} {count(number)}\n"


def _is_bound(text: str) -> bool:
    """Return whether a release wrote the text. A user may have typed another text into the row."""
    try:
        return f"{float(text):g}" == text and float(text) > 0
    except ValueError:
        return False


def _statuses(found: Sequence[WorkerStatus], workers: Mapping[str, str]) -> Iterator[str]:
    overdue = "1 if a tick still waits after two later ticks became due, else 0."
    each = [(workers[status.name], status) for status in found]
    running = [(worker, count(status.is_running)) for worker, status in each]
    yield gauge("background_worker_running", "1 if an instance runs the worker, else 0.", running)
    paused = [(worker, count(status.is_paused)) for worker, status in each]
    yield gauge("background_worker_paused", "1 if the worker is paused, else 0.", paused)
    late = [(worker, count(status.is_overdue)) for worker, status in each]
    yield gauge("background_worker_overdue", overdue, late)
    intervals = [(worker, seconds(status.interval.total_seconds())) for worker, status in each if status.interval]
    interval = "Time from tick to tick of the workers that should run."
    yield gauge("background_worker_interval_seconds", interval, intervals)


def _instances(figures: Figures) -> Iterator[str]:
    yield gauge("background_instances", "Number of instances that are alive.", [("", count(figures.alive))])
    ahead = "Seconds by which the clock of the process's host is ahead of the database's."
    # Not the label `instance`, which Prometheus uses for the scraped target.
    offsets = [(label("process", name), seconds(offset)) for name, offset in sorted(figures.offsets.items())]
    yield gauge("background_clock_offset_seconds", ahead, offsets)


def _messages(topics: Sequence[Topic]) -> Iterator[str]:
    each = [(label("topic", topic.topic), topic) for topic in topics]
    depths = [
        (f"{label('state', state)},{labelled}", count(getattr(topic, state)))
        for labelled, topic in each
        for state in ("waiting", "running", "dead")
    ]
    yield gauge("background_messages", "Messages that are not done, by state.", depths)
    paused = [(labelled, count(topic.paused_at is not None)) for labelled, topic in each]
    yield gauge("background_topic_paused", "1 if the topic is paused, else 0.", paused)
    oldest = [(labelled, seconds(0 if topic.paused_at else topic.oldest_seconds or 0)) for labelled, topic in each]
    meaning = "Time since the oldest waiting message was due. 0 while the topic is paused."
    yield gauge("background_message_oldest_seconds", meaning, oldest)
