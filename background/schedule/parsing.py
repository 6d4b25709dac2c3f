"""Schedules from a worker's attributes, from stored text, and from a user's text."""

import re
from datetime import timedelta, tzinfo
from functools import lru_cache
from typing import Any

from ..errors import InvalidSchedule
from .cron import Cron
from .cron_fields import MOST_CHARACTERS, refuse_useless_steps
from .periods import LONGEST, Every, Schedule


def make_schedule(owner: str, period: timedelta | None, cron: str | None, timezone: str | tzinfo | None) -> Schedule:
    """Return the schedule that the worker `owner` declares. Raises InvalidSchedule."""
    try:
        return _make(period, cron, timezone)
    except InvalidSchedule as error:
        raise InvalidSchedule(f"Worker {owner!r}: {error}") from None


def _make(period: timedelta | None, cron: str | None, timezone: str | tzinfo | None) -> Schedule:
    if period is not None and cron is not None:
        raise InvalidSchedule(f"it has both a period ({period}) and a cron ({cron!r}): keep one of them.")
    if cron is not None:
        refuse_useless_steps(cron)
        return Cron(cron, "UTC" if timezone is None else str(timezone))
    if period is None:
        raise InvalidSchedule("it has neither a period nor a cron: write period = timedelta(minutes=10), for example.")
    if timezone is not None:
        raise InvalidSchedule(f"timezone {str(timezone)!r} has no use without a cron: remove it, or write a cron.")
    return Every(period)


@lru_cache(maxsize=1024)
def parse_schedule(text: str) -> Schedule:
    """Return the schedule whose `str()` is `text`. Raises InvalidSchedule."""
    try:
        return _parse(text)
    except InvalidSchedule as error:
        raise InvalidSchedule(f"The stored schedule {text!r} cannot be used: {error}") from None


def _parse(text: str) -> Schedule:
    if match := re.fullmatch(r"every ([0-9]{1,10})(?:\.([0-9]{1,6}))?s", text):
        return Every(timedelta(seconds=int(match[1]), microseconds=int((match[2] or "").ljust(6, "0"))))
    if match := re.fullmatch(r"cron (.+) (\S+)", text):
        return Cron(match[1], match[2])
    raise InvalidSchedule("expected 'every <seconds>s' or 'cron <five fields> <timezone>'.")


_UNITS = {"ms": 0.001, "s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "minute": 60, "h": 3600, "hour": 3600}
_UNITS |= {"d": 86_400, "day": 86_400, "w": 604_800, "week": 604_800}
_PART = re.compile(r"([0-9]{1,10}(?:\.[0-9]{1,6})?)\s*([a-z]*)[\s,]*")


def typed_schedule(text: str, timezone: str = "") -> Schedule:
    """Return the schedule that a user's `text` means. A number alone is seconds. Raises InvalidSchedule."""
    text, timezone = text.strip(), timezone.strip()
    if not text:
        raise InvalidSchedule("The schedule is empty; expected a period such as 90s, 10 min or 1h30m, or a cron.")
    if len(text) > MOST_CHARACTERS:
        raise InvalidSchedule(
            f"The schedule is {len(text)} characters long; expected at most {MOST_CHARACTERS}: write ranges and steps."
        )
    seconds, is_cron = _seconds(text), text.startswith("@") or "TZ=" in text
    if seconds is not None or (len(text.split()) < 5 and not is_cron):
        return _every(text, seconds, timezone)
    refuse_useless_steps(text)
    return Cron(text, timezone or "UTC")


def as_arguments(schedule: Schedule) -> dict[str, Any]:
    """Return the schedule as arguments of the manager's `reschedule`."""
    if isinstance(schedule, Cron):
        return {"cron": schedule.expression, "timezone": schedule.timezone}
    return {"period": schedule.period} if isinstance(schedule, Every) else {}


def _every(text: str, seconds: float | None, timezone: str) -> Schedule:
    if seconds is None:
        raise InvalidSchedule(
            f"{text!r} is neither a period nor a cron; expected a period such as 90s, 10 min or 1h30m, "
            "or a cron such as 30 2 * * *."
        )
    if not 1 <= seconds <= LONGEST.total_seconds():  # less is allowed in code, but here it is probably a mistake
        raise InvalidSchedule(f"{text!r} is out of range; expected a period of 1 second to 366 days.")
    if timezone:
        raise InvalidSchedule("A period has no time zone; expected one for a cron only: leave it empty.")
    return Every(timedelta(seconds=seconds))


def _seconds(text: str) -> float | None:
    """Return the seconds of a period such as 1h30m. None if `text` is not a period."""
    total, rest = 0.0, text.lower().removeprefix("every").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", rest):
        return float(rest)
    if re.fullmatch(r"[a-z]+", rest):  # a unit alone, as in "every minute"
        rest = f"1 {rest}"
    while match := _PART.match(rest):
        unit = match[2] if match[2] in _UNITS else match[2].removesuffix("s")
        if unit not in _UNITS:
            return None
        total, rest = total + float(match[1]) * _UNITS[unit], rest[match.end() :]
    return None if rest else total
