"""The soak's messages. The producer writes a letter for each in the same transaction, and the handler a receipt.

So the database knows all enqueued messages, even if the producer was killed.
"""

import os
import threading
import time
from datetime import timedelta
from random import Random
from uuid import uuid4

from flask import Flask
from sqlalchemy import BigInteger, Boolean, Column, Integer, MetaData, String, Table, insert
from sqlalchemy.exc import SQLAlchemyError

from background import BackgroundWorkerManager, Later, Message, MessageWorker, WorkerContext
from background.database.clock import UtcDateTime, now
from models import db

from .soak_losers import Losses

TRANSACTIONS_A_SECOND = 6.0  # of each process
KEY_SECONDS = 0.5  # all producers use the same key for this time
POISON, POSTPONED, ROLLED_BACK = "poison", "postponed", "rolled back"
POSTPONEMENTS = 2  # of each postponed message, unless a fault ends its run first

metadata = MetaData()

letters = Table(
    "soak_letters",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("kind", String(20), nullable=False),
    Column("key", String(50)),
    # True if an earlier message had the key.
    Column("refused", Boolean, nullable=False),
)

receipts = Table(
    "soak_receipts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("letter", String(32), nullable=False),
    Column("message", BigInteger, nullable=False),
    Column("token", BigInteger, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("at", UtcDateTime, nullable=False),
)

# Built once, because they are many, and their cost is not the engine's.
_NEW_LETTER, _NEW_RECEIPT = insert(letters), insert(receipts).values(at=now())


class Letters(MessageWorker):
    """Quick messages in batches. Some always fail, and some are postponed at first."""

    topic = "letters"
    batch_size = 10
    max_attempts = 8  # the soak does not kill one message this often in a row
    backoff = timedelta(seconds=0.02)

    def handle(self, message: Message, context: WorkerContext) -> None:
        _receive(message, context)
        if message.payload["kind"] == POISON:
            raise ValueError("poison")
        if message.payload["kind"] == POSTPONED and message.token <= POSTPONEMENTS:
            seconds = Random(f"{message.id} {message.token}").uniform(0.01, 0.5)
            raise Later(timedelta(seconds=seconds), "not yet")


class Parcels(MessageWorker):
    """Slow messages, one at a time. They write at their end, so that they do not hold SQLite's write lock."""

    topic = "parcels"
    batch_size = 1
    max_attempts = 100
    concurrency = 2

    def handle(self, message: Message, context: WorkerContext) -> None:
        time.sleep(Random(message.payload["letter"]).uniform(0.1, 0.5))
        _receive(message, context)


TOPICS = (Letters, Parcels)


def _receive(message: Message, context: WorkerContext) -> None:
    row = {"letter": message.payload["letter"], "message": message.id, "token": message.token, "pid": os.getpid()}
    context.session.execute(_NEW_RECEIPT, row)


class Producer(threading.Thread):
    """Enqueues as the views of a web process do, until this process is told to end."""

    def __init__(self, app: Flask) -> None:
        super().__init__(name="soak-producer", daemon=True)
        self._app = app
        self._workers: BackgroundWorkerManager = app.extensions["background_workers"]
        self._losses = Losses(self._workers)
        self._random = Random(f"{os.environ.get('SOAK_SEED')} {os.getpid()}")

    def run(self) -> None:
        self._losses.listen()
        while not self._workers.runs.stopping.wait(self._random.uniform(0, 2 / TRANSACTIONS_A_SECOND)):
            try:
                with self._app.app_context():
                    self._transact()
            except SQLAlchemyError:  # the letters show whether the transaction was committed
                continue

    def _transact(self) -> None:
        share = self._random.random()
        if share < 0.1:
            self._enqueue("letters", ROLLED_BACK)
            db.session.rollback()
        elif share < 0.2:
            with db.session.begin_nested() as savepoint:
                self._enqueue("letters", ROLLED_BACK)
                savepoint.rollback()
            self._enqueue("letters")
        elif share < 0.4:
            self._enqueue("letters", key=f"{time.time() // KEY_SECONDS:.0f}")
        elif share < 0.5:
            self._enqueue_many("letters", self._random.randint(2, 8))
        elif share < 0.6:
            self._enqueue("letters", delay=self._random.uniform(0, 2))
        elif share < 0.63:
            self._enqueue("letters", POISON)
        elif share < 0.7:
            self._enqueue("parcels")
        elif share < 0.73:
            self._enqueue("letters", POSTPONED)
        else:
            self._enqueue("letters")
        self._losses.write(db.session())
        db.session.commit()

    def _enqueue(self, topic: str, kind: str = "usual", key: str | None = None, delay: float | None = None) -> None:
        letter = uuid4().hex
        found = self._workers.enqueue(topic, {"letter": letter, "kind": kind}, key, delay)
        db.session.execute(_NEW_LETTER, {"id": letter, "kind": kind, "key": key, "refused": found is None})

    def _enqueue_many(self, topic: str, count: int) -> None:
        new = [uuid4().hex for _ in range(count)]
        self._workers.enqueue_many(topic, [{"letter": letter, "kind": "usual"} for letter in new])
        db.session.execute(_NEW_LETTER, [{"id": each, "kind": "usual", "refused": False} for each in new])
