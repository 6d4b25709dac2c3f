"""Schedules, and periods that are aligned to the Unix epoch."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from ..errors import InvalidSchedule

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LAST = datetime.max.replace(tzinfo=UTC)
"""The end of the calendar. It stands for each later tick, which only a row that a user edited can lead to."""
MICROSECOND = timedelta(microseconds=1)
SECOND = timedelta(seconds=1)
SHORTEST = timedelta(milliseconds=1)  # the resolution of SQLite's clock
LONGEST = timedelta(days=366)  # for rarer dates a user means the calendar, and needs a cron
UNITS = {"day": timedelta(days=1), "hour": timedelta(hours=1), "minute": timedelta(minutes=1), "second": SECOND}


class Schedule(ABC):
    """An endless sequence of ticks. Immutable, and equal to each schedule with the same text."""

    @abstractmethod
    def next(self, at: datetime) -> datetime:
        """Return the first tick after the aware `at`, in UTC."""

    @abstractmethod
    def previous(self, at: datetime) -> datetime:
        """Return the last tick at or before the aware `at`, in UTC."""

    def following(self, at: datetime, count: int) -> list[datetime]:
        """Return the first `count` ticks after the aware `at`. The end of the calendar is not a tick."""
        ticks: list[datetime] = []
        while len(ticks) < count and (at := self.next(at)) < LAST:
            ticks.append(at)
        return ticks

    @abstractmethod
    def __str__(self) -> str:
        """Return the canonical text, which the database keeps and `parse_schedule` reads."""

    @abstractmethod
    def describe(self) -> str:
        """Return the schedule in words for people."""

    def in_words(self) -> str:
        """Return the schedule as a sentence, without the fields of a cron."""
        return self.describe()

    def local(self, tick: datetime) -> datetime:
        """Return the tick on the wall clock of the schedule's zone."""
        return tick

    def oddity(self, tick: datetime) -> str:
        """Return how a change of the clocks affects the tick. Empty if it does not."""
        return ""

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
        try:
            return self.previous(at) + self.period
        except OverflowError:
            return LAST

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
        raise InvalidSchedule(f"period {period!r} is not a timedelta: write timedelta(minutes=10), for example.")
    if not SHORTEST <= period <= LONGEST:
        raise InvalidSchedule(
            f"period {period} is out of range: expected a millisecond to 366 days; "
            "write timedelta(minutes=10), for example, or a cron for rarer dates."
        )
