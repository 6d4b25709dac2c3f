"""Arranges the executions of a worker by tick, and finds the ticks that left no execution."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any, NamedTuple

from ..history.records import Record, Window
from ..schedule.periods import MICROSECOND, Schedule

UNRECORDED = "no execution"
"""The state of a mark that stands for ticks without a row."""


@dataclass(frozen=True)
class Attempts:
    """The executions of one tick, the newest first. Or the one row of ticks that did not run."""

    records: tuple[Record, ...]


@dataclass(frozen=True)
class Gap:
    """Neighbouring ticks without a row."""

    first: datetime
    last: datetime


def by_tick(
    records: Sequence[Record], schedule: Schedule | None, scheduled_at: datetime, until: datetime
) -> Iterator[Attempts | Gap]:
    """Yield the ticks of `records` (newest first), and the gaps between them and up to `until`, newest first.

    `schedule` is in force since `scheduled_at`. Earlier gaps are not known. Without a schedule there are no gaps.
    """
    for (tick, trigger), same in groupby(records, key=lambda record: (record.tick, record.trigger)):
        attempts = tuple(same)
        if schedule and trigger == "schedule":
            yield from _gap(schedule, max(attempts[0].through or tick, scheduled_at), until)
            until = min(tick, until)
        yield Attempts(attempts)


def _gap(schedule: Schedule, after: datetime, until: datetime) -> Iterator[Gap]:
    first = schedule.next(after)
    if first < until:
        yield Gap(first, schedule.previous(until - MICROSECOND))


class Expected(NamedTuple):
    """A worker with ticks in a window. Each tick before `due` should have a row."""

    name: str
    schedule: Schedule
    due: datetime


def possible_gaps(window: Window, workers: Sequence[Expected]) -> Iterator[tuple[Expected, Gap]]:
    """Yield the ticks without a row in the window. A row outside the window may still explain them."""
    if not workers:
        return
    begin = window.complete_since - MICROSECOND
    rows: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(window.records, key=lambda record: record.tick, reverse=True):
        if (record.through or record.tick) > begin:
            rows[record.worker].append(record)
    edge = _mark("", Gap(begin, begin), window.clock)
    for worker in workers:
        until, known = min(window.until, worker.due), rows.get(worker.name)
        # After an outage, most workers have no row.
        found = by_tick([*known, edge], worker.schedule, begin, until) if known else _gap(worker.schedule, begin, until)
        for each in found:
            if isinstance(each, Gap):
                yield worker, each


def marks(worker: Expected, gap: Gap, rows: Sequence[Record], scheduled_at: datetime) -> Iterator[Record]:
    """Yield a mark for each part of the gap without a row. Also yield the rows that explain other ticks of the gap.

    `rows` are the newest rows up to the end of the gap, newest first. Ticks before these rows get no mark.
    """
    for each in by_tick(rows, worker.schedule, scheduled_at, gap.last + MICROSECOND):
        if isinstance(each, Gap):
            first = max(each.first, gap.first)
            if first <= each.last:
                yield _mark(worker.name, Gap(first, each.last), rows[0].clock)
        elif each.records[0].started_at is None and each.records[0].ended_at >= gap.first:
            yield each.records[0]


def _mark(name: str, gap: Gap, clock: datetime) -> Record:
    fields: dict[str, Any] = dict.fromkeys(Record._fields)
    fields |= {"id": 0, "worker": name, "tick": gap.first, "through": gap.last, "clock": clock}
    return Record(**fields | {"trigger": "schedule", "state": UNRECORDED, "is_gone": False})
