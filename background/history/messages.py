"""Reads the messages for people: their errors, their number, their waiting times. Changes them, and pauses topics."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Select, func, select

from ..database.clock import now
from ..database.store import Store
from ..database.tables import (
    LARGEST_ID,
    is_in,
    message_errors,
    messages,
)
from ..errors import UnknownMessage, UnknownTopic, error_line
from ..host import strict_json
from ..messages.dead_letters import DeadLetters
from ..messages.pauses import Pauses
from ..worker import MessageWorker
from .browsing.filters import Filter, newest_error
from .browsing.search import errors, search
from .browsing.topics import Topic, TopicHistory
from .instances import InstanceHistory
from .records import ErrorGroup, Place

STATES = ("waiting", "running", "done", "dead", "discarded")
_OPEN = ("waiting", "running", "dead")
_SHORT = 200  # characters of a payload
_MOST_SEARCHES = 20  # of one change


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


class MessageHistory(TopicHistory):
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
        super().__init__(store, workers)
        self._dead_letters, self._pauses = dead_letters, pauses
        self._instances, self._on_its_own = instances, on_its_own

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

    def held(self) -> dict[str, int]:
        """Return the number of messages that each instance handles, by its id."""
        query = select(messages.c.instance, func.count().label("number")).where(is_in("running"))
        return {row.instance: row.number for row in self._store.read(query.group_by(messages.c.instance))}

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
        ids = {id for id in ids if 0 < id <= LARGEST_ID}
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
                number = self._changed(how, found.ids, topic, changed)
                changed, left, place = changed + number, left + len(found.ids) - number, found.rest
                if place is None:
                    break
        return Change(changed, left, place is None)

    def _changed(self, how: str, ids: Collection[int], topic: str | None, before: int = 0) -> int:
        if topic is not None:
            return self._dead_letters.move(ids, topic, before)
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
