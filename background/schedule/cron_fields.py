"""Reads the five fields of a user's cron, or refuses them with an error that names the remedy."""

import re
from datetime import datetime
from typing import NamedTuple

from ..errors import InvalidSchedule

MOST_CHARACTERS = 150  # characters. With the longest zone, a schedule still fits into its column


class Field(NamedTuple):
    """One field, with its possible values and their names."""

    first: int
    last: int
    expected: str
    names: tuple[str, ...] = ()

    def number(self, text: str) -> int | None:
        """Return the value that `text` stands for, or None."""
        if text in self.names:
            return self.first + self.names.index(text)
        return int(text) if text.isdecimal() and len(text) < 5 else None

    def text(self, number: int, like: str) -> str:
        """Return the value as text. Use its name if `like` is a name."""
        return self.names[number - self.first] if like in self.names else str(number)


_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_DAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
FIELDS = {
    "minute": Field(0, 59, "0-59"),
    "hour": Field(0, 23, "0-23"),
    "day-of-month": Field(1, 31, "1-31 (or L, the last) and a day that one of its months has"),
    "month": Field(1, 12, "1-12 or JAN-DEC", _MONTHS),
    "day-of-week": Field(0, 7, "0-7 or SUN-SAT (0 and 7 are Sunday), ranges upwards", _DAYS),
}
_UNITS = {"minute": "minutes", "hour": "hours", "day-of-month": "days", "day-of-week": "days"}
_NICKNAMES = {
    "@YEARLY": "write '0 0 1 1 *'",
    "@ANNUALLY": "write '0 0 1 1 *'",
    "@MONTHLY": "write '0 0 1 * *'",
    "@WEEKLY": "write '0 0 * * 0'",
    "@DAILY": "write '0 0 * * *'",
    "@MIDNIGHT": "write '0 0 * * *'",
    "@HOURLY": "write '0 * * * *'",
    "@EVERY": "write a period instead, such as period = timedelta(minutes=5)",
    "@REBOOT": "a start of the host is not a tick, so write a period or a cron",
}


def canonical(expression: object) -> str:
    """Return the expression in the form that is stored. Raises InvalidSchedule if a field cannot be read."""
    if not isinstance(expression, str):
        raise InvalidSchedule(f"cron {expression!r} is not a string: write '30 2 * * *', for example.")
    if len(expression) > MOST_CHARACTERS:
        raise InvalidSchedule(
            f"cron {expression!r:.50} is {len(expression)} characters long: expected at most {MOST_CHARACTERS}; "
            "write ranges and steps."
        )
    fields = expression.upper().split()
    if fields and fields[0].startswith(("TZ=", "CRON_TZ=")):
        zone, *rest = expression.split()
        raise InvalidSchedule(
            f"cron {expression!r} begins with a time zone: expected the five fields only; "
            f"write cron = {' '.join(rest) or '0 0 * * *'!r} and timezone = {zone.partition('=')[2]!r}."
        )
    if len(fields) in (6, 7):
        raise InvalidSchedule(
            f"cron {expression!r} has {len(fields)} fields, the first for seconds: {_remedy_for(fields)}"
        )
    if len(fields) != 5:
        remedy = _NICKNAMES.get(fields[0] if fields else "", "'0 0 * * *' is daily")
        expected = f"expected five ({', '.join(FIELDS)})"
        raise InvalidSchedule(f"cron {expression!r} has {len(fields)} field(s): {expected}; {remedy}.")
    if bad := _bad_field(" ".join(fields)):
        value = fields[list(FIELDS).index(bad)]
        upwards = _upwards(FIELDS[bad], value)
        remedy = f"; the range goes downwards, so write {upwards!r}" if upwards else ""
        raise InvalidSchedule(f"cron {expression!r} has the {bad} {value!r}: expected {FIELDS[bad].expected}{remedy}.")
    return " ".join(fields)


def refuse_useless_steps(expression: object) -> None:
    """Raise InvalidSchedule for a step beyond its field, such as `*/90`, which cron reads as 0.

    A stored schedule may have such a step, and keeps its meaning.
    """
    for (name, field), value in zip(FIELDS.items(), canonical(expression).split(), strict=True):
        for step in map(int, re.findall(r"/([0-9]+)", value)):
            if step > field.last:
                period = f"period = timedelta({_UNITS[name]}={step}) or " if name in _UNITS else ""
                raise InvalidSchedule(
                    f"cron {expression!r} has the {name} {value!r}, a step beyond the field: expected a step of at "
                    f"most {field.last}; write {period}the first value alone, {str(field.first)!r}."
                )


def _bad_field(expression: str) -> str | None:
    """Return the name of the first field that cannot be read, or None."""
    from cronsim import CronSim, CronSimError

    try:
        CronSim(expression, datetime(2000, 1, 1))  # noqa: DTZ001 - a wall-clock time
    except CronSimError as error:
        return str(error).removeprefix("Bad ")
    return None


def _upwards(field: Field, value: str) -> str | None:
    """Return the same values with each range upwards: 22-6 is 22-23,0-6. None if each range goes upwards."""
    terms = [_term_upwards(field, term) for term in value.split(",")]
    return ",".join(terms) if terms != value.split(",") else None


def _term_upwards(field: Field, term: str) -> str:
    match = re.fullmatch(r"([0-9A-Z]+)-([0-9A-Z]+)(?:/([0-9]{1,4}))?", term)
    if match is None:
        return term
    start, end = field.number(match[1]), field.number(match[2])
    last = min(field.last, field.first + len(field.names) - 1) if field.names else field.last
    if start is None or end is None or not field.first <= end < start <= last:
        return term
    if match[3]:
        around = [*range(start, last + 1), *range(field.first, end + 1)][:: max(int(match[3]), 1)]
        return ",".join(field.text(each, match[1]) for each in around)
    ranges = ((start, last), (field.first, end))
    return ",".join(
        field.text(low, match[1]) if low == high else f"{field.text(low, match[1])}-{field.text(high, match[1])}"
        for low, high in ranges
    )


def _remedy_for(quartz: list[str]) -> str:
    """Return the remedy for Quartz's six or seven fields: seconds first, perhaps a year last, and Sunday as 1."""
    seconds, *fields = quartz
    if not seconds.isdecimal():
        return "expected five; for less than a minute write a period, such as timedelta(seconds=10)."
    if "?" in fields:  # only Quartz has it
        fields[4] = re.sub(r"(?<![#/0-9])[1-7]", lambda day: str(int(day[0]) - 1), fields[4])
    five = " ".join(fields[:5]).replace("?", "*")
    return f"expected five ({', '.join(FIELDS)})." if _bad_field(five) else f"expected five; write {five!r}."
