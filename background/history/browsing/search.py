"""The search for messages. Each search looks at no more than MOST_SEARCHED messages."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, case, func, or_, select, union_all

from ...database.clock import last_until
from ...database.store import Store
from ...database.tables import message_errors, messages
from ...errors import error_line
from ..executions import MOST_SEARCHED
from ..records import ErrorGroup, Place, grouped
from .filters import Filter, bounds, in_state

MOST_GROUPED = 1_000
_MOST_TOPICS = 100  # with an index for each
_TAIL = 1_000  # characters at the end of an error, which has its last line
_place = select(messages.c.due_at, messages.c.id)
_BY_DUE, _BY_ID = ("waiting", "delayed"), ("retrying", "postponed", "dead")
"""The states whose index begins with the topic, by the order of their index."""


class Found(NamedTuple):
    """The messages that one search found, by their ids."""

    ids: list[int]
    """In the order of the list: those that are due first, or the newest."""
    rest: Place | None
    """The place where the next search begins. None if this search looked at every message."""


def search(store: Store, filter: Filter, topics: Sequence[str], after: Place | None = None) -> Found:
    """Find the messages that match, behind the place `after`.

    `topics` are the topics that may have such messages. Waiting messages come in the order in which they are due.
    All other messages come from the newest to the oldest.
    """
    order = ("id", "due_at") if filter.state in _BY_DUE else ("id",)
    further = replace(filter, topic="", state="") if _has_index(filter, topics) else filter
    places, window = (_window(filter, topics, after, names) for names in (order, {*order, *_read_by(further)}))
    if places is None or window is None:
        return Found([], None)
    end = places.order_by(*_order(filter, places.selected_columns)).offset(MOST_SEARCHED - 1).limit(1).subquery()
    [last] = store.read(_place.where(messages.c.id == select(end.c.id).scalar_subquery())) or [None]
    within = window.order_by(*_order(filter, window.selected_columns)).limit(MOST_SEARCHED).subquery()
    query = select(within.c.id).where(*further.conditions(within.c)).order_by(*_order(filter, within.c))
    ids = [id for (id,) in store.read(query)]
    return Found(ids, (last.due_at, last.id) if last else None)


def errors(store: Store, filter: Filter, topics: Sequence[str]) -> list[ErrorGroup]:
    """Return the last errors of the newest MOST_GROUPED messages of the filter's topic and state, in groups."""
    window = _window(Filter(topic=filter.topic, state=filter.state), topics, None, ("id",))
    if window is None:
        return []
    newest = window.order_by(*_order(filter, window.selected_columns)).limit(MOST_GROUPED).subquery()
    each = message_errors.alias()
    last = select(func.max(each.c.id)).where(each.c.message == newest.c.id).scalar_subquery()
    error, length = message_errors.c.error, func.length(message_errors.c.error)
    tail = case((length > _TAIL, func.substr(error, length - _TAIL + 1)), else_=error)
    query = select(tail.label("tail"), message_errors.c.at, newest.c.id).select_from(newest)
    found = store.read(query.join(message_errors, message_errors.c.id == last))
    return grouped((error_line(row.tail) or "", row.at, row.id) for row in found)


def _order(filter: Filter, columns: Any) -> tuple[ColumnElement[Any], ...]:
    if filter.state in _BY_DUE:
        return columns.due_at, columns.id
    # Few messages run, and only the minus makes sure that SQLite reads their own index.
    return (-columns.id if filter.state == "running" else columns.id.desc(),)


def _has_index(filter: Filter, topics: Sequence[str]) -> bool:
    """Return whether an index has the messages of the filter's topic and state, so that the window has no others."""
    of_state = filter.state in (*_BY_DUE, *_BY_ID) and not filter.key
    return of_state and (bool(filter.topic) or len(topics) <= _MOST_TOPICS)


def _read_by(filter: Filter) -> tuple[str, ...]:
    """Return the columns that the filter's conditions read, besides the id. Without them, the index may be enough."""
    return (
        *(("state", "attempt", "postponed", "due_at") if filter.state else ()),
        *(("enqueued_at",) if filter.age else ()),
        *(("payload",) if filter.text else ()),
        *(name for name in ("topic", "key") if getattr(filter, name)),
    )


def _window(filter: Filter, topics: Sequence[str], after: Place | None, columns: Collection[str]) -> Select[Any] | None:
    """Select these columns of every message that may match, in the order of the list. None for no message."""
    places = select(*(messages.c[name] for name in sorted(columns))).where(*_behind(filter, after))
    names = [filter.topic] if filter.topic else topics
    if filter.key:
        return places.where(messages.c.topic.in_(names), messages.c.key == filter.key)
    if filter.state == "running":
        return places.where(in_state("running", messages.c))
    if not _has_index(filter, topics):
        return places
    order = _order(filter, messages.c)
    of_state = places.where(in_state(filter.state, messages.c)).order_by(*order).limit(MOST_SEARCHED)
    arms = [select(of_state.where(messages.c.topic == name).subquery()) for name in names]
    return select(union_all(*arms).subquery()) if arms else None


def _behind(filter: Filter, after: Place | None) -> list[ColumnElement[bool]]:
    """Return the conditions that let the index begin behind the place, and among messages of the filter's age."""
    if filter.state in _BY_DUE:
        if after is None:
            return []
        at, id = after
        return [messages.c.due_at >= at, or_(messages.c.due_at > at, messages.c.id > id)]
    found = [messages.c.id < after[1]] if after else []
    since, until = bounds(filter.age)
    if since is not None:
        found.append(messages.c.id > last_until(messages.c.enqueued_at, since))
    if until is not None:
        found.append(messages.c.id <= last_until(messages.c.enqueued_at, until))
    return found
