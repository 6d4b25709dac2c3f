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

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from zoneinfo import ZoneInfo, available_timezones

from ..errors import InvalidSchedule
from .cron_fields import canonical
from .periods import MICROSECOND, SECOND, Schedule

HORIZON = timedelta(days=50 * 366)  # the rarest cron there is fires every 40 years


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

    def _locate(self, at: datetime) -> tuple[datetime, timedelta]:
        """What the wall clock shows at `at`, and by how much it will repeat, or repeats, that time."""
        local = at.astimezone(ZoneInfo(self.timezone)).replace(tzinfo=None)
        first, second = self._readings(local)
        return local, max(second - first, timedelta())

    def _walls(self, start: datetime, reverse: bool = False) -> Iterator[datetime]:
        """The matching wall-clock times after (or before) `start`, as if clocks never jumped."""
        from cronsim import CronSim  # late: an application without a cron needs no cron parser

        for wall in CronSim(self.expression, start, reverse=reverse):
            if abs(wall - start) > HORIZON:
                return
            yield wall

    def _instants(self, wall: datetime) -> list[datetime]:
        """When the wall clock's `wall` happens, by the module's rule: never, once or twice."""
        first, second = self._readings(wall)
        if first == second:
            return [first]
        fixed = not any(field.startswith("*") for field in self.expression.split()[:2])
        if first < second:
            return [first] if fixed else [first, second]
        return [self._end_of_gap(wall, second, first)] if fixed else []

    def _readings(self, wall: datetime) -> tuple[datetime, datetime]:
        """`wall` by the offsets before and after a jump: equal elsewhere, in reverse order in a gap."""
        zone = ZoneInfo(self.timezone)
        first, second = (wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
        return first, second

    def _end_of_gap(self, wall: datetime, before: datetime, after: datetime) -> datetime:
        """The second, between the two, in which the clock jumps over `wall`."""

        def has_jumped(seconds: int) -> bool:
            return self._locate(before + seconds * SECOND)[0] > wall

        return before + SECOND * bisect_left(range((after - before) // SECOND), True, key=has_jumped)

    def _never_fires(self) -> InvalidSchedule:
        return InvalidSchedule(
            f"cron {self.expression!r} never fires in {self.timezone}: expected a date that exists, "
            "at a time that the zone's clock shows; change its day, month or hour."
        )


def check_timezone(timezone: str) -> None:
    """Raise InvalidSchedule for what is not an IANA name."""
    try:
        ZoneInfo(timezone)
    except (KeyError, ValueError, OSError):  # unknown, a path, a folder such as "Europe"
        names = {name.lower(): name for name in available_timezones()}
        close = get_close_matches(timezone.lower(), names, n=1)
        hint = f"Did you mean {names[close[0]]!r}?" if close else "Write 'Europe/Berlin', say."
        raise InvalidSchedule(f"timezone {timezone!r} is not in the time zone database. {hint}") from None
