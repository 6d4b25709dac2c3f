"""Messages beside the same statements written by hand, in one run. The ratios count, not the absolute numbers.

    python -m benchmarks.messages --engine postgresql --messages 20000

Needs requirements-dev.txt: it starts a PostgreSQL of its own. Every message leaves one row as its effect. The
statements by hand also lease a batch of 100 first, and mark it as done together with its effects.
"""

import argparse
import json
import logging
import statistics
import threading
import time
from collections.abc import Callable, Sequence

from sqlalchemy import Column, Integer, MetaData, Table, insert, literal_column, or_, select, text

from background import BackgroundWorkerManager, Message, MessageWorker, WorkerContext, current_workers
from background.database import tables
from models import db

from .sweep import context, database

BATCH = 100
PROBES = 300

SQLITE_EFFECTS = "INSERT INTO benchmark_effects (message) SELECT value FROM json_each(:ids)"
POSTGRESQL_EFFECTS = "INSERT INTO benchmark_effects (message) SELECT unnest(CAST(:ids AS bigint[]))"

effects = Table("benchmark_effects", MetaData(), Column("id", Integer, primary_key=True), Column("message", Integer))
arrived: dict[int, float] = {}


class OneByOne(MessageWorker):
    topic = "one_by_one"
    batch_size = BATCH

    def handle(self, message: Message, context: WorkerContext) -> None:
        context.session.execute(insert(effects), {"message": message.id})


class Many(MessageWorker):
    topic = "many"
    batch_size = BATCH

    def handle_many(self, messages: Sequence[Message], context: WorkerContext) -> None:
        ids = [message.id for message in messages]
        if db.engine.dialect.name == "sqlite":
            context.session.execute(text(SQLITE_EFFECTS), {"ids": json.dumps(ids)})
        else:
            context.session.execute(text(POSTGRESQL_EFFECTS), {"ids": ids})


class Probe(MessageWorker):
    topic = "probe"

    def handle(self, message: Message, context: WorkerContext) -> None:
        arrived[message.id] = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["sqlite", "postgresql"], required=True)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with database(arguments.engine) as url, context(url):
        logging.disable(logging.INFO)
        effects.create(db.engine)
        manager = current_workers._get_current_object()  # type: ignore[attr-defined]
        for worker in (*manager.workers.values(), *manager.topics.values()):
            manager.remove(worker.name)
        for worker in (OneByOne, Many, Probe):
            manager.add(worker)
        manager.start()
        try:
            measure(manager, arguments.messages, arguments.rounds)
        finally:
            manager.stop()


def measure(manager: BackgroundWorkerManager, number: int, rounds: int) -> None:
    enqueued, one_by_one, many = [], [], []
    for count in range(1, rounds + 1):
        bulk = rate(number, lambda: enqueue_by_hand(number))
        by_hand = rate(number, handle_by_hand)
        rates = {topic: handled(manager, topic, number) for topic in ("one_by_one", "many")}
        enqueued.append(rates["many"][0] / bulk)
        one_by_one.append(rates["one_by_one"][1] / by_hand)
        many.append(rates["many"][1] / by_hand)
        print(
            f"{count}: enqueue by hand {bulk:,.0f}/s, enqueue_many {rates['many'][0]:,.0f}/s; "
            f"handle by hand {by_hand:,.0f}/s, handle {rates['one_by_one'][1]:,.0f}/s, "
            f"handle_many {rates['many'][1]:,.0f}/s"
        )
    print(f"enqueue_many against one INSERT: x{statistics.median(enqueued):.2f}")
    print(f"handle, one by one, against batches by hand (aim: >= 0.25): x{statistics.median(one_by_one):.2f}")
    print(f"handle_many against batches by hand (aim: >= 0.7): x{statistics.median(many):.2f}")
    latencies = sorted(latency(manager) for _ in range(PROBES))
    p50, p99 = (latencies[int(PROBES * share)] * 1000 for share in (0.5, 0.99))
    print(f"from the commit to the handler (aim: p50 < 20 ms): p50 {p50:.1f} ms, p99 {p99:.1f} ms")


def rate(number: int, work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return number / (time.perf_counter() - began)


def handled(manager: BackgroundWorkerManager, topic: str, number: int) -> tuple[float, float]:
    """Return the messages per second that were enqueued, and that one consumer handled."""
    payloads = [{"order": each} for each in range(number)]

    def enqueue() -> None:
        manager.enqueue_many(topic, payloads)
        db.session.commit()

    return rate(number, enqueue), rate(number, lambda: wait_until_done(topic))


def wait_until_done(topic: str) -> None:
    """Wait until the topic is done. Query rarely and by an index, to leave the measured threads alone."""
    waiting, running = (
        select(tables.messages.c.id).where(tables.messages.c.state == literal_column(f"'{state}'"))
        for state in ("waiting", "running")
    )
    query = select(or_(waiting.where(tables.messages.c.topic == topic).exists(), running.exists()))
    with db.engine.connect() as connection:
        while connection.scalar(query):
            connection.rollback()
            threading.Event().wait(0.05)


def latency(manager: BackgroundWorkerManager) -> float:
    number = manager.enqueue("probe", None)
    began = time.perf_counter()
    db.session.commit()
    while number not in arrived:
        threading.Event().wait(0.0005)
    return arrived[number] - began


def enqueue_by_hand(number: int) -> None:
    values = [json.dumps({"order": each}) for each in range(number)]
    with db.engine.begin() as connection:
        if connection.dialect.name == "sqlite":
            source, clock = "SELECT value FROM json_each(:payloads)", "strftime('%Y-%m-%d %H:%M:%f000', 'now')"
            parameter: object = json.dumps(values)
        else:
            source, clock = "SELECT unnest(CAST(:payloads AS text[])) AS value", "clock_timestamp()"
            parameter = values
        connection.execute(
            text(
                "INSERT INTO background_messages (topic, payload, enqueued_at, due_at) "
                f"SELECT 'by hand', value, {clock}, {clock} FROM ({source}) AS given"
            ),
            {"payloads": parameter},
        )


def handle_by_hand() -> None:
    engine = db.engine
    raw = engine.raw_connection()
    try:
        handle = sqlite_batch if engine.dialect.name == "sqlite" else postgresql_batch
        while handle(raw.driver_connection):
            pass
    finally:
        raw.close()


def postgresql_batch(connection: object) -> bool:
    execute, commit = connection.execute, connection.commit  # type: ignore[attr-defined]
    ids = [
        row[0]
        for row in execute(
            "UPDATE background_messages SET state = 'running', attempt = attempt + 1 WHERE id = ANY(ARRAY("
            "SELECT id FROM background_messages WHERE state = 'waiting' AND topic = 'by hand' "
            "ORDER BY due_at, id LIMIT 100 FOR UPDATE SKIP LOCKED)) RETURNING id, payload"
        )
    ]
    commit()
    execute(POSTGRESQL_EFFECTS.replace(":ids", "%s"), (ids,))
    execute("UPDATE background_messages SET state = 'done', finished_at = clock_timestamp() WHERE id = ANY(%s)", (ids,))
    commit()
    return bool(ids)


def sqlite_batch(connection: object) -> bool:
    execute, commit = connection.execute, connection.commit  # type: ignore[attr-defined]
    rows = execute(
        "UPDATE background_messages SET state = 'running', attempt = attempt + 1 WHERE id IN ("
        "SELECT id FROM background_messages WHERE state = 'waiting' AND topic = 'by hand' "
        "ORDER BY due_at, id LIMIT 100) RETURNING id, payload"
    ).fetchall()
    commit()
    ids = json.dumps([row[0] for row in rows])
    execute(SQLITE_EFFECTS.replace(":ids", "?"), (ids,))
    execute(
        "UPDATE background_messages SET state = 'done', finished_at = strftime('%Y-%m-%d %H:%M:%f000', 'now') "
        "WHERE id IN (SELECT value FROM json_each(?))",
        (ids,),
    )
    commit()
    return bool(rows)


if __name__ == "__main__":
    main()
