"""When a worker is due: periods aligned to the Unix epoch, and cron in a time zone.

A cron's wall-clock times become instants by the rule of Debian's cron(8), "Notes":

- A cron whose minute and hour are both fixed (neither starts with `*`) runs once for each of its times.
  A time that the clock skips in spring runs at the end of the gap; one that the clock repeats in autumn
  runs the first time. Several skipped times make one tick.
- Any other cron (a `*` in front of the minute or the hour) follows the clock as it shows: nothing in a
  gap, and in a repeated hour both times.

Unlike cron(8), which treats jumps of over three hours as corrections, jumps of any length count.
`cronsim` enumerates the wall-clock times only. Its own zone handling is not used: asked from within the
repeated hour it answers with the past, it errs in zones that jump by half an hour or at midnight, and in
reverse it skips the repeated hour's tick and loops for ever over a skipped day (Apia, 2011).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from ..errors import InvalidSchedule

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
SECOND = timedelta(seconds=1)
SHORTEST = timedelta(milliseconds=1)  # what SQLite's clock can tell apart
LONGEST = timedelta(days=366)  # beyond it people mean the calendar, which is cron's
UNITS = {
    "day": timedelta(days=1),
    "hour": timedelta(hours=1),
    "minute": timedelta(minutes=1),
    "second": SECOND,
}


class Schedule(ABC):
    """An endless row of ticks. Immutable, and equal to every schedule of the same text."""

    @abstractmethod
    def next(self, at: datetime) -> datetime:
        """The first tick after `at`; both aware, the answer in UTC."""

    @abstractmethod
    def previous(self, at: datetime) -> datetime:
        """The last tick at or before `at`; both aware, the answer in UTC."""

    @abstractmethod
    def __str__(self) -> str:
        """The canonical text, which the database keeps and `parse_schedule` reads."""

    @abstractmethod
    def describe(self) -> str:
        """The schedule in words for people."""

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other) if isinstance(other, Schedule) else NotImplemented

    def __hash__(self) -> int:
        return hash(str(self))


@dataclass(frozen=True, eq=False)
class Every(Schedule):
    """Ticks at whole multiples of `period` since 1970-01-01T00:00Z, which was a Thursday."""

    period: timedelta

    def __post_init__(self) -> None:
        _check_period(self.period)

    def next(self, at: datetime) -> datetime:
        return self.previous(at) + self.period

    def previous(self, at: datetime) -> datetime:
        return EPOCH + (at - EPOCH) // self.period * self.period  # timedelta // timedelta is an exact int

    def __str__(self) -> str:
        return f"every {_decimal_seconds(self.period)}s"

    def describe(self) -> str:
        fitting = ((name, unit) for name, unit in UNITS.items() if not self.period % unit)
        name, unit = next(fitting, ("second", SECOND))
        if self.period == unit:
            return f"every {name}"
        count = self.period // unit if unit > SECOND else _decimal_seconds(self.period)
        return f"every {count} {name}s"


def _decimal_seconds(period: timedelta) -> str:
    whole, rest = divmod(period // MICROSECOND, 1_000_000)
    return f"{whole}.{rest:06}".rstrip("0").rstrip(".")


def _check_period(period: object) -> None:
    if isinstance(period, int | float):
        raise InvalidSchedule(f"period {period!r} is a number: write timedelta(seconds={period!r}).")
    if not isinstance(period, timedelta):
        raise InvalidSchedule(f"period {period!r} is not a timedelta: write timedelta(minutes=10), say.")
    if not SHORTEST <= period <= LONGEST:
        raise InvalidSchedule(
            f"period {period} is out of range: expected a millisecond to 366 days; "
            "write timedelta(minutes=10), say, or a cron for rarer dates."
        )
