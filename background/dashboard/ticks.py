"""Arranges the executions of a worker by tick, and finds the ticks that left no execution."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby

from ..history.records import Record
from ..schedule.periods import MICROSECOND, Schedule


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
            first = schedule.next(max(attempts[0].through or tick, scheduled_at))
            if first < until:
                yield Gap(first, schedule.previous(until - MICROSECOND))
            until = min(tick, until)
        yield Attempts(attempts)
