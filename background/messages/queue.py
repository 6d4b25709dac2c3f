"""Messages: enqueue, claim, acknowledge, retry, bury. Each race is one statement."""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any
from uuid import uuid4

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Connection,
    Float,
    Row,
    Select,
    Text,
    and_,
    any_,
    bindparam,
    case,
    func,
    insert,
    literal,
    or_,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.orm import Session
from sqlalchemy.types import TypeEngine

from ..database.clock import now
from ..database.dialects.encodings import storable_json
from ..database.notifications import CHANNEL
from ..database.sessions import Executes
from ..database.store import Store, count
from ..database.tables import is_dead, is_running, is_waiting, message_errors, messages
from ..errors import BackgroundError, ClaimLost, UnknownMessage, WrongState
from .message import Batch, Freed, Message
from .payloads import Draft

_BULK = 5_000
_BULK_BYTES = 8_000_000  # of one statement: every server accepts it, and it needs little memory
_columns = [messages.c[name] for name in ("id", "topic", "payload", "key", "attempt", "token", "enqueued_at", "due_at")]


class Queue:
    """The message rows of one database: enqueued on the callers' sessions, claimed on the engine's connections."""

    def __init__(self, store: Store) -> None:
        self._store, self.sessions, self._on_sqlite = store, store.sessions, store.on_sqlite
        # Built once: that takes longer than some of them do.
        self._enqueue, self._claim, self._acknowledge = self._enqueueing(), _claim(), self._acknowledgement()

    # -- enqueueing ----------------------------------------------------------------------------

    def enqueue(self, session: Session, topic: str, draft: Draft, delay: timedelta | None) -> int | None:
        """Enqueue on the caller's session, without committing. None if the key was enqueued before.

        Concurrency: another session may enqueue the same key. Until it has committed or rolled back, this waits.
        """
        pause = delay.total_seconds() if delay else 0.0
        within = self.sessions.within(session)
        values = {"of": topic, "keyed": draft.key, "carried": self._carried(draft), "after": pause}
        found: int | None = within.execute(self._enqueue, values).scalar()
        return found

    def _enqueueing(self) -> Any:
        after = bindparam("after", type_=Float)
        row: dict[str, ColumnElement[Any]] = {
            "topic": bindparam("of"),
            "key": bindparam("keyed"),
            "payload": bindparam("carried"),
            "enqueued_at": now(),
            "due_at": now(after),
        }
        new = self._store.insert(messages).values(row).on_conflict_do_nothing(**_same_key)
        # PostgreSQL tells those who listen when the caller commits, and not if it does not.
        told = () if self._on_sqlite else (case((after == 0.0, func.pg_notify(CHANNEL, bindparam("of")))),)
        return new.returning(messages.c.id, *told)

    def enqueue_many(self, session: Session, topic: str, drafts: Iterable[Draft], delay: timedelta | None) -> int:
        """Enqueue in bulk, in the order given; return how many were not enqueued before."""
        enqueued, within = 0, self.sessions.within(session)
        for some in _portions(drafts):
            source = self._rows([(self._carried(each), each.key) for each in some])
            values = select(literal(topic), source.c.payload, source.c.key, now(), now(delay)).order_by(source.c.place)
            columns = ["topic", "payload", "key", "enqueued_at", "due_at"]
            # "WHERE true": without one, SQLite reads ON CONFLICT as the ON of a join.
            new = self._store.insert(messages).from_select(columns, values.where(text("true")))
            new = new.on_conflict_do_nothing(**_same_key).execution_options(preserve_rowcount=True)
            enqueued += count(within.execute(new))
        if enqueued and not (delay or self._on_sqlite):
            within.execute(select(func.pg_notify(CHANNEL, topic)))
        return enqueued

    def _carried(self, draft: Draft) -> str:
        """Return the payload in characters that the database can hold."""
        return draft.payload if draft.payload.isascii() else storable_json(draft.payload, self.sessions.engine.dialect)

    def _rows(self, drafts: Sequence[tuple[str, str | None]]) -> Any:
        """Return the payloads and keys as a table (place, payload, key): one or two parameters for all rows."""
        if self._on_sqlite:
            values = json.dumps(drafts)
            rows = func.json_each(values).table_valued("key", "value")
            payload, key = (func.json_extract(rows.c.value, f"$[{place}]", type_=Text) for place in (0, 1))
            return select(rows.c.key.label("place"), payload.label("payload"), key.label("key")).subquery()
        payloads, keys = map(list, zip(*drafts, strict=True))
        texts = (bindparam(None, each, type_=ARRAY(Text)) for each in (payloads, keys))
        rows = func.unnest(*texts).table_valued("payload", "key", with_ordinality="place").render_derived()
        return select(rows).subquery()

    # -- claiming ------------------------------------------------------------------------------

    def claim(self, worker: str, topic: str, size: int, instance: tuple[str, str]) -> Batch | None:
        """Claim up to `size` due messages, in the order in which they fell due. None if no message is due.

        A message that failed before is claimed on its own: if it crashes the process, only its own attempt is counted.

        Concurrency: every consumer of the topic may do this. Each takes messages that no other has locked.
        """
        if self._on_sqlite and not self._any_due(topic):
            return None  # without having taken the only lock there is
        batch = uuid4().hex
        values = {"of": topic, "size": size, "by": batch, "on": instance[0], "on_name": instance[1]}
        with self._store.single.begin() as connection:
            rows = connection.execute(self._claim, values).all()
        found = sorted((Message(*row) for row in rows), key=lambda message: (message.due_at, message.id))
        return Batch(batch, worker, tuple(found)) if found else None

    def _any_due(self, topic: str) -> bool:
        return bool(self.read(_first_due, {"of": topic}))

    # -- ending --------------------------------------------------------------------------------

    def acknowledge(self, batch: Batch, done: Collection[int], ids: Collection[int], session: Executes) -> None:
        """Mark those of `ids` that are `done` and hold the rest, in the session's transaction. Raises ClaimLost.

        Concurrency: if this instance is gone, another one may take the batch over. It waits for this commit, or this
        call finds the batch gone.
        """
        values = {"done": self._packed(done), "these": self._packed(ids), "by": batch.id}
        result = session.execute(self._acknowledge, values)
        ours = count(result) if self._on_sqlite else result.scalar_one()
        if ours != len(ids):
            raise ClaimLost(
                f"Worker {batch.worker!r} no longer holds {len(ids) - ours} of its {len(ids)} messages: they were "
                "taken over. What it had not committed is not kept; let the exception pass."
            )

    def _acknowledgement(self) -> Any:
        is_done, is_one = (self._is_one_of(bindparam(name, type_=self._ids)) for name in ("done", "these"))
        acknowledged = (
            update(messages)
            .where(is_one, messages.c.batch == bindparam("by"), is_running)
            .values(
                state=case((is_done, "done"), else_="running"),
                finished_at=case((is_done, now())),
            )
        )
        if self._on_sqlite:
            return acknowledged
        rows = acknowledged.returning(messages.c.id).cte()
        return select(func.count(rows.c.id), *self._store.idle)

    def left(self, batch: Batch) -> list[Message]:
        """Return those of the batch that are neither acknowledged nor taken over by another instance."""
        ids = {row.id for row in self.read(select(messages.c.id).where(self._held(batch, batch.ids)))}
        return [message for message in batch.messages if message.id in ids]

    def hand_back(self, batch: Batch, ids: Collection[int], pause: timedelta | None = None) -> None:
        """Let any instance claim those of `ids` that are left, at once or after `pause`. This counts no attempt."""
        later = {"due_at": now(pause)} if pause else {}
        with self._store.begin() as connection:
            freed = _release(connection, self._held(batch, ids), attempt=messages.c.attempt - 1, **later)
        if freed:
            self._store.ring()

    def fail(self, batch: Batch, ids: Collection[int], error: str, most: int, pause: timedelta) -> list[Freed]:
        """Write an error of each of `ids` that is left. Try it again after `pause`, or bury it at its `most`th attempt.

        Concurrency: an instance that believes this one gone may take the messages over.
        """
        with self._store.begin() as connection:
            return self._fail(connection, self._held(batch, ids), error, most, pause)

    def _fail(
        self, connection: Connection, which: ColumnElement[bool], error: str, most: int, pause: timedelta
    ) -> list[Freed]:
        is_last = messages.c.attempt >= most
        failed = _release(
            connection,
            which,
            state=case((is_last, "dead"), else_="waiting"),
            due_at=case((is_last, messages.c.due_at), else_=now(pause)) if pause else messages.c.due_at,
            finished_at=case((is_last, now())),
        )
        errors = [
            {
                "message": row.id,
                "attempt": row.attempt,
                "instance_name": row.instance_name,
                "error": error,
                "at": now(),
            }
            for row in failed
        ]
        if errors:
            connection.execute(insert(message_errors).values(errors))
        return _freed(failed)

    # -- those who are gone --------------------------------------------------------------------

    def holders(self, topics: Collection[str]) -> set[str]:
        """The instances that hold messages of `topics`."""
        held = and_(is_running, messages.c.topic.in_(topics))
        return {row.instance for row in self.read(select(messages.c.instance).where(held).distinct())}

    def take_back(self, instance: str, topics: dict[str, int], error: str | None) -> list[Freed]:
        """Free the messages of `topics` (with their `max_attempts`) that a gone instance holds.

        `error=None` means that the instance signed off, which does not count as an attempt.

        Concurrency: any instance that finds it gone may do this, and the instance itself, if it was wrongly believed
        gone. The second caller changes nothing.
        """
        return self._take_back(messages.c.instance == instance, topics, error)

    def batches(self, instance: str, older: timedelta) -> set[str]:
        """What `instance` claimed longer ago than that, and holds."""
        # The clock may have been ahead at the claim.
        is_old = or_(messages.c.claimed_at < now(-older), messages.c.claimed_at > now(older))
        old = and_(is_running, messages.c.instance == instance, is_old)
        return {row.batch for row in self.read(select(messages.c.batch).where(old).distinct())}

    def take_back_stranded(self, batches: Collection[str], topics: dict[str, int], error: str) -> list[Freed]:
        """Free the `batches` of a living instance that handles none of them."""
        return self._take_back(messages.c.batch.in_(batches), topics, error)

    def _take_back(self, held: ColumnElement[bool], topics: dict[str, int], error: str | None) -> list[Freed]:
        freed: list[Freed] = []
        with self._store.begin() as connection:
            for topic, most in topics.items():
                which = and_(is_running, held, messages.c.topic == topic)
                # A frozen process may have them locked in the middle of its commit; they come later then.
                free = select(messages.c.id).where(which).with_for_update(skip_locked=True)
                which = and_(which, messages.c.id.in_(free.subquery().select()))
                if error is None:
                    freed += _freed(_release(connection, which, attempt=messages.c.attempt - 1))
                else:
                    freed += self._fail(connection, which, error, most, timedelta())
        return freed

    # -- what people decide --------------------------------------------------------------------

    def retry(self, ids: Collection[int] | None, topic: str | None = None) -> int:
        """Have dead or discarded messages handled again, or waiting ones at once. Their errors stay.

        Without `ids`: all the dead ones (of `topic`). Return how many. If one of `ids` is in another state, none is
        changed.

        Concurrency: other callers may retry, discard, claim or prune them, too. Each message is changed once.
        """
        return self._decide(ids, topic, ("dead", "discarded", "waiting"), attempt=0, due_at=now(), finished_at=None)

    def discard(self, ids: Collection[int] | None, topic: str | None = None) -> int:
        """Have dead or waiting ones never be handled. Without `ids`: all the dead ones (of `topic`). Return how many.

        Concurrency: as `retry`. A claim may also come first, and then the message is running.
        """
        return self._decide(ids, topic, ("dead", "waiting"), state="discarded", finished_at=now())

    def _decide(self, ids: Collection[int] | None, topic: str | None, states: Sequence[str], **values: Any) -> int:
        if ids is None:
            return sum(self._change(some, ("dead",), values, refuse=False) for some in self._dead(topic))
        return self._change(set(ids), states, values, refuse=True)

    def _change(self, ids: Collection[int], states: Sequence[str], values: dict[str, Any], refuse: bool) -> int:
        with self._store.begin() as connection:
            changed = _release(connection, and_(self._among(ids), messages.c.state.in_(states)), **values)
            if refuse and (others := set(ids) - {row.id for row in changed}):
                raise self._refusal(connection, others, states)
            topics = {row.topic for row in changed if row.state == "waiting"}
            if topics and not self._on_sqlite:
                connection.execute(select(*(func.pg_notify(CHANNEL, topic) for topic in topics)))
        return len(changed)

    def _refusal(self, connection: Connection, ids: Collection[int], states: Sequence[str]) -> BackgroundError:
        query = select(messages.c.id, messages.c.state).where(self._among(ids)).order_by(messages.c.id)
        found = [(row.id, row.state) for row in connection.execute(query)]
        if missing := set(ids) - {id for id, _ in found}:
            return UnknownMessage(min(missing))
        each = ", ".join(f"message {id} is {state}" for id, state in found)
        expected = f"messages that are {' or '.join(states)}"
        return WrongState(f"Nothing was changed: {each}; expected {expected}: leave the others out.")

    def _dead(self, topic: str | None) -> Iterator[list[int]]:
        """The ids of the dead (of `topic`) in slices, each of them once: they may die again meanwhile."""
        place = (messages.c.topic, messages.c.id)
        query = select(*place).where(is_dead).order_by(*place).limit(_BULK)
        some = query = query if topic is None else query.where(messages.c.topic == topic)
        while rows := self.read(some):
            yield [row.id for row in rows]
            some = query.where(tuple_(*place) > tuple_(*rows[-1]))

    # -- helpers -------------------------------------------------------------------------------

    def read(self, query: Select[Any], values: dict[str, Any] | None = None) -> Sequence[Row[Any]]:
        """The rows that `query` finds, in a transaction of its own."""
        with self._store.single.connect() as connection:
            return connection.execute(query, values).all()

    def _held(self, batch: Batch, ids: Collection[int]) -> ColumnElement[bool]:
        return and_(self._among(ids), messages.c.batch == batch.id, is_running)

    def _among(self, ids: Collection[int]) -> ColumnElement[bool]:
        return self._is_one_of(bindparam(None, self._packed(ids), type_=self._ids))

    def _is_one_of(self, ids: ColumnElement[Any]) -> ColumnElement[bool]:
        if self._on_sqlite:
            return messages.c.id.in_(select(func.json_each(ids).table_valued("value").c.value))
        return messages.c.id == any_(ids)

    def _packed(self, ids: Collection[int]) -> str | list[int]:
        """As one parameter, whatever their number."""
        return json.dumps(list(ids)) if self._on_sqlite else list(ids)

    @property
    def _ids(self) -> TypeEngine[Any]:
        return Text() if self._on_sqlite else ARRAY(BigInteger)


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
        if some and (len(some) >= _BULK or size + longest > _BULK_BYTES):
            yield some
            some, size = [], 0
        some.append(draft)
        size += longest + len(draft.key or "") * 4
    if some:
        yield some


def _due(topic: ColumnElement[str] | str) -> Any:
    # As a subquery the clock is read once, before the index is: so it can say where to stop.
    clock = select(now()).scalar_subquery()
    return select(messages.c.id, messages.c.attempt, messages.c.due_at).where(
        is_waiting, messages.c.topic == topic, messages.c.due_at <= clock
    )


_first_due = _due(bindparam("of")).limit(1)


def _claim() -> Any:
    order = (messages.c.due_at, messages.c.id)
    due = _due(bindparam("of")).order_by(*order).limit(bindparam("size")).with_for_update(skip_locked=True).cte("due")
    first = select(due.c.id, due.c.attempt).order_by(due.c.due_at, due.c.id).limit(1).cte("first")
    return (
        update(messages)
        .where(
            messages.c.id == due.c.id,
            case((first.c.attempt > 0, due.c.id == first.c.id), else_=due.c.attempt == 0),
        )
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


def _release(connection: Connection, which: ColumnElement[bool], **values: Any) -> Sequence[Row[Any]]:
    free = {"state": "waiting", "batch": None, "instance": None, **values}
    columns = [messages.c[name] for name in ("id", "topic", "attempt", "state", "instance_name")]
    return connection.execute(update(messages).where(which).values(free).returning(*columns)).all()


def _freed(rows: Sequence[Row[Any]]) -> list[Freed]:
    return [Freed(row.id, row.topic, row.state) for row in rows]
