"""Cron in a time zone.

A cron's wall-clock times become instants by the rule of Debian's cron(8), "Notes":

- In a fixed cron, neither the minute nor the hour starts with `*`. It runs once for each of its times. A time that the
  clock skips in spring runs at the end of the gap. Several skipped times make one tick. A time that the clock repeats
  in autumn runs the first time.
- Any other cron follows the clock. It does not run in a gap, and it runs both times in a repeated hour.

cron(8) treats jumps of over three hours as corrections. Here jumps of any length count.
`cronsim` lists the wall-clock times only. Its zone handling is not used, for these reasons. From within the repeated
hour it returns a past time. It errs in zones that jump by half an hour or at midnight. In reverse it skips the tick of
the repeated hour, and loops for ever over a skipped day (Apia, 2011).
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from zoneinfo import ZoneInfo, available_timezones

from ..errors import InvalidSchedule
from .cron_fields import canonical
from .periods import LAST, MICROSECOND, SECOND, Schedule

HORIZON = timedelta(days=50 * 366)  # the rarest cron fires every 40 years


@dataclass(frozen=True, eq=False)
class Cron(Schedule):
    """Ticks where the wall clock of `timezone` matches the five fields of `expression`."""

    expression: str
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        object.__setattr__(self, "expression", canonical(self.expression))
        check_timezone(self.timezone)
        self.next(datetime(2000, 1, 1, tzinfo=UTC))  # raises if it never fires

    def next(self, at: datetime) -> datetime:
        try:
            return self._next(at)
        except OverflowError:
            return LAST

    def _next(self, at: datetime) -> datetime:
        local, overlap = self._locate(at)
        found: list[datetime] = []
        for wall in self._walls(local - overlap):
            found += [tick for tick in self._instants(wall) if tick > at]
            if found and wall > local:
                return min(found)
        raise self._never_fires()

    def previous(self, at: datetime) -> datetime:
        local, overlap = self._locate(at)
        found: list[datetime] = []
        for wall in self._walls(local + overlap + MICROSECOND, reverse=True):
            found += [tick for tick in self._instants(wall) if tick <= at]
            if found and wall <= local:
                return max(found)
        raise self._never_fires()

    def __str__(self) -> str:
        return f"cron {self.expression} {self.timezone}"

    def describe(self) -> str:
        return f"at {self.expression} ({self.timezone})"

    def in_words(self) -> str:
        from cronsim import CronSim  # deferred, as in `_walls`

        words: str = CronSim(self.expression, datetime(2000, 1, 1)).explain()  # noqa: DTZ001 - a wall clock's time
        return f"{words[0].lower()}{words[1:]} ({self.timezone})"

    def local(self, tick: datetime) -> datetime:
        return tick.astimezone(ZoneInfo(self.timezone))

    def oddity(self, tick: datetime) -> str:
        wall = self.local(tick)
        first, second = self._readings(wall.replace(tzinfo=None, fold=0))
        if first != second:
            times = "both times" if len(self._instants(wall.replace(tzinfo=None, fold=0))) == 2 else "the first time"
            return f"the clocks show this time twice, and it runs {times}"
        if next(self._walls(wall.replace(tzinfo=None) - SECOND)) != wall.replace(tzinfo=None):
            return "the clocks skip its time, so it runs right after the gap"
        return ""

    def _locate(self, at: datetime) -> tuple[datetime, timedelta]:
        """Return the wall clock's time at `at`, and the length of the overlap if the clock shows that time twice."""
        local = at.astimezone(ZoneInfo(self.timezone)).replace(tzinfo=None)
        first, second = self._readings(local)
        return local, max(second - first, timedelta())

    def _walls(self, start: datetime, reverse: bool = False) -> Iterator[datetime]:
        """Yield the matching wall-clock times after (or before) `start`, as if the clock never jumped."""
        from cronsim import CronSim  # deferred, as an application without a cron needs no cron parser

        for wall in CronSim(self.expression, start, reverse=reverse):
            if abs(wall - start) > HORIZON:
                return
            yield wall

    def _instants(self, wall: datetime) -> list[datetime]:
        """Return the instants of the wall-clock time `wall`, by the module's rule: none, one or two."""
        first, second = self._readings(wall)
        if first == second:
            return [first]
        fixed = not any(field.startswith("*") for field in self.expression.split()[:2])
        if first < second:
            return [first] if fixed else [first, second]
        return [self._end_of_gap(wall, second, first)] if fixed else []

    def _readings(self, wall: datetime) -> tuple[datetime, datetime]:
        """Return `wall` by the zone's offsets before and after a jump.

        Both are equal if there is no jump. In a gap the first is later than the second.
        """
        zone = ZoneInfo(self.timezone)
        first, second = (wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
        return first, second

    def _end_of_gap(self, wall: datetime, before: datetime, after: datetime) -> datetime:
        """Return the second, between `before` and `after`, at which the clock jumps over `wall`."""

        def has_jumped(seconds: int) -> bool:
            return self._locate(before + seconds * SECOND)[0] > wall

        return before + SECOND * bisect_left(range((after - before) // SECOND), True, key=has_jumped)

    def _never_fires(self) -> InvalidSchedule:
        return InvalidSchedule(
            f"cron {self.expression!r} never fires in {self.timezone}: expected a date that exists, "
            "at a time that the zone's clock shows; change its day, month or hour."
        )


def check_timezone(timezone: str) -> None:
    """Raise InvalidSchedule if `timezone` is not an IANA name."""
    try:
        ZoneInfo(timezone)
    except (KeyError, ValueError, OSError):  # unknown, a path, a folder such as "Europe"
        names = {name.lower(): name for name in available_timezones()}
        close = get_close_matches(timezone.lower(), names, n=1)
        hint = f"Did you mean {names[close[0]]!r}?" if close else "Write 'Europe/Berlin', for example."
        raise InvalidSchedule(f"timezone {timezone!r} is not in the time zone database. {hint}") from None
