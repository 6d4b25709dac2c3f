"""Reads the tallies for the charts. The time since the last roll-up is counted when a chart is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, and_, or_, select

from ..database.store import Store
from ..database.tables import tallies
from .counting import ALL, Tallies, count_messages, count_runs
from .rollup import HOUR, MINUTES, MINUTES_KEPT, RollUp, floor
from .tally import Tally

_MOST_READ = 10_000  # rows that a chart counts itself
_LONGEST_READ = 2 * MINUTES  # the roll-up is at most this late, unless no instance is alive


@dataclass(frozen=True)
class Span:
    """A length of time that a chart shows: a number of bars of one length, and the bar that has begun."""

    text: str
    bars: int
    bar: timedelta


SPANS = {
    "1h": Span("1 hour", 12, timedelta(minutes=5)),
    "24h": Span("24 hours", 24, timedelta(hours=1)),
    "7d": Span("7 days", 28, timedelta(hours=6)),
    "14d": Span("14 days", 28, timedelta(hours=12)),
}


@dataclass
class Bar:
    """The counts from `start` on, for the length of a bar."""

    start: datetime
    end: datetime
    tally: Tally = field(default_factory=Tally)


@dataclass(frozen=True)
class Chart:
    """The counts of one subject in one span: their sum, and the bars from the oldest to the newest."""

    span: Span
    total: Tally
    bars: tuple[Bar, ...]
    clock: datetime
    """The database's clock when this was read. The last bar ends later."""
    gap: tuple[datetime, datetime] | None
    """The time that is not counted yet, after an outage or an upgrade."""
    is_cut: bool
    """True if more runs or messages ended since the last roll-up than a chart counts itself."""

    @property
    def since(self) -> datetime:
        return self.bars[0].start


class ChartHistory:
    """Reads the charts of one database. A chart takes at most seven queries, whatever the number of rows."""

    def __init__(self, store: Store, roll_up: RollUp) -> None:
        self._store, self._roll_up = store, roll_up

    def runs(self, worker: str | None = None, span: str = "24h") -> Chart:
        """Return the runs of `worker`, or of the fleet, by the time of their end. `span` is one of SPANS.

        The counts are by state. Ticks that did not run are not runs. Lengths are in seconds: the durations, and the
        lateness from a tick to the start of its first attempt.
        """
        return self._chart("worker", worker, SPANS[span], count_runs)

    def messages(self, topic: str | None = None, span: str = "24h") -> Chart:
        """Return the messages of `topic`, or of all topics: "enqueued", "done", "failed", "dead" and "discarded".

        "failed" counts failed attempts. Lengths are the latencies from due to done, in seconds.
        """
        return self._chart("topic", topic, SPANS[span], count_messages)

    def _chart(self, kind: str, name: str | None, span: Span, counts: Callable[..., Tallies]) -> Chart:
        clock, until = self._roll_up.counted()
        first = floor(clock, span.bar) - span.bars * span.bar
        bars = tuple(Bar(first + n * span.bar, first + (n + 1) * span.bar) for n in range(span.bars + 1))
        # Hours up to the last hour that is counted, then slots of five minutes, then the rows themselves.
        hours = _within(first, until.get(HOUR), clock) if span.bar >= HOUR else first
        since = max(hours, floor(clock - MINUTES_KEPT, MINUTES))
        minutes = _within(since, until.get(MINUTES), clock)
        newest = max(minutes, clock - _LONGEST_READ)
        for start, text in self._kept(kind, name or ALL, {HOUR: (first, hours), MINUTES: (since, minutes)}):
            bars[(start - first) // span.bar].tally.add_json(text)
        read = self._newest(counts, name or ALL, newest, clock, [each.start for each in bars])
        for start, tally in read:
            bars[(start - first) // span.bar].tally.add(tally)
        total = Tally()
        for bar in bars:
            total.add(bar.tally)
        is_cut = sum(tally.counts.total() for _, tally in read) >= _MOST_READ
        begin = hours if since > hours else minutes
        return Chart(span, total, bars, clock, (begin, newest) if newest > minutes or since > hours else None, is_cut)

    def _newest(
        self, counts: Callable[..., Tallies], name: str, since: datetime, clock: datetime, starts: list[datetime]
    ) -> list[tuple[datetime, Tally]]:
        """Count the rows from `since` on, separately for each bar."""
        edges = [since, *(start for start in starts if since < start < clock), clock]
        return [(edges[slot], tally) for (slot, _), tally in counts(self._store, edges, name, _MOST_READ).items()]

    def _kept(
        self, kind: str, name: str, stretches: Mapping[timedelta, tuple[datetime, datetime]]
    ) -> list[tuple[datetime, str]]:
        """Return the tallies of each length between its two moments, as JSON, with the starts of their slots."""
        is_of_length: list[ColumnElement[bool]] = []
        for length, (since, until) in stretches.items():
            starts = [since + n * length for n in range(max(0, -((since - until) // length)))]
            is_of_length.append(and_(tallies.c.seconds == int(length.total_seconds()), tallies.c.start.in_(starts)))
        is_ours = and_(tallies.c.kind == kind, tallies.c.name == name)
        rows = self._store.read(select(tallies.c.start, tallies.c.counts).where(or_(*is_of_length), is_ours))
        return [(row.start, row.counts) for row in rows]


def _within(least: datetime, at: datetime | None, most: datetime) -> datetime:
    return max(least, min(at or least, most))
