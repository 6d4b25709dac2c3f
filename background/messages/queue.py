"""The queue of messages: enqueue, claim, acknowledge, hand back, fail, take back. One statement decides each race."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from operator import attrgetter
from typing import Any
from uuid import uuid4

from sqlalchemy import (
    ColumnElement,
    Connection,
    Executable,
    Float,
    Row,
    and_,
    bindparam,
    case,
    func,
    insert,
    literal,
    literal_column,
    not_,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.orm import Session

from ..database.clock import now
from ..database.dialects.encodings import storable_json
from ..database.dialects.one_request import parsed_once
from ..database.sessions import Executes
from ..database.store import Store, count
from ..database.tables import from_floor, is_paused, is_running, is_waiting, message_errors, messages
from ..errors import ClaimLost
from .message import Batch, Freed, Message
from .payloads import Draft

_MOST_ROWS = 5_000  # of one INSERT
_MOST_BYTES = 8_000_000  # of one INSERT: every server accepts this size, and it needs little memory
_columns = [messages.c[name] for name in ("id", "topic", "payload", "key", "attempt", "token", "enqueued_at", "due_at")]


class Queue:
    """The message rows of one database: enqueued on the callers' sessions, claimed on the engine's connections."""

    def __init__(self, store: Store) -> None:
        self._store, self.sessions = store, store.sessions
        # Built once, as building a statement takes longer than running some of them.
        self._enqueue, self._acknowledge = _enqueue(store), _acknowledge(store)
        self._claim = parsed_once("claim_messages", store.engine, _claim(store))

    # -- enqueueing ----------------------------------------------------------------------------

    def enqueue(self, session: Session, topic: str, draft: Draft, delay: timedelta | None) -> int | None:
        """Enqueue on the caller's session, without a commit. Return the id. None if the key was enqueued before.

        Concurrency: another session may enqueue the same key. This call waits until that session commits or rolls back.
        """
        pause = delay.total_seconds() if delay else 0.0
        within = self.sessions.within(session)
        values = {"of": topic, "keyed": draft.key, "json": self._storable(draft), "after": pause}
        found: int | None = within.execute(self._enqueue, values).scalar()
        return found

    def enqueue_many(self, session: Session, topic: str, drafts: Iterable[Draft], delay: timedelta | None) -> int:
        """Enqueue in bulk, in the order of `drafts`. Return how many were not enqueued before."""
        enqueued, within = 0, self.sessions.within(session)
        for some in _portions(drafts):
            source = self._store.table_of([(self._storable(each), each.key) for each in some], "payload", "key")
            values = select(literal(topic), source.c.payload, source.c.key, now(), now(delay)).order_by(source.c.place)
            columns = ["topic", "payload", "key", "enqueued_at", "due_at"]
            # "WHERE true": without a WHERE, SQLite reads ON CONFLICT as the ON of a join.
            new = self._store.insert(messages).from_select(columns, values.where(text("true")))
            new = new.on_conflict_do_nothing(**_same_key).execution_options(preserve_rowcount=True)
            enqueued += count(within.execute(new))
        return enqueued

    def _storable(self, draft: Draft) -> str:
        """Return the payload in characters that the database can hold."""
        return draft.payload if draft.payload.isascii() else storable_json(draft.payload, self.sessions.engine.dialect)

    # -- claiming ------------------------------------------------------------------------------

    def claim(
        self,
        worker: str,
        topic: str,
        size: int,
        instance: tuple[str, str],
        floor: datetime | None = None,
        is_likely: bool = False,
    ) -> Batch | None:
        """Claim up to `size` due messages, in the order in which they fell due. None if no message is due.

        On PostgreSQL, look only for messages that fell due at the moment `floor` or later. On SQLite, look for a due
        message before taking the write lock. A caller that expects a due message skips this by `is_likely`.

        A message that failed before is claimed on its own: if it crashes the process, only its own attempt is counted.

        Concurrency: every consumer of the topic may do this. Each consumer skips messages that another one has locked.
        A claim that begins after the commit of a pause finds no message.
        """
        if self._store.has_one_writer and not is_likely and not self._store.read(_first_due, {"of": topic}):
            return None
        batch = uuid4().hex
        values: dict[str, Any] = {"of": topic, "size": size, "by": batch, "on": instance[0], "on_name": instance[1]}
        if self._store.keeps_old_entries:
            values["floor"] = floor
        with self._store.single.begin() as connection:
            rows = self._claim(connection, values)
        found = sorted(map(Message._make, rows), key=attrgetter("due_at", "id"))
        return Batch(batch, worker, tuple(found)) if found else None

    def due(self, topics: Collection[str]) -> list[str]:
        """Return the topics that have a due message. Claims nothing."""
        return [topic for topic in topics if self._store.read(_first_due, {"of": topic})]

    # -- ending --------------------------------------------------------------------------------

    def acknowledge(self, batch: Batch, done: Collection[int], ids: Collection[int], session: Executes) -> None:
        """Mark the messages `done`, and lock the rest of `ids`, in the session's transaction.

        Raises ClaimLost if the batch no longer holds all of `ids`.

        Concurrency: an instance that believes this one dead may take the batch back. It waits for this commit, or this
        call raises.
        """
        # Mostly, no message is left. Sending and reading a short list takes less time.
        left = set(ids).difference(done)
        values = {"left": self._store.packed(left), "ids": self._store.packed(ids), "by": batch.id}
        ours = self._store.number_held(session.execute(self._acknowledge, values))
        if ours != len(ids):
            raise ClaimLost(
                f"Worker {batch.worker!r} no longer holds {len(ids) - ours} of its {len(ids)} messages: they were "
                "taken over. Its uncommitted work is discarded; let the exception pass."
            )

    def left(self, batch: Batch) -> list[Message]:
        """Return the messages that the batch still holds: not acknowledged, and not taken over by another instance."""
        ids = {row.id for row in self._store.read(select(messages.c.id).where(self._held(batch, batch.ids)))}
        return [message for message in batch.messages if message.id in ids]

    def hand_back(self, batch: Batch, ids: Collection[int], pause: timedelta | None = None) -> None:
        """Let any instance claim the `ids` that the batch still holds, now or after `pause`. Counts no attempt."""
        later = {"due_at": now(pause)} if pause else {}
        with self._store.begin() as connection:
            freed = release(connection, self._held(batch, ids), attempt=messages.c.attempt - 1, **later)
        if freed:
            self._store.ring()

    def postpone(self, batch: Batch, ids: Collection[int], pause: timedelta, reason: str | None) -> int:
        """Let any instance claim the `ids` that the batch still holds after `pause`, and count that. Counts no attempt.

        Return the number of messages.

        Concurrency: an instance that believes this one dead may take the messages over first.
        """
        counted = {"postponed": func.coalesce(messages.c.postponed, 0) + 1, "postponed_because": reason}
        with self._store.begin() as connection:
            which = self._held(batch, ids)
            return len(release(connection, which, attempt=messages.c.attempt - 1, due_at=now(pause), **counted))

    def fail(self, batch: Batch, ids: Collection[int], error: str, most: int, pause: timedelta) -> list[Freed]:
        """Write an `error` for each of `ids` that the batch still holds.

        Each message is due again after `pause`, or is buried after `most` attempts.

        Concurrency: an instance that believes this one dead may take the messages over first.
        """
        with self._store.begin() as connection:
            return self._fail(connection, self._held(batch, ids), error, most, pause)

    def _fail(
        self, connection: Connection, which: ColumnElement[bool], error: str, most: int, pause: timedelta
    ) -> list[Freed]:
        is_last = messages.c.attempt >= most
        failed = release(
            connection,
            which,
            state=case((is_last, "dead"), else_="waiting"),
            due_at=case((is_last, messages.c.due_at), else_=now(pause)) if pause else messages.c.due_at,
            finished_at=case((is_last, now())),
        )
        errors = [
            {"message": row.id, "attempt": row.attempt, "instance_name": row.instance_name, "error": error, "at": now()}
            for row in failed
        ]
        if errors:
            connection.execute(insert(message_errors).values(errors))
        return _freed(failed)

    # -- recovering ----------------------------------------------------------------------------

    def holders(self, topics: Collection[str]) -> set[str]:
        """Return the ids of the instances that hold messages of `topics`."""
        held = and_(is_running, messages.c.topic.in_(topics))
        return {row.instance for row in self._store.read(select(messages.c.instance).where(held).distinct())}

    def take_back(self, instance: str, topics: dict[str, int], error: str | None) -> list[Freed]:
        """Free the messages of `topics` (with their `max_attempts`) that a dead instance holds.

        `error=None` means that the instance signed off, which does not count as an attempt.

        Concurrency: any instance may do this. So may the instance itself, if the fleet wrongly believes it dead. The
        second caller changes nothing.
        """
        return self._take_back(messages.c.instance == instance, topics, error)

    def batches(self, instance: str, older: timedelta) -> set[str]:
        """Return the batches that `instance` still holds, and claimed longer ago than `older`."""
        # The clock may have been ahead when the instance claimed.
        is_old = or_(messages.c.claimed_at < now(-older), messages.c.claimed_at > now(older))
        old = and_(is_running, messages.c.instance == instance, is_old)
        return {row.batch for row in self._store.read(select(messages.c.batch).where(old).distinct())}

    def take_back_stranded(self, batches: Collection[str], topics: dict[str, int], error: str) -> list[Freed]:
        """Free the `batches` that a living instance holds, but does not handle."""
        return self._take_back(messages.c.batch.in_(batches), topics, error)

    def _take_back(self, held: ColumnElement[bool], topics: dict[str, int], error: str | None) -> list[Freed]:
        freed: list[Freed] = []
        with self._store.begin() as connection:
            for topic, most in topics.items():
                which = and_(is_running, held, messages.c.topic == topic)
                # A process that froze during its commit may still lock messages. A later call frees these.
                free = select(messages.c.id).where(which).with_for_update(skip_locked=True)
                which = and_(which, messages.c.id.in_(free.subquery().select()))
                if error is None:
                    freed += _freed(release(connection, which, attempt=messages.c.attempt - 1))
                else:
                    freed += self._fail(connection, which, error, most, timedelta())
        return freed

    # -- helpers -------------------------------------------------------------------------------

    def _held(self, batch: Batch, ids: Collection[int]) -> ColumnElement[bool]:
        return and_(self._store.is_among(messages.c.id, ids), messages.c.batch == batch.id, _is_held)


_same_key: dict[str, Any] = {
    "index_elements": [messages.c.topic, messages.c.key],
    "index_where": messages.c.key.is_not(None),
}


def _portions(drafts: Iterable[Draft]) -> Iterator[list[Draft]]:
    """Yield the drafts in slices, each of limited rows and bytes, or of a single larger draft."""
    some: list[Draft] = []
    size = 0
    for draft in drafts:
        longest = len(draft.payload) * 4 if not draft.payload.isascii() else len(draft.payload)
        if some and (len(some) >= _MOST_ROWS or size + longest > _MOST_BYTES):
            yield some
            some, size = [], 0
        some.append(draft)
        size += longest + len(draft.key or "") * 4
    if some:
        yield some


def _due(topic: ColumnElement[str] | str) -> Any:
    # As a subquery, the clock is read once, before the index. So the read of the index can stop at that moment.
    clock = select(now()).scalar_subquery()
    return select(messages.c.id, messages.c.attempt, messages.c.due_at).where(
        is_waiting, messages.c.topic == topic, messages.c.due_at <= clock, not_(is_paused(topic))
    )


_first_due = _due(bindparam("of")).limit(1)


def _enqueue(store: Store) -> Any:
    row: dict[str, ColumnElement[Any]] = {
        "topic": bindparam("of"),
        "key": bindparam("keyed"),
        "payload": bindparam("json"),
        "enqueued_at": now(),
        "due_at": now(bindparam("after", type_=Float)),
    }
    new = store.insert(messages).values(row).on_conflict_do_nothing(**_same_key)
    return new.returning(messages.c.id)


def _claim(store: Store) -> Any:
    order = (messages.c.due_at, messages.c.id)
    due = _due(bindparam("of"))
    due = due.where(from_floor("floor")) if store.keeps_old_entries else due
    due = due.order_by(*order).limit(bindparam("size")).with_for_update(skip_locked=True).cte("due")
    first = select(due.c.id, due.c.attempt).order_by(due.c.due_at, due.c.id).limit(1).cte("first")
    return (
        update(messages)
        .where(messages.c.id == due.c.id, case((first.c.attempt > 0, due.c.id == first.c.id), else_=due.c.attempt == 0))
        .values(
            state="running",
            attempt=messages.c.attempt + 1,
            token=messages.c.token + 1,
            batch=bindparam("by"),
            instance=bindparam("on"),
            instance_name=bindparam("on_name"),
            claimed_at=now(),
        )
        .returning(*_columns)
    )


# The same as `is_running`, but PostgreSQL finds the rows by their ids, not by the index of the running messages. While
# an old transaction is open, that index has entries of all messages done since then.
_is_held = messages.c.state.concat(literal_column("''")) == literal_column("'running'")


def _acknowledge(store: Store) -> Executable:
    is_left, is_one = store.is_among(messages.c.id, "left"), store.is_among(messages.c.id, "ids")
    return store.holding(
        update(messages)
        .where(is_one, messages.c.batch == bindparam("by"), _is_held)
        .values(state=case((is_left, "running"), else_="done"), finished_at=case((is_left, None), else_=now()))
    )


def release(connection: Connection, which: ColumnElement[bool], **values: Any) -> Sequence[Row[Any]]:
    """Set the messages to "waiting", without a batch, or to `values`. Return the rows that changed."""
    free = {"state": "waiting", "batch": None, "instance": None, **values}
    columns = [messages.c[name] for name in ("id", "topic", "attempt", "state", "instance_name")]
    return connection.execute(update(messages).where(which).values(free).returning(*columns)).all()


def _freed(rows: Sequence[Row[Any]]) -> list[Freed]:
    return [Freed(row.id, row.topic, row.state) for row in rows]
