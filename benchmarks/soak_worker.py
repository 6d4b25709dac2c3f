"""The shop with workers that leave traces. benchmarks/soak.py starts its processes with it (FLASK_APP).

The periods differ by odd milliseconds, so that the ticks, aligned to the epoch, spread over time.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from random import Random
from typing import Any

from flask import Flask
from sqlalchemy import Column, Integer, MetaData, String, Table, func, insert, select

import app as shop
from background import PeriodicWorker, WorkerContext
from background.database.clock import UtcDateTime, now

from . import soak_locks, soak_messages

SLICES = 4
BY_DESIGN = "the first attempt"
BACKOFF_SECONDS = 0.5
_RETRIED = {"on_failed": "retry", "backoff": timedelta(seconds=BACKOFF_SECONDS)}

effects = Table(
    "soak_effects",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("worker", String(100), nullable=False),
    Column("tick", UtcDateTime, nullable=False),
    # 0 for the effect at the end of a run, and 1, 2 ... for the slices that it committed before.
    Column("part", Integer, nullable=False),
    Column("token", Integer, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("at", UtcDateTime, nullable=False),
)
_NEW_EFFECT = insert(effects).values(at=now())


def _sleep(seconds: float) -> None:
    threading.Event().wait(seconds)


if "FAKETIME" in os.environ:  # libfaketime 0.9.10 makes clock_nanosleep fail, which time.sleep calls
    time.sleep = _sleep  # type: ignore[assignment]


def create_app() -> Flask:
    app = shop.create_app()
    for worker in (*workers(), *soak_messages.TOPICS):
        app.extensions["background_workers"].add(worker)
    soak_messages.Producer(app).start()
    return app


def workers() -> Iterator[type[PeriodicWorker]]:
    """Yield workers with some twelve ticks a second."""
    yield from (_worker(f"quick_{i}", 4.1 + 0.057 * i, quick) for i in range(38))
    yield from (_worker(f"usual_{i}", 5.2 + 0.163 * i, usual) for i in range(10))
    yield from (_worker(f"holding_{i}", 6.1 + 0.331 * i, holding) for i in range(3))
    yield from (_worker(f"deaf_{i}", 6.4 + 0.277 * i, deaf) for i in range(4))
    yield from (_worker(f"slices_{i}", 7.3 + 0.391 * i, in_slices) for i in range(4))
    yield from (_worker(f"cursor_{i}", 7.1 + 0.347 * i, with_cursor) for i in range(4))
    yield from (_worker(f"failing_{i}", 6.3 + 0.419 * i, failing, **_RETRIED) for i in range(4))
    yield from (_worker(f"long_{i}", 6.7 + 0.443 * i, long) for i in range(6))
    yield from (_worker(f"longest_{i}", 11.3 + 0.717 * i, longest) for i in range(2))
    yield from (_worker(f"locking_{i}", 2.9 + 0.203 * i, locking) for i in range(5))


def _worker(name: str, period: float, body: Callable[[WorkerContext], None], **attributes: Any) -> type[PeriodicWorker]:
    def do_work(self: PeriodicWorker, context: WorkerContext) -> None:
        body(context)

    # Three instances may be killed in a row here, so a worker needs more attempts.
    members = {"name": name, "period": timedelta(seconds=period), "max_attempts": 100, "do_work": do_work}
    return type(name, (PeriodicWorker,), members | attributes)


def quick(context: WorkerContext) -> None:
    time.sleep(_seconds(context, 0.001, 0.03))
    _leave(context)


def usual(context: WorkerContext) -> None:
    time.sleep(_seconds(context, 0.03, 0.4))
    _leave(context)


def holding(context: WorkerContext) -> None:
    """Write first, and hold the lock until the end: on SQLite the single write lock."""
    _leave(context)
    time.sleep(_seconds(context, 0.001, 0.03))


def deaf(context: WorkerContext) -> None:
    """Ignore the request to stop, and end when the work is done."""
    time.sleep(_seconds(context, 0.3, 1))
    _leave(context)


def in_slices(context: WorkerContext) -> None:
    """Commit in slices, and go on after the last slice of the attempt before."""
    committed = (effects.c.worker == context.worker, effects.c.tick == context.tick, effects.c.part > 0)
    done = context.session.scalar(select(func.count()).select_from(effects).where(*committed)) or 0
    for part in range(done + 1, SLICES + 1):
        _work(context, _seconds(context, 0.6, 1.2) / SLICES)
        _leave(context, part)
        context.progress(part, SLICES)
        context.commit()
    _leave(context)


def with_cursor(context: WorkerContext) -> None:
    """Commit in slices, and go on behind the cursor."""
    for part in range((context.cursor or 0) + 1, SLICES + 1):
        _work(context, _seconds(context, 0.6, 1.2) / SLICES)
        _leave(context, part)
        context.cursor = part
        context.commit()
    _leave(context)


def failing(context: WorkerContext) -> None:
    """Fail at the first attempt."""
    time.sleep(_seconds(context, 0.001, 0.03))
    _leave(context)
    if context.attempt == 1:
        raise ValueError(BY_DESIGN)


def long(context: WorkerContext) -> None:
    """Run longer than a heartbeat."""
    _work(context, _seconds(context, 0.6, 1.6))
    _leave(context)


def longest(context: WorkerContext) -> None:
    """Run longer than the lease."""
    _work(context, _seconds(context, 2.2, 3))
    _leave(context)


def locking(context: WorkerContext) -> None:
    """Hold a lock for a part of the run."""
    soak_locks.critical(context)
    _leave(context)


def _work(context: WorkerContext, seconds: float) -> None:
    if context.stopping.wait(seconds):
        context.raise_if_stopping()


def _seconds(context: WorkerContext, least: float, most: float) -> float:
    seed = f"{os.environ.get('SOAK_SEED')} {context.worker} {context.tick} {context.attempt}"
    return Random(seed).uniform(least, most)


def _leave(context: WorkerContext, part: int = 0) -> None:
    row = {"worker": context.worker, "tick": context.tick, "part": part, "token": context.token, "pid": os.getpid()}
    context.session.execute(_NEW_EFFECT, row)
