"""A filter of messages, as a user writes it."""

from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timedelta
from typing import Any, Self

from sqlalchemy import ColumnElement, ScalarSelect, and_, func, literal_column, or_, select

from ...database.clock import now
from ...database.tables import is_in, message_errors

SEARCHED_TEXT = 4_000  # characters of a payload
STATES = ("waiting", "delayed", "retrying", "postponed", "running", "done", "dead", "discarded")
"""The states of messages, and three kinds of waiting messages."""
_clock = select(now()).scalar_subquery()
_HOUR, _DAY = timedelta(hours=1), timedelta(days=1)
YOUNGER = {"1h": ("in the last hour", _HOUR), "1d": ("in the last day", _DAY), "7d": ("in the last week", 7 * _DAY)}
OLDER = {
    "over-1h": ("over an hour ago", _HOUR),
    "over-1d": ("over a day ago", _DAY),
    "over-7d": ("over a week ago", 7 * _DAY),
}
_LONGEST = 200


@dataclass(frozen=True)
class Filter:
    """The messages that a user looks for. An empty field matches every message."""

    topic: str = ""
    state: str = ""
    """One of STATES."""
    key: str = ""
    """The whole key."""
    error: str = ""
    """A part of the last error."""
    text: str = ""
    """A part of the payload's JSON, within its first SEARCHED_TEXT characters."""
    age: str = ""
    """One of YOUNGER or OLDER: the time since the message was enqueued."""

    def cleaned(self) -> Self:
        """Return the filter with texts that a database takes, and without unknown states and ages."""
        texts = {name: "".join(filter(str.isprintable, text))[:_LONGEST] for name, text in asdict(self).items()}
        known = {"state": STATES, "age": YOUNGER.keys() | OLDER.keys()}
        return replace(
            self, **texts | {name: texts[name] if texts[name] in names else "" for name, names in known.items()}
        )

    def as_dict(self) -> dict[str, str]:
        """Return the fields that are not empty, for an address or a form."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name))}

    def conditions(self, columns: Any) -> list[ColumnElement[bool]]:
        """Return the conditions that a message's `columns` meet if it matches."""
        found: list[ColumnElement[bool]] = []
        if self.topic:
            found.append(columns.topic == self.topic)
        if self.state:
            found.append(in_state(self.state, columns))
        if self.key:
            found.append(columns.key == self.key)
        since, until = bounds(self.age)
        if since is not None:
            found.append(columns.enqueued_at > since)
        if until is not None:
            found.append(columns.enqueued_at <= until)
        if self.text:
            found.append(func.substr(columns.payload, 1, SEARCHED_TEXT).icontains(self.text, autoescape=True))
        if self.error:
            found.append(newest_error(columns.id).icontains(self.error, autoescape=True))
        return found


def in_state(state: str, columns: Any) -> ColumnElement[bool]:
    """Return whether the state is that one of STATES, by literals, as `is_in` does."""
    is_waiting = is_in("waiting", columns)
    has_failed, was_postponed = columns.attempt > literal_column("0"), columns.postponed > literal_column("0")
    is_tried = and_(is_waiting, or_(has_failed, was_postponed))  # the condition of their index
    kinds = {
        "delayed": and_(is_waiting, columns.due_at > _clock),
        "retrying": and_(is_tried, has_failed),
        "postponed": and_(is_tried, was_postponed),
    }
    return kinds[state] if state in kinds else is_in(state, columns)


def newest_error(id: ColumnElement[int]) -> ScalarSelect[str]:
    """Select the last error of the message with that id."""
    of_message = select(message_errors.c.error).where(message_errors.c.message == id)
    return of_message.order_by(message_errors.c.id.desc()).limit(1).scalar_subquery()


def bounds(age: str) -> tuple[ColumnElement[datetime] | None, ColumnElement[datetime] | None]:
    """Return the moments since which, and until which, the messages of that age were enqueued."""
    since = _ago(YOUNGER[age][1]) if age in YOUNGER else None
    return since, _ago(OLDER[age][1]) if age in OLDER else None


def _ago(length: timedelta) -> ColumnElement[datetime]:
    return select(now(-length)).scalar_subquery()
