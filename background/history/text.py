"""Writes moments and lengths of time for people, and reads moments and numbers that people write."""

import json
from contextlib import suppress
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

from ..errors import spelled_out
from ..host import strict_json
from ..schedule.cron import check_timezone
from .instances import Silence
from .records import Record

WIDEST = 120  # characters of one cell
_EARLIEST, _LATEST = datetime(1970, 1, 2, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)  # of a question


def moment(at: datetime | None, zone: tzinfo | None = UTC) -> str:
    """Write ISO 8601, as `why --at` reads it. Leave out a fraction of zero. None is the zone of this machine."""
    if at is None:
        return "-"
    is_in_milliseconds = at.microsecond and not at.microsecond % 1000
    text = in_zone(at, zone).isoformat(timespec="milliseconds" if is_in_milliseconds else "auto")
    return f"{text[:-6]}Z" if text.endswith("+00:00") else text


def in_zone(at: datetime, zone: tzinfo | None) -> datetime:
    """Return the moment on the clock of the zone. None is the zone of this machine."""
    if at.tzinfo is zone:
        return at
    with suppress(OverflowError, ValueError, OSError):  # the end of the calendar
        return at.astimezone(zone)
    return at


def moment_in(text: str, zone: str = "UTC") -> datetime:
    """Read ISO 8601, in `zone` if it names no zone. Raises ValueError with a sentence, and InvalidSchedule."""
    check_timezone(zone)
    with suppress(ValueError, OverflowError):
        given = datetime.fromisoformat(text.strip())
        at = (given if given.tzinfo else given.replace(tzinfo=ZoneInfo(zone))).astimezone(UTC)
        if _EARLIEST <= at <= _LATEST:
            return at
    raise ValueError(
        f"{text!r} is not a moment from {_EARLIEST.year} to {_LATEST.year - 1}; expected one in ISO 8601, such as "
        "2026-11-20T12:00Z."
    )


def whole_number(text: str) -> int | None:
    """Read a whole number in ASCII digits. None for any other text."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 1_000 else None


def second(at: datetime | None, zone: tzinfo | None = UTC) -> str:
    """Write the moment in whole seconds. For moments that are not ticks."""
    return moment(at.replace(microsecond=0) if at else None, zone)


def span(length: timedelta) -> str:
    """Write a length of time: 0.031 s, 12.3 s, 5 min 3 s, 2 h 5 min or 3 d 4 h."""
    seconds = max(length.total_seconds(), 0.0)
    if seconds < 60:
        return f"{seconds:.3f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    largest = next(index for index, (count, _) in enumerate(parts) if count)
    return " ".join(f"{count} {unit}" for count, unit in parts[largest : largest + 2] if count)


def ahead(seconds: float | None) -> str:
    """Write by how much a clock is ahead of the database's: +0.012 s. A clock never compared has +0.000 s."""
    return f"{round(seconds or 0.0, 3) + 0.0:+.3f} s"  # no -0.000


def silent(silence: Silence) -> str:
    """Say that no instance is alive, since when, and the command that starts one."""
    if silence.last is None or silence.length is None:
        return "No instance is alive, and none is known: no worker runs. `flask workers run` starts one."
    left = f"{spelled_out(silence.last.name)} {'signed off' if silence.last.signed_off_at else 'was last seen'}"
    since = f"since {second(silence.since)} ({span(silence.length)}), when {left}"
    return f"No instance has been alive {since}: no worker runs. `flask workers run` starts one."


def progress(record: Record) -> str:
    """Write the progress that the run reported."""
    done = done_of(record.progress_done, record.progress_total)
    return f" ({done} done)" if done else ""


def done_of(done: float | None, total: float | None) -> str:
    """Write a progress as "3 of 60". Empty if the run reported none."""
    return "" if done is None else f"{done:,.0f}" + (f" of {total:,.0f}" if total else "")


def cancelled(at: datetime | None, by: str | None) -> str:
    """Say that a user cancelled a run, and which user did. Empty if no user did."""
    return f"cancelled{f' by {by}' if by else ''} at {second(at)}" if at else ""


def decided(count: int, one: str, many: str) -> str:
    """Count the messages that a user retried or discarded: "1 message waits again.", "3 messages wait again."."""
    return f"{count:,} message{f' {one}' if count == 1 else f's {many}'}." if count else "No message is dead."


def changed(changed: int, left: int, is_complete: bool, one: str, many: str) -> str:
    """Say how many messages a user changed, and how many stayed as they were."""
    said = [
        f"{changed:,} message{f' {one}' if changed == 1 else f's {many}'}." if changed else "No message was changed."
    ]
    if left:
        said.append(
            f"{left:,} stayed as {'it was' if left == 1 else 'they were'}: running, done, or changed meanwhile."
        )
    if not is_complete:
        said.append("More may match: repeat the change.")
    return " ".join(said)


def postponed(count: int, reason: str | None) -> str:
    """Say how often a handler raised `Later` for its message, and the reason that it gave last."""
    times = "once" if count == 1 else f"{count:,} times"
    return f"postponed {times}{f': {reason}' if reason else ''}"


def indented(value: Any) -> str:
    """Write JSON over several lines. Characters that are invisible or steer a terminal become escapes."""
    text = strict_json.dumps(value, indent=2, ensure_ascii=False)
    return "".join(each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text)


def clipped(text: str, most: int = WIDEST) -> str:
    """Shorten the text to at most `most` printable characters."""
    text = spelled_out(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"
