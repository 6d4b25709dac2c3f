"""This engine at the same work: one consumer, with a statement for each message, or for each batch."""

import os
import signal
import sys
import time
from collections.abc import Sequence

from sqlalchemy import Column, Float, Integer, MetaData, Table, insert

from background import Message, MessageWorker, WorkerContext
from models import db

from ..harness.databases import context, without_workers

effects = Table("peer_effects", MetaData(), Column("message", Integer), Column("at", Float(53)))


class Write(MessageWorker):
    """Sends one statement for each message."""

    topic = "write"

    def handle(self, message: Message, context: WorkerContext) -> None:
        context.session.execute(insert(effects), {"message": message.payload, "at": time.time()})


class WriteMany(MessageWorker):
    """Sends one statement for each batch."""

    topic = "write_many"

    def handle_many(self, messages: Sequence[Message], context: WorkerContext) -> None:
        at = time.time()
        context.session.execute(insert(effects), [{"message": each.payload, "at": at} for each in messages])


def main(what: str, number: int, topic: str) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with context(os.environ["PEERS_URL"]):
        manager = without_workers()
        for worker in (Write, WriteMany):
            manager.add(worker)
        if what == "enqueue":
            manager.enqueue_many(topic, list(range(number)))
            db.session.commit()
            return
        manager.start()
        try:
            signal.pause()
        except KeyboardInterrupt:
            manager.stop()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
