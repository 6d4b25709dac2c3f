"""Enqueueing one message per commit, beside plain inserts, and many at once, beside one INSERT."""

import json
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from selectors import EVENT_READ, DefaultSelector

import psycopg
from sqlalchemy import text

from background import Message, MessageWorker, WorkerContext
from background.database.notifications import CHANNEL
from background.manager import the_manager
from models import db

from ..harness.clock import clock
from ..harness.databases import context, database, driver_address, without_workers
from ..harness.effects import empty
from ..harness.figures import Figure, Setup, check_once, in_turns
from .messages import NOW, enqueue_by_hand

WRITERS = 8
TOPIC = "deliveries"


class Deliveries(MessageWorker):
    """The worker of the topic. No process of this case handles its messages."""

    topic = TOPIC

    def handle(self, message: Message, context: WorkerContext) -> None:
        pass


def run(setup: Setup) -> Iterator[Figure]:
    with database(setup.engine) as url, context(url), listening(url):
        without_workers().add(Deliveries)
        with writing(url, setup.size(2, WRITERS)) as pipes:
            for some in (pipes[:1], pipes):
                ways = {way: lambda some=some, way=way: written(some, way, setup.size(10, 1_000)) for way in WAYS}
                rates = in_turns(setup, f"enqueue, writers: {len(some)}", ways)
                aim = ">= 0.9" if len(some) > 1 else ""
                name = f"enqueue and commit, writers: {len(some)}"
                yield Figure(name, "messages/s", rates["enqueue"], "plain inserts", rates["insert"], aim)
        number = setup.size(500, 20_000)
        ways = {
            "enqueue_many": lambda: bulk(number, enqueue_many),
            "one INSERT": lambda: bulk(number, enqueue_by_hand),
        }
        rates = in_turns(setup, "enqueue_many", ways)
        yield Figure("enqueue_many", "messages/s", rates["enqueue_many"], "one INSERT", rates["one INSERT"])


@contextmanager
def listening(url: str) -> Iterator[None]:
    """Listen with as many connections as there are writers, like the processes of a fleet."""
    if url.startswith("sqlite"):
        yield
        return
    over, selector = threading.Event(), DefaultSelector()

    def hear() -> None:
        while not over.is_set():
            for key, _ in selector.select(0.1):
                key.data.pgconn.consume_input()
                while key.data.pgconn.notifies():
                    pass

    connections = [psycopg.connect(driver_address(url), autocommit=True) for _ in range(WRITERS)]
    for connection in connections:
        connection.execute(f"LISTEN {CHANNEL}")
        selector.register(connection.fileno(), EVENT_READ, connection)
    thread = threading.Thread(target=hear)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for connection in connections:
            connection.close()


def clear() -> None:
    empty("background_message_errors", "background_messages")


@contextmanager
def writing(url: str, writers: int) -> Iterator[list[Connection]]:
    """Start the writers, each a process, and yield the pipes to them."""
    methods = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(writers):
        ours, theirs = methods.Pipe()
        pipes.append(ours)
        processes.append(methods.Process(target=write, args=(url, theirs)))
        processes[-1].start()
    try:
        for pipe in pipes:
            pipe.recv()
        yield pipes
    finally:
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join()


def written(pipes: list[Connection], way: str, number: int) -> float:
    """Return the messages that these writers commit in a second, one by one."""
    clear()
    each = number // len(pipes)
    for pipe in pipes:
        pipe.send((way, each))
    spans = [pipe.recv() for pipe in pipes]
    check_enqueued(each * len(pipes))
    return each * len(pipes) / (max(end for _, end in spans) - min(begin for begin, _ in spans))


def write(url: str, orders: Connection) -> None:
    """Commit messages in the ordered way. Send back the moments of the begin and of the end."""
    with context(url):
        without_workers().add(Deliveries)
        orders.send("ready")
        while order := orders.recv():
            way, number = order
            began = time.monotonic()
            for each in range(number):
                WAYS[way](each)
                db.session.commit()
            orders.send((began, time.monotonic()))


def enqueue(number: int) -> None:
    the_manager().enqueue(TOPIC, {"order": number})


def insert(number: int) -> None:
    now = NOW[db.engine.dialect.name]
    statement = (
        "INSERT INTO background_messages (topic, payload, enqueued_at, due_at) "
        f"VALUES (:topic, :payload, {now}, {now}) RETURNING id"
    )
    db.session.execute(text(statement), {"topic": TOPIC, "payload": json.dumps({"order": number})}).scalar()


WAYS = {"enqueue": enqueue, "insert": insert}


def enqueue_many(number: int) -> None:
    the_manager().enqueue_many(TOPIC, [{"order": each} for each in range(number)])
    db.session.commit()


def bulk(number: int, work: Callable[[int], None]) -> float:
    clear()
    began = clock()
    work(number)
    rate = number / (clock() - began)
    check_enqueued(number)
    return rate


def check_enqueued(expected: int) -> None:
    with db.engine.connect() as connection:
        found, different = connection.execute(
            text("SELECT count(*), count(DISTINCT id) FROM background_messages")
        ).one()
    check_once(expected, found, different, "enqueueing")
