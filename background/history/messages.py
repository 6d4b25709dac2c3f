"""Reads the messages for people: their errors, their number, their waiting times. Changes them, and pauses topics."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, func, literal, null, select, union_all

from ..database.clock import elapsed, now
from ..database.store import Store
from ..database.tables import (
    LARGEST_ID,
    is_dead,
    is_failing,
    is_in,
    is_postponed,
    is_running,
    is_waiting,
    message_errors,
    messages,
    topics,
)
from ..errors import UnknownMessage, UnknownTopic, error_line
from ..host import strict_json
from ..messages.dead_letters import DeadLetters
from ..messages.pauses import Pauses
from ..worker import MessageWorker
from .browsing.filters import Filter, newest_error
from .browsing.search import errors, search
from .instances import InstanceHistory
from .records import ErrorGroup, Place

STATES = ("waiting", "running", "done", "dead", "discarded")
_OPEN = ("waiting", "running", "dead")
_SHORT = 200  # characters of a payload
_RECENTLY, _JUST_NOW = timedelta(hours=1), timedelta(minutes=1)
_MOST_SEARCHES = 20  # of one change
_SAMPLE = 5_000  # the newest messages, from which a high throughput is estimated


@dataclass(frozen=True)
class Failure:
    """One attempt that failed."""

    attempt: int
    at: datetime
    instance_name: str | None
    error: str

    @property
    def last_line(self) -> str | None:
        """The error itself, from the traceback."""
        return error_line(self.error)


@dataclass(frozen=True)
class MessageRecord:
    """One row of the messages."""

    id: int
    topic: str
    state: str
    attempt: int
    key: str | None
    payload: str
    """JSON. In a list only its beginning, unless the caller wants the whole payload."""
    enqueued_at: datetime
    due_at: datetime
    claimed_at: datetime | None
    finished_at: datetime | None
    instance: str | None
    instance_name: str | None
    """The instance that claimed it last."""
    error: str | None
    """Its last failure, with the traceback."""
    clock: datetime
    """The database's clock when this was read."""
    is_gone: bool = False
    """True if it says "running" and its instance is gone: another instance will take it over."""
    postponed: int | None = None
    """The number of times that its handler raised `Later`."""
    postponed_because: str | None = None
    """The reason that the handler gave last."""

    @property
    def is_delayed(self) -> bool:
        return self.state == "waiting" and self.due_at > self.clock

    @property
    def last_line(self) -> str | None:
        """The last error itself, from its traceback."""
        return error_line(self.error)

    @property
    def value(self) -> Any:
        """The payload that was enqueued. If a user wrote a row whose payload is not JSON, the text itself."""
        try:
            return strict_json.loads(self.payload)
        except ValueError:
            return self.payload

    def as_dict(self) -> dict[str, Any]:
        """Return its columns, with the payload that was enqueued."""
        row = {**asdict(self), "payload": self.value}
        del row["clock"]
        return row


@dataclass(frozen=True)
class Topic:
    """One topic at a glance."""

    topic: str
    worker: str | None
    """The name of the worker that handles it. None if this release has no such worker."""
    waiting: int = 0
    delayed: int = 0
    """The number of waiting messages that are due later."""
    running: int = 0
    dead: int = 0
    oldest_seconds: float | None = None
    """The seconds since the first waiting message was due. None if no message is due yet."""
    handled: int = 0
    """The number of messages done within the last hour."""
    mean_seconds: float | None = None
    """The mean time from due to done, of the messages that `handled` counts."""
    longest_seconds: float | None = None
    failing: int = 0
    """The number of waiting messages that failed before."""
    postponed: int = 0
    """The number of waiting messages whose handler raised `Later`."""
    paused_at: datetime | None = None
    per_minute: int = 0
    """The number of messages done within the last minute."""
    is_estimate: bool = False
    """True if `handled` is an estimate from the newest messages."""


@dataclass(frozen=True)
class Browsed:
    """One page of the messages that match a filter."""

    letters: list[MessageRecord]
    matches: int
    """The number of messages that match from this page on, among those that the search looked at."""
    following: Place | None
    """The place where the next page begins. None on the last page."""
    is_complete: bool
    """True if the search looked at every message from this page on."""


@dataclass(frozen=True)
class Change:
    """The outcome of a change of many messages."""

    changed: int
    left: int
    """The number of messages that stayed as they were, because their state had changed."""
    is_complete: bool = True
    """False if there may be further messages that match."""


class MessageHistory:
    """Reads the messages of one database, in a constant number of queries per call. Retries and discards them.

    Also pauses their topics.
    """

    def __init__(
        self,
        store: Store,
        dead_letters: DeadLetters,
        pauses: Pauses,
        instances: InstanceHistory,
        workers: Mapping[str, type[MessageWorker]],
        on_its_own: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._store, self._dead_letters, self._pauses = store, dead_letters, pauses
        self._instances, self._workers, self._on_its_own = instances, workers, on_its_own

    # -- reading -------------------------------------------------------------------------------

    def letters(
        self, topic: str | None = None, state: str | None = None, limit: int = 20, whole: bool = False
    ) -> list[MessageRecord]:
        """Return the newest messages (of a topic, of a state), newest first. Raises UnknownTopic."""
        self._refuse_unknown(topic, _is_text(topic))
        # Open messages have an index of their own, which finds them among any number of later messages.
        newest = select(messages.c.id).order_by(-messages.c.id if state in _OPEN else messages.c.id.desc()).limit(limit)
        if topic is not None:
            newest = newest.where(messages.c.topic == topic)
        if state is not None:
            newest = newest.where(is_in(state))
        found = self._found(_records(whole).where(messages.c.id.in_(newest)).order_by(messages.c.id.desc()))
        self._refuse_unknown(topic, found)
        return found

    def browse(self, filter: Filter, topics: Sequence[Topic], limit: int = 25, after: Place | None = None) -> Browsed:
        """Return a page of the messages that match, by bounded work. `topics` are the figures. Raises UnknownTopic."""
        found = search(self._store, filter, _names(filter, topics), after)
        self._refuse_unknown(filter.topic or None, found.ids or filter.topic in {each.topic for each in topics})
        shown = found.ids[:limit]
        query = _records(whole=False).where(self._store.is_among(messages.c.id, shown))
        letters = sorted(self._found(query) if shown else [], key=lambda letter: shown.index(letter.id))
        rest = (letters[-1].due_at, letters[-1].id) if letters and len(found.ids) > limit else found.rest
        return Browsed(letters, len(found.ids), rest, found.rest is None)

    def errors(self, filter: Filter, topics: Sequence[Topic]) -> list[ErrorGroup]:
        """Return the last errors of the newest messages of the filter's topic and state, in groups."""
        return errors(self._store, filter, _names(filter, topics))

    def letter(self, id: int) -> tuple[MessageRecord, list[Failure]]:
        """Return one message, and its failed attempts, oldest first. Raises UnknownMessage."""
        _refuse_impossible([id])
        found = self._found(_records(whole=True).where(messages.c.id == id))
        if not found:
            raise UnknownMessage(id)
        columns = [message_errors.c[name] for name in Failure.__dataclass_fields__]
        query = select(*columns).where(message_errors.c.message == id).order_by(message_errors.c.id)
        return found[0], [Failure(**row._mapping) for row in self._store.read(query)]

    def stats(self) -> list[Topic]:
        """Return every topic of this release, and every other topic in the database. Reads each message of the hour."""
        found = self._depths()
        for row in self._store.read(_handled):
            found.setdefault(row.topic, {}).update(row._mapping)
        return self._topics(found)

    def depths(self) -> list[Topic]:
        """Return the topics as `stats` does, but without the messages that are done. Does not read their rows."""
        return self._topics(self._depths())

    def figures(self) -> list[Topic]:
        """Return the topics as `stats` does, without the times. Many messages that are done do not make it slower."""
        found = self._depths()
        for row in self._store.read(_finished):
            found.setdefault(row.topic, {}).update(_flow(row))
        return self._topics(found)

    def held(self) -> dict[str, int]:
        """Return the number of messages that each instance handles, by its id."""
        query = select(messages.c.instance, func.count().label("number")).where(is_in("running"))
        return {row.instance: row.number for row in self._store.read(query.group_by(messages.c.instance))}

    def _depths(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {topic: {} for topic in self._workers}
        for row in self._store.read(_depths):
            of_topic = found.setdefault(row.topic, {})
            if row.state == "paused":
                of_topic["paused_at"] = row.since
                continue
            of_topic[row.state] = row.count
            if row.state == "waiting":
                waited = (row.clock - row.since).total_seconds()
                of_topic |= {"delayed": row.delayed, "oldest_seconds": waited if waited >= 0 else None}
        return found

    def _topics(self, found: Mapping[str, dict[str, Any]]) -> list[Topic]:
        names = {topic: worker.name for topic, worker in self._workers.items()}
        return [Topic(**{"topic": topic, "worker": names.get(topic)} | more) for topic, more in sorted(found.items())]

    # -- retrying and discarding ---------------------------------------------------------------

    def retry(self, ids: Collection[int] | None, topic: str | None = None) -> int:
        """Have dead or discarded messages handled again: all of `ids`, or for None all dead messages (of `topic`).

        If one of `ids` cannot be retried, no message changes. Return the number of messages. Raises
        UnknownMessage, WrongState, UnknownTopic and CommitFirst.
        """
        with self._on_its_own("messages.retry"):
            return self._decide(self._dead_letters.retry, ids, topic)

    def discard(self, ids: Collection[int] | None, topic: str | None = None) -> int:
        """Discard dead or waiting messages: all of `ids`, or for None all dead messages (of `topic`).

        Their rows stay as long as rows of done messages, and so do their keys. Returns and raises as `retry` does.
        """
        with self._on_its_own("messages.discard"):
            return self._decide(self._dead_letters.discard, ids, topic)

    def change(self, how: str, ids: Collection[int], topic: str | None = None) -> Change:
        """Retry, discard or move (to `topic`) the messages of `ids` whose state allows it. The rest stays as it is.

        `how` is "retry", "discard" or "move". Raises UnknownTopic, WrongState and CommitFirst.
        """
        self._refuse_unknown(topic, False)
        ids = [id for id in ids if 0 < id <= LARGEST_ID]
        with self._on_its_own(f"messages.{how}"):
            changed = self._changed(how, ids, topic)
        return Change(changed, len(ids) - changed)

    def change_all(self, how: str, filter: Filter, topic: str | None = None) -> Change:
        """Change the messages that match as `change` does, as far as _MOST_SEARCHES searches find them."""
        self._refuse_unknown(topic, False)
        names, place = _names(filter, self.depths()), None
        changed = left = 0
        with self._on_its_own(f"messages.{how}"):
            for _ in range(_MOST_SEARCHES):
                found = search(self._store, filter, names, place)
                number = self._changed(how, found.ids, topic)
                changed, left, place = changed + number, left + len(found.ids) - number, found.rest
                if place is None:
                    break
        return Change(changed, left, place is None)

    def _changed(self, how: str, ids: Collection[int], topic: str | None) -> int:
        if topic is not None:
            return self._dead_letters.move(ids, topic)
        change = self._dead_letters.retry if how == "retry" else self._dead_letters.discard
        return change(ids, refuse=False)

    # -- pausing -------------------------------------------------------------------------------

    def pause(self, topic: str) -> bool:
        """Pause `topic`: no instance claims its messages until `resume`. A batch in progress goes on.

        False if it was paused already. Raises UnknownTopic and CommitFirst.
        """
        self._refuse_unknown(topic, False)
        with self._on_its_own("messages.pause"):
            return self._pauses.pause(topic)

    def resume(self, topic: str) -> bool:
        """Resume `topic`: instances claim its messages again. False if it was not paused. Raises as `pause` does."""
        self._refuse_unknown(topic, False)
        with self._on_its_own("messages.resume"):
            return self._pauses.resume(topic)

    # -- helpers -------------------------------------------------------------------------------

    def _decide(self, decide: Callable[..., int], ids: Collection[int] | None, topic: str | None) -> int:
        self._refuse_unknown(topic, _is_text(topic))
        _refuse_impossible(ids or ())
        count = decide(ids, topic)
        self._refuse_unknown(topic, count)
        return count

    def _found(self, query: Select[Any]) -> list[MessageRecord]:
        found = [MessageRecord(**row._mapping) for row in self._store.read(query)]
        gone = self._instances.gone({each.instance for each in found if each.instance and each.state == "running"})
        return [replace(each, is_gone=each.state == "running" and each.instance in gone) for each in found]

    def _refuse_unknown(self, topic: str | None, is_found: object) -> None:
        """Raise UnknownTopic if the topic has neither a worker nor a message."""
        if topic is None or topic in self._workers or is_found:
            return
        known = [each.topic for each in self.stats()]
        if topic not in known:
            raise UnknownTopic(topic, known)


def _refuse_impossible(ids: Collection[int]) -> None:
    for id in ids:
        if not 0 < id <= LARGEST_ID:
            raise UnknownMessage(id)


def _is_text(topic: str | None) -> bool:
    """Return whether a database takes the topic. Text in another encoding is not printable."""
    return topic is not None and topic.isprintable()


def _names(filter: Filter, topics: Sequence[Topic]) -> list[str]:
    """Return the topics that may have such messages. Any topic may have a message with a key."""
    return [each.topic for each in topics if filter.key or getattr(each, filter.state, None)]


def _records(whole: bool) -> Select[Any]:
    named = [
        messages.c[name] for name in MessageRecord.__dataclass_fields__ if name in messages.c and name != "payload"
    ]
    payload = messages.c.payload if whole else func.substr(messages.c.payload, 1, _SHORT)
    return select(*named, payload.label("payload"), newest_error(messages.c.id).label("error"), now().label("clock"))


def _depth(name: str, which: ColumnElement[bool], *more: Any) -> Select[Any]:
    """Count the messages of one kind by topic. Reads only the index of that kind."""
    columns = (messages.c.topic, literal(name).label("state"), func.count().label("count"), *more)
    return select(*columns).where(which).group_by(messages.c.topic)


_clock = select(now()).scalar_subquery()  # read once
_delayed = func.count().filter(messages.c.due_at > _clock)
_open = union_all(
    _depth("waiting", is_waiting, _delayed.label("delayed"), func.min(messages.c.due_at).label("since")),
    _depth("failing", is_failing, null(), null()),
    _depth("postponed", is_postponed, null(), null()),
    _depth("running", is_running, null(), null()),
    _depth("dead", is_dead, null(), null()),
    select(topics.c.topic, literal("paused"), literal(0), null(), topics.c.paused_at),
).subquery()
_depths = select(_open, now().label("clock"))

_newest = (
    select(messages.c.topic, messages.c.state, messages.c.finished_at)
    .where(messages.c.finished_at.is_not(None))
    .order_by(messages.c.finished_at.desc())
    .limit(_SAMPLE)
    .cte("newest")
)


def _since(length: timedelta) -> Any:
    return func.count().filter(_newest.c.finished_at > select(now(-length)).scalar_subquery())


_finished = (
    select(
        _newest.c.topic,
        _since(_JUST_NOW).label("minute"),
        _since(_RECENTLY).label("hour"),
        select(func.count()).select_from(_newest).scalar_subquery().label("sample"),
        select(func.min(_newest.c.finished_at)).scalar_subquery().label("oldest"),
        now().label("clock"),
    )
    .where(_newest.c.state == "done")
    .group_by(_newest.c.topic)
)


def _flow(row: Row[Any]) -> dict[str, Any]:
    covered = row.clock - row.oldest
    if row.sample < _SAMPLE or covered >= _RECENTLY:
        return {"per_minute": row.minute, "handled": row.hour}
    share = max(covered, timedelta(milliseconds=1))
    minute = row.minute if covered >= _JUST_NOW else round(row.minute * (_JUST_NOW / share))
    return {"per_minute": minute, "handled": round(row.hour * (_RECENTLY / share)), "is_estimate": True}


_took = elapsed(messages.c.due_at, messages.c.finished_at)
_handled = (
    select(
        messages.c.topic,
        func.count().label("handled"),
        func.count().filter(messages.c.finished_at > select(now(-_JUST_NOW)).scalar_subquery()).label("per_minute"),
        func.avg(_took).label("mean_seconds"),
        func.max(_took).label("longest_seconds"),
    )
    .where(messages.c.state == "done", messages.c.finished_at > select(now(-_RECENTLY)).scalar_subquery())
    .group_by(messages.c.topic)
)
