"""Figures for Prometheus: those of the fleet, which any instance reads from the database, and this process's own.

Each scrape is a constant number of queries, whatever the number of workers, and none reads the executions or the
messages that are done: `background_totals` has their sums.
"""

import hmac
import logging
import os
import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from flask import Blueprint, Response, current_app, request
from flask.typing import ResponseReturnValue
from sqlalchemy import Connection, String, and_, case, cast, func, select
from sqlalchemy.exc import SQLAlchemyError

from .clock import elapsed, now, single_statements
from .connections import again_if_stale
from .errors import first_line
from .exposition import CONTENT_TYPE, Distribution, Exposition, labelled
from .history import STATES
from .instances import is_alive
from .mailbox import Topic
from .manager import BackgroundWorkerManager
from .models import instances, totals
from .prompt import Prompt
from .standing import Standing, standings
from .totals import DURATIONS, LATENESSES
from .traffic import BOUNDS, Traffic

log = logging.getLogger(__name__)

_ANSWER_SECONDS = 5.0  # Prometheus waits for ten
_ENDED = STATES[1:]


def metrics() -> Blueprint:
    """GET /metrics, for everybody or, where METRICS_TOKEN is set, for who brings it as a bearer token."""
    blueprint = Blueprint("metrics", __name__)
    traffic, fleet = Traffic(), Fleet()
    blueprint.record_once(lambda state: traffic.watch(state.app))  # type: ignore[arg-type]  # it is a Flask

    @blueprint.get("/metrics")
    def scrape() -> ResponseReturnValue:
        if not _is_allowed():
            return Response("A bearer token is asked for.\n", 401, {"WWW-Authenticate": "Bearer"}, "text/plain")
        exposition = Exposition()
        _write_fleet(exposition, fleet.figures())
        _write_traffic(exposition, traffic)
        return Response(exposition.text(), headers={"Cache-Control": "no-store"}, content_type=CONTENT_TYPE)

    return blueprint


def _is_allowed() -> bool:
    token = current_app.config.get("METRICS_TOKEN")
    given = request.authorization
    if not token:
        return True
    if given is None or given.type != "bearer" or given.token is None:
        return False
    return hmac.compare_digest(given.token.encode(), token.encode())


# -- reading -------------------------------------------------------------------------------------


class Total(NamedTuple):
    """What is counted of one kind and worker."""

    numbers: dict[str, int]
    """By label."""
    seconds: float
    age: float | None
    """Since the latest success, of states that have any."""


_NOTHING = Total({}, 0.0, None)
Totals = Mapping[str, Mapping[str, Total]]
"""By kind and worker."""


@dataclass(frozen=True)
class Figures:
    """What one scrape reads."""

    totals: Totals
    standings: list[Standing]
    offsets: dict[str, float]
    """How many seconds the clock of each host is ahead of the database's, by "host:pid" of those alive."""
    alive: int
    topics: list[Topic]


class Fleet:
    """Reads the figures of the fleet; a database that is away or hangs is one of them."""

    def __init__(self) -> None:
        self._prompt: Prompt[Figures] | None = None
        self._is_up = True

    def figures(self) -> Figures | None:
        """None where the database does not answer in time."""
        if self._prompt is None:
            manager: BackgroundWorkerManager = current_app.extensions["background_workers"]
            self._prompt = Prompt(lambda: again_if_stale(lambda: _figures(manager)), _ANSWER_SECONDS)
        was_up, self._is_up = self._is_up, True
        try:
            return self._prompt.answer()
        except (SQLAlchemyError, OSError) as error:  # TimeoutError is one
            self._is_up = False
            level = logging.WARNING if was_up else logging.DEBUG  # once per outage
            log.log(level, "No figures of the fleet: %s", first_line(error))
            return None


def _figures(manager: BackgroundWorkerManager) -> Figures:
    manager.ticks.connections.refuse_missing()
    with single_statements(manager.ticks.ledger.engine).connect() as connection:
        sums = _read_totals(connection)
    with single_statements(manager.ticks.instances.engine).connect() as connection:
        alive = connection.execute(_alive).all()
    # Where containers share a host name and a process id, the one that is furthest off has the last word.
    known = sorted((row for row in alive if row.clock_offset is not None), key=lambda row: abs(row.clock_offset))
    offsets = {f"{row.host}:{row.pid}": -row.clock_offset for row in known}
    return Figures(sums, standings(manager), offsets, len(alive), manager.messages.depths())


def _read_totals(connection: Connection) -> Totals:
    found: dict[str, dict[str, Total]] = defaultdict(dict)
    for kind, worker, numbers, seconds, age in connection.execute(_totals):
        pairs = (pair.split("=") for pair in numbers.split(","))
        found[kind][worker] = Total({label: int(number) for label, number in pairs}, seconds, age)
    return found


_is_success = and_(totals.c.kind == "state", totals.c.label == "succeeded")
# Put together by the database, as of 1,000 workers it is 25,000 rows to hand over otherwise.
_totals = select(
    totals.c.kind,
    totals.c.worker,
    func.aggregate_strings(totals.c.label + "=" + cast(totals.c.count, String), ","),
    func.sum(totals.c.seconds),
    func.max(case((_is_success, elapsed(totals.c.latest_at, now())))),
).group_by(totals.c.worker, totals.c.kind)
_alive = select(instances.c.host, instances.c.pid, instances.c.clock_offset).where(is_alive)


# -- writing -------------------------------------------------------------------------------------


def _write_fleet(to: Exposition, figures: Figures | None) -> None:
    up = int(figures is not None)
    to.single("background_up", "Whether the database answered; if not, there are no figures of the fleet.", up)
    if figures is not None:
        _write_executions(to, figures)
        _write_workers(to, figures.standings)
        _write_instances(to, figures)
        _write_messages(to, figures.topics)


def _write_executions(to: Exposition, figures: Figures) -> None:
    states = figures.totals.get("state", {})
    # From the first scrape on, as to Prometheus it is no increase when a series begins with a 1.
    workers = sorted({standing.name for standing in figures.standings} | states.keys())
    each = [(labelled(worker=name), states.get(name, _NOTHING)) for name in workers]
    to.counter(
        "background_executions_total",
        "Executions by how they ended; skipped and missed count once for a row of ticks that nobody ran.",
        [(f'{labels},state="{state}"', total.numbers.get(state, 0)) for labels, total in each for state in _ENDED],
    )
    took, late = figures.totals.get("duration", {}), figures.totals.get("lateness", {})
    _write_histogram(to, "background_execution_duration_seconds", "How long executions took.", DURATIONS, took)
    lateness = "How long after its tick the first attempt at it began."
    _write_histogram(to, "background_execution_lateness_seconds", lateness, LATENESSES, late)
    to.gauge(
        "background_seconds_since_last_success",
        "Since the worker last succeeded; none for one that never did.",
        [(labels, max(total.age, 0)) for labels, total in each if total.age is not None],
    )


def _write_histogram(
    to: Exposition, name: str, meaning: str, bounds_now: Iterable[float], found: Mapping[str, Total]
) -> None:
    """All with the same buckets, or they could not be added up: those of today, and those that others counted in."""
    today = {*map("{:g}".format, bounds_now), "inf"}
    bounds = sorted(today.union(*(total.numbers for total in found.values())), key=float)
    series = [
        Distribution(labelled(worker=worker), [total.numbers.get(bound, 0) for bound in bounds], total.seconds)
        for worker, total in sorted(found.items())
    ]
    to.histogram(name, meaning, [*bounds[:-1], "+Inf"], series)


def _write_workers(to: Exposition, found: Iterable[Standing]) -> None:
    each = [(labelled(worker=standing.name), standing) for standing in found]
    running = [(labels, int(standing.is_running)) for labels, standing in each]
    paused = [(labels, int(standing.is_paused)) for labels, standing in each]
    overdue = [(labels, int(standing.is_overdue)) for labels, standing in each]
    intervals = [(labels, standing.interval.total_seconds()) for labels, standing in each if standing.interval]
    to.gauge("background_worker_running", "Whether an instance runs it.", running)
    to.gauge("background_worker_paused", "Whether it is paused.", paused)
    to.gauge("background_worker_overdue", "Whether a tick waits although two further ones have come.", overdue)
    interval = "From tick to tick, of those that are to run."
    to.gauge("background_worker_interval_seconds", interval, intervals)


def _write_instances(to: Exposition, figures: Figures) -> None:
    to.single("background_instances", "How many instances are alive.", figures.alive)
    # Not `instance`: to Prometheus that is what it scraped.
    offsets = [(labelled(process=name), offset) for name, offset in sorted(figures.offsets.items())]
    ahead = "How far the clock of the process's host is ahead of the database's."
    to.gauge("background_clock_offset_seconds", ahead, offsets)


def _write_messages(to: Exposition, topics: Iterable[Topic]) -> None:
    each = [(labelled(topic=topic.topic), topic) for topic in topics]
    to.gauge(
        "background_messages",
        "Messages that are not done, by state.",
        [
            (f'{labels},state="{state}"', count)
            for labels, topic in each
            for state, count in (("waiting", topic.waiting), ("running", topic.running), ("dead", topic.dead))
        ],
    )
    oldest = [(labels, topic.oldest_seconds or 0) for labels, topic in each]
    to.gauge("background_message_oldest_seconds", "How long ago the first of those that wait was due.", oldest)


def _write_traffic(to: Exposition, traffic: Traffic) -> None:
    """Of this process alone, and named after it: several behind one port would look like one that jumps."""
    process = labelled(process=f"{socket.gethostname()}:{os.getpid()}")
    each = [
        (f"{labelled(method=route.method, endpoint=route.endpoint)},{process}", route) for route in traffic.routes()
    ]
    to.counter(
        "http_requests_total",
        "Requests that this process answered.",
        [
            (f'{labels},status="{status}"', count)
            for labels, route in each
            for status, count in sorted(route.statuses.items())
        ],
    )
    to.histogram(
        "http_request_duration_seconds",
        "How long this process took for them.",
        [*map(str, BOUNDS), "+Inf"],
        [Distribution(labels, route.buckets, route.seconds) for labels, route in each],
    )
