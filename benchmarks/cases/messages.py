"""Handling messages with one consumer, beside hand-written SQL and beside a loop without an engine."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import func, insert, select, text

from background import BackgroundWorkerManager, Message, MessageWorker, WorkerContext
from background.database import tables
from models import db

from ..harness.clock import clock
from ..harness.databases import context, database, without_workers
from ..harness.effects import Effect, check_effects, clear, effects
from ..harness.figures import Figure, Setup, check, in_turns

BATCH = 100
SQLITE_EFFECTS = "INSERT INTO benchmark_effects (message) SELECT value FROM json_each(:ids)"
POSTGRESQL_EFFECTS = "INSERT INTO benchmark_effects (message) SELECT unnest(CAST(:ids AS bigint[]))"
POSTGRESQL_CLAIM = (
    "UPDATE background_messages SET state = 'running', attempt = attempt + 1 WHERE id = ANY(ARRAY("
    "SELECT id FROM background_messages WHERE state = 'waiting' AND topic = 'by hand' "
    f"ORDER BY due_at, id LIMIT {BATCH} FOR UPDATE SKIP LOCKED)) RETURNING id, payload"
)
SQLITE_CLAIM = (
    "UPDATE background_messages SET state = 'running', attempt = attempt + 1 WHERE id IN ("
    "SELECT id FROM background_messages WHERE state = 'waiting' AND topic = 'by hand' "
    f"ORDER BY due_at, id LIMIT {BATCH}) RETURNING id, payload"
)
NOW = {"sqlite": "strftime('%Y-%m-%d %H:%M:%f000', 'now')", "postgresql": "clock_timestamp()"}


class Handled:
    """The number of messages that the handlers of this process have seen."""

    def __init__(self) -> None:
        self.number, self.wanted, self.all = 0, 0, threading.Event()

    def expect(self, number: int) -> None:
        self.number, self.wanted = 0, number
        self.all.clear()

    def add(self, number: int = 1) -> None:
        self.number += number
        if self.number >= self.wanted:
            self.all.set()


handled = Handled()


class Statement(MessageWorker):
    """A handler that sends one statement."""

    topic = "statement"
    batch_size = BATCH

    def handle(self, message: Message, context: WorkerContext) -> None:
        context.session.execute(insert(effects), {"message": message.id})
        handled.add()


class Orm(MessageWorker):
    """A handler that adds one object."""

    topic = "orm"
    batch_size = BATCH

    def handle(self, message: Message, context: WorkerContext) -> None:
        context.session.add(Effect(message=message.id))
        handled.add()


class Many(MessageWorker):
    """A handler of whole batches, which sends one statement for each."""

    topic = "many"
    batch_size = BATCH

    def handle_many(self, messages: Sequence[Message], context: WorkerContext) -> None:
        ids = [message.id for message in messages]
        if db.engine.dialect.name == "sqlite":
            context.session.execute(text(SQLITE_EFFECTS), {"ids": json.dumps(ids)})
        else:
            context.session.execute(text(POSTGRESQL_EFFECTS), {"ids": ids})
        handled.add(len(ids))


class Fresh(Many):
    """The same handler, with a topic that has no finished messages."""

    name = "fresh"
    topic = "fresh"


def run(setup: Setup) -> Iterator[Figure]:
    number = setup.size(300, 10_000)
    with database(setup.engine) as url, context(url), running(Statement, Orm, Many, Fresh) as manager:
        ways: dict[str, Callable[[], float]] = {
            "hand-written SQL": lambda: by_hand(number),
            "a bare loop, one statement": lambda: bare(number, send_one),
            "a bare loop, session.add": lambda: bare(number, add_one),
            "statement": lambda: by_engine(manager, "statement", number),
            "session.add": lambda: by_engine(manager, "orm", number),
            "handle_many": lambda: by_engine(manager, "many", number),
        }
        rates = in_turns(setup, "messages", ways)
        is_sqlite = setup.engine == "sqlite"
        for name, way, of, aim in (
            ("handle, one statement", "statement", "a bare loop, one statement", ">= 0.7" if is_sqlite else ">= 0.85"),
            ("handle, session.add", "session.add", "hand-written SQL", ">= 0.30"),
            ("handle, session.add", "session.add", "a bare loop, session.add", ""),
            ("handle_many", "handle_many", "hand-written SQL", ">= 0.5" if is_sqlite else ">= 0.75"),
        ):
            yield Figure(name, "messages/s", rates[way], of, rates[of], aim)
        for waiting in (100, 300) if setup.is_small else (1_000, 10_000, 100_000):
            way = {"handle_many": lambda waiting=waiting: by_engine(manager, "many", waiting)}
            rates = in_turns(setup, f"{waiting:,} messages at once", way)
            yield Figure("handle_many, with messages waiting", "messages/s", rates["handle_many"], at=waiting)
        if not is_sqlite:
            yield beside_an_open_transaction(setup, manager)


@contextmanager
def running(*workers: type[MessageWorker]) -> Iterator[BackgroundWorkerManager]:
    """Start this process's consumers of these workers alone."""
    effects.create(db.engine)
    manager = without_workers()
    for worker in workers:
        manager.add(worker)
    manager.start()
    try:
        yield manager
    finally:
        manager.stop()


def by_engine(manager: BackgroundWorkerManager, topic: str, number: int) -> float:
    """Return the messages that one consumer handled in a second, from their commit to the last acknowledgement."""
    clear()
    seconds = handle(manager, topic, number)
    check_effects(number, f"topic {topic}")
    return number / seconds


def handle(manager: BackgroundWorkerManager, topic: str, number: int) -> float:
    handled.expect(number)
    first = db.session.scalar(select(func.coalesce(func.max(tables.messages.c.id), 0) + 1))
    manager.enqueue_many(topic, [{"order": each} for each in range(number)])
    db.session.commit()
    began = clock()
    check(handled.all.wait(120), f"topic {topic}: {handled.number} of {number} messages were handled")
    wait_until_done(first)
    return clock() - began


def wait_until_done(first: int) -> None:
    """Wait until the messages from the id `first` on are done.

    The primary key finds them, even beside an open transaction. The index of the waiting messages would have to pass
    the old entries of all finished messages.
    """
    messages = tables.messages.c
    query = select(select(messages.id).where(messages.id >= first, messages.state.in_(("waiting", "running"))).exists())
    with db.engine.connect() as connection:
        while connection.scalar(query):
            connection.rollback()
            time.sleep(0.001)


def bare(number: int, effect: Callable[[int], Any]) -> float:
    """Return the effects that a loop without an engine writes in a second, with a commit per batch."""
    clear()
    began = clock()
    for each in range(number):
        effect(each)
        if each % BATCH == BATCH - 1:
            db.session.commit()
    db.session.commit()
    rate = number / (clock() - began)
    check_effects(number, "a bare loop")
    return rate


def send_one(message: int) -> None:
    db.session.execute(insert(effects), {"message": message})


def add_one(message: int) -> None:
    db.session.add(Effect(message=message))


def by_hand(number: int) -> float:
    """Return the messages that hand-written SQL handles in a second, with two commits per batch."""
    clear()
    enqueue_by_hand(number)
    raw = db.engine.raw_connection()
    batch = sqlite_batch if db.engine.dialect.name == "sqlite" else postgresql_batch
    try:
        began = clock()
        while batch(raw.driver_connection):
            pass
        rate = number / (clock() - began)
    finally:
        raw.close()
    check_effects(number, "hand-written SQL")
    return rate


def enqueue_by_hand(number: int, topic: str = "by hand") -> None:
    """Enqueue with one INSERT."""
    values = [json.dumps({"order": each}) for each in range(number)]
    with db.engine.begin() as connection:
        is_sqlite = connection.dialect.name == "sqlite"
        source = "SELECT value FROM json_each(:all)" if is_sqlite else "SELECT unnest(CAST(:all AS text[])) AS value"
        now = NOW[connection.dialect.name]
        statement = (
            "INSERT INTO background_messages (topic, payload, enqueued_at, due_at) "
            f"SELECT :topic, value, {now}, {now} FROM ({source}) AS given"
        )
        connection.execute(text(statement), {"topic": topic, "all": json.dumps(values) if is_sqlite else values})


def postgresql_batch(connection: Any) -> bool:
    execute, commit = connection.execute, connection.commit
    ids = [row[0] for row in execute(POSTGRESQL_CLAIM)]
    commit()
    execute(POSTGRESQL_EFFECTS.replace(":ids", "%s"), (ids,))
    execute("UPDATE background_messages SET state = 'done', finished_at = clock_timestamp() WHERE id = ANY(%s)", (ids,))
    commit()
    return bool(ids)


def sqlite_batch(connection: Any) -> bool:
    execute, commit = connection.execute, connection.commit
    ids = json.dumps([row[0] for row in execute(SQLITE_CLAIM).fetchall()])
    commit()
    execute(SQLITE_EFFECTS.replace(":ids", "?"), (ids,))
    execute(
        f"UPDATE background_messages SET state = 'done', finished_at = {NOW['sqlite']} "
        "WHERE id IN (SELECT value FROM json_each(?))",
        (ids,),
    )
    commit()
    return ids != "[]"


# -- while another client holds a transaction open -----------------------------------------------


def beside_an_open_transaction(setup: Setup, manager: BackgroundWorkerManager) -> Figure:
    """Compare a topic with many finished messages to a fresh one, while an open transaction keeps their old versions.

    A backup holds such a transaction for as long as it lasts.
    """
    finished, number = setup.size(2_000, 1_000_000), setup.size(300, 4_000)
    clear()
    with db.engine.connect().execution_options(isolation_level="REPEATABLE READ") as holder:
        holder.execute(text("SELECT count(*) FROM background_messages")).all()
        finish_by_hand(manager, "many", finished)
        ways = {topic: lambda topic=topic: number / handle(manager, topic, number) for topic in ("many", "fresh")}
        rates = in_turns(setup, "messages beside an open transaction", ways)
        holder.rollback()
    check_effects(2 * number * setup.turns, "beside an open transaction")
    return Figure(
        "handle_many, beside an open transaction",
        "messages/s",
        rates["many"],
        "a fresh topic",
        rates["fresh"],
        aim=">= 0.85",
        at=finished,
    )


def finish_by_hand(manager: BackgroundWorkerManager, topic: str, number: int) -> None:
    """Enqueue and finish messages without a handler.

    If one transaction did both, it would leave no old versions of the rows.
    """
    manager.messages.pause(topic)
    enqueue_by_hand(number, topic)
    with db.engine.begin() as connection:
        connection.execute(text("UPDATE background_messages SET state = 'done', finished_at = clock_timestamp()"))
    manager.messages.resume(topic)
