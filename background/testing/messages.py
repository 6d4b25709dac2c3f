"""Messages in a test: assertions about enqueued messages, and their handling."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from flask import Flask
from sqlalchemy import func, select

from ..database.tables import is_waiting, message_errors, messages
from ..errors import UnknownTopic
from ..manager import BackgroundWorkerManager
from ..runs.batch import BatchRun
from ..worker import MessageWorker
from .runs import manager_of

ANY: Any = object()
"""Any payload."""
_MOST_SHOWN = 20
_MOST_MORE = 10_000  # messages that one drain handles beside the messages that wait at its start


@dataclass(frozen=True)
class Drained:
    """The messages that `drain` handled, by their outcome."""

    done: int
    waiting: int
    """The number of messages that failed or were postponed, and wait for another attempt."""
    dead: int
    errors: tuple[str, ...]
    """The traceback of each failed attempt, or the reason of its `Bury`, oldest first."""


def drain(app: Flask, topic: str | None = None) -> Drained:
    """Handle every message of `topic` that is due now, and the messages that the handlers enqueue. None: all topics.

    Returns once no message is due. A message that failed is due again after its worker's `backoff`: move the clock and
    drain again. Raises UnknownTopic, and RuntimeError if there is no end.
    """
    manager = manager_of(app)
    if topic is not None and topic not in manager.topics:
        raise UnknownTopic(topic, manager.topics)
    workers = [worker for of, worker in manager.topics.items() if topic in (None, of)]
    store, ids, handled = manager.stores.main, set[int](), 0
    [(waiting,)] = store.read(select(func.count()).select_from(messages).where(is_waiting))
    while found := [id for worker in workers for id in _handle_due(manager, worker)]:
        ids.update(found)
        handled += len(found)
        if handled > waiting + _MOST_MORE:
            raise RuntimeError(
                f"drain has handled {handled:,} messages, although {waiting:,} waited at its start; expected handlers "
                "that come to an end. A handler enqueues another message each time, or fails without a `backoff`."
            )
    states = Counter(
        row.state for row in store.read(select(messages.c.state).where(store.is_among(messages.c.id, ids)))
    )
    failed = select(message_errors.c.error).where(store.is_among(message_errors.c.message, ids))
    errors = tuple(row.error for row in store.read(failed.order_by(message_errors.c.id)))
    return Drained(states["done"], states["waiting"], states["dead"], errors)


def _handle_due(manager: BackgroundWorkerManager, worker: type[MessageWorker]) -> list[int]:
    """Handle one batch. Return the ids of its messages."""
    queue = manager.stores.queue
    with manager.presence.present() as instance:
        batch = queue.claim(worker.name, worker.topic, worker.batch_size, (instance.id, instance.name))
        if batch is None:
            return []
        BatchRun(worker, batch, queue, manager.runs, instance, Counter()).run()
        return list(batch.ids)


def assert_enqueued(app: Flask, topic: str, payload: Any = ANY) -> None:
    """Fail unless a committed message with this `payload` waits in `topic`. A delayed message waits, too."""
    if not _waiting(app, topic, payload):
        raise AssertionError(
            f"No message waits in {topic!r} with {_named(payload)}; expected a committed message. "
            f"Waiting there: {_listed(_waiting(app, topic, ANY))}."
        )


def assert_not_enqueued(app: Flask, topic: str, payload: Any = ANY) -> None:
    """Fail if a committed message with this `payload`, or with any payload, waits in `topic`."""
    if waiting := _waiting(app, topic, payload):
        raise AssertionError(f"Messages wait in {topic!r}; expected none with {_named(payload)}: {_listed(waiting)}.")


def _waiting(app: Flask, topic: str, payload: Any) -> list[Any]:
    """Return the payloads that wait in `topic` and equal `payload`. Raises UnknownTopic."""
    manager = manager_of(app)
    if topic not in manager.topics:
        raise UnknownTopic(topic, manager.topics)
    wanted = select(messages.c.payload).where(messages.c.topic == topic, messages.c.state == "waiting")
    found = [json.loads(row.payload) for row in manager.stores.main.read(wanted.order_by(messages.c.id))]
    return [each for each in found if payload is ANY or each == payload]


def _named(payload: Any) -> str:
    return "any payload" if payload is ANY else f"the payload {payload!r}"


def _listed(payloads: list[Any]) -> str:
    more = f" and {len(payloads) - _MOST_SHOWN} more" if len(payloads) > _MOST_SHOWN else ""
    return f"{', '.join(map(repr, payloads[:_MOST_SHOWN]))}{more}" if payloads else "no message"
