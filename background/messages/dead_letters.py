"""Dead letters: messages that failed too often. A user retries, discards or moves them, and waiting messages too."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, case, not_, select, tuple_
from sqlalchemy.exc import IntegrityError

from ..database.clock import now
from ..database.store import Store
from ..database.tables import is_dead, messages
from ..errors import BackgroundError, UnknownMessage, WrongState
from .queue import release

_SLICE = 5_000  # messages that one statement changes


class DeadLetters:
    """Changes the state of messages for a user. Each slice of messages is one conditional UPDATE."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def retry(self, ids: Collection[int] | None, topic: str | None = None, refuse: bool = True) -> int:
        """Let dead or discarded messages be handled again, or waiting messages now. Their errors stay.

        Without `ids`, retry all dead messages (of `topic`). Return the number of messages. If one of `ids` is in
        another state, no message changes. Or, without `refuse`, all others change.

        Concurrency: other callers may retry, discard, claim or prune the messages too. Each message changes once.
        """
        again = {"attempt": 0, "due_at": now(), "finished_at": None}
        return self._decide(ids, topic, ("dead", "discarded", "waiting"), again, refuse)

    def discard(self, ids: Collection[int] | None, topic: str | None = None, refuse: bool = True) -> int:
        """Discard dead or waiting messages: no instance will handle them. Arguments and result are as in `retry`.

        Concurrency: as `retry`. A claim may also come first, and then the message is running.
        """
        return self._decide(ids, topic, ("dead", "waiting"), {"state": "discarded", "finished_at": now()}, refuse)

    def move(self, ids: Collection[int], topic: str, before: int = 0) -> int:
        """Let dead, discarded or waiting messages wait in another topic. Return the number of messages.

        A waiting message keeps its due moment and its attempts. A message whose key that topic has stays. So does a
        message in another state. Raises WrongState if two of the messages have the same key. Its text says that the
        same change moved `before` messages already.

        Concurrency: as `retry`. Another caller may enqueue the same key in that topic.
        """
        is_waiting, other = messages.c.state == "waiting", messages.alias()
        values = {
            "topic": topic,
            "attempt": case((is_waiting, messages.c.attempt), else_=0),
            "due_at": case((is_waiting, messages.c.due_at), else_=now()),
            "finished_at": None,
        }
        is_taken = select(other.c.id).where(other.c.topic == topic, other.c.key == messages.c.key).exists()
        try:
            return self._change(
                set(ids), ("dead", "discarded", "waiting"), values, False, messages.c.topic != topic, not_(is_taken)
            )
        except IntegrityError:
            so_far = f"Only {before:,} message{' was' if before == 1 else 's were'}" if before else "Nothing was"
            raise WrongState(
                f"{so_far} changed: two of the messages for the topic {topic!r} have the same key; expected "
                "different keys: move the messages of one topic at a time."
            ) from None

    def _decide(
        self,
        ids: Collection[int] | None,
        topic: str | None,
        states: Sequence[str],
        values: dict[str, Any],
        refuse: bool,
    ) -> int:
        if ids is None:
            return sum(self._change(some, ("dead",), values, refuse=False) for some in self._slices(topic))
        return self._change(set(ids), states, values, refuse)

    def _slices(self, topic: str | None) -> Iterator[list[int]]:
        """Yield the ids of the dead messages (of `topic`) in slices, each id once, even if the message dies again."""
        place = (messages.c.topic, messages.c.id)
        query = select(*place).where(is_dead).order_by(*place).limit(_SLICE)
        some = query = query if topic is None else query.where(messages.c.topic == topic)
        while rows := self._store.read(some):
            yield [row.id for row in rows]
            some = query.where(tuple_(*place) > tuple_(*rows[-1]))

    def _change(
        self,
        ids: Collection[int],
        states: Sequence[str],
        values: dict[str, Any],
        refuse: bool,
        *more: ColumnElement[bool],
    ) -> int:
        with self._store.begin() as connection:
            which = and_(self._store.is_among(messages.c.id, ids), messages.c.state.in_(states), *more)
            changed = release(connection, which, **values)
            if refuse and (unchanged := set(ids) - {row.id for row in changed}):
                raise self._refusal(connection, unchanged, states)
        if any(row.state == "waiting" for row in changed):
            self._store.ring()
        return len(changed)

    def _refusal(self, connection: Connection, ids: Collection[int], states: Sequence[str]) -> BackgroundError:
        query = select(messages.c.id, messages.c.state).where(self._store.is_among(messages.c.id, ids))
        found = [(row.id, row.state) for row in connection.execute(query.order_by(messages.c.id))]
        if missing := set(ids) - {id for id, _ in found}:
            return UnknownMessage(min(missing))
        each = ", ".join(f"message {id} is {state}" for id, state in found)
        expected = f"messages that are {' or '.join(states)}"
        return WrongState(f"Nothing was changed: {each}; expected {expected}: leave out the other messages.")
