"""A schedule as a user types it: a period such as 90, 10 min or 1h30m, or the five fields of a cron."""

import re
from datetime import timedelta

from .cron_fields import LONGEST as MOST
from .cron_fields import refuse_useless_steps
from .errors import InvalidSchedule
from .schedule import LONGEST, Cron, Every, Schedule

_UNITS = {"ms": 0.001, "s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "minute": 60, "h": 3600, "hour": 3600}
_UNITS |= {"d": 86_400, "day": 86_400, "w": 604_800, "week": 604_800}
_PART = re.compile(r"([0-9]{1,10}(?:\.[0-9]{1,6})?)\s*([a-z]*)[\s,]*")


def typed_schedule(text: str, timezone: str = "") -> Schedule:
    """The schedule that `text` means; a number alone is seconds. Raises InvalidSchedule: one sentence."""
    text, timezone = text.strip(), timezone.strip()
    if not text:
        raise InvalidSchedule("There is nothing here; expected a period such as 90s, 10 min or 1h30m, or a cron.")
    if len(text) > MOST:
        raise InvalidSchedule(f"That is {len(text)} characters long; expected at most {MOST}: write ranges and steps.")
    seconds, is_cron = _seconds(text), text.startswith("@") or "TZ=" in text
    if seconds is not None or (len(text.split()) < 5 and not is_cron):
        return _every(text, seconds, timezone)
    refuse_useless_steps(text)
    return Cron(text, timezone or "UTC")


def _every(text: str, seconds: float | None, timezone: str) -> Schedule:
    if seconds is None:
        raise InvalidSchedule(
            f"{text!r} is neither a period nor a cron; expected a period such as 90s, 10 min or 1h30m, "
            "or a cron such as 30 2 * * *."
        )
    if not 1 <= seconds <= LONGEST.total_seconds():  # in code it may be less: here it is more likely a slip
        raise InvalidSchedule(f"{text!r} is out of range; expected a period of 1 second to 366 days.")
    if timezone:
        raise InvalidSchedule("A period has no time zone; expected one for a cron only: leave it empty.")
    return Every(timedelta(seconds=seconds))


def _seconds(text: str) -> float | None:
    """The sum of its parts; None for what is not a period."""
    total, rest = 0.0, text.lower().removeprefix("every").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", rest):
        return float(rest)
    if re.fullmatch(r"[a-z]+", rest):  # every minute
        rest = f"1 {rest}"
    while match := _PART.match(rest):
        unit = match[2] if match[2] in _UNITS else match[2].removesuffix("s")
        if unit not in _UNITS:
            return None
        total, rest = total + float(match[1]) * _UNITS[unit], rest[match.end() :]
    return None if rest else total
