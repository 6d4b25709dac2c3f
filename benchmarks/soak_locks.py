"""The soak's locks: each holder records the time span in which it certainly held the lock.

No two spans may overlap. A process may freeze anywhere, so a moment counts only if the lock was still held after the
clock was read.
"""

import os
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from random import Random
from typing import Any

from sqlalchemy import BigInteger, Column, Engine, Integer, MetaData, Row, String, Table, insert, select, update

from background import Lock, WorkerContext, current_workers
from background.database.clock import UtcDateTime, now
from models import db

NAMES = ("left", "middle", "right")
WAIT_SECONDS = 1.0

metadata = MetaData()

held = Table(
    "soak_held",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(20), nullable=False),
    Column("token", BigInteger, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("since", UtcDateTime, nullable=False),
    # NULL if the process was killed, or had lost the lock by then.
    Column("until", UtcDateTime),
)


def critical(context: WorkerContext) -> None:
    """Try to hold one of three locks for a while, and record it at once, apart from the run's transaction."""
    random = Random(f"{os.environ.get('SOAK_SEED')} {context.worker} {context.tick} {context.attempt}")
    with current_workers.lock(random.choice(NAMES), timeout=WAIT_SECONDS) as lock:
        if lock is None or (since := _held_at(lock)) is None:
            return
        row = insert(held).values(name=lock.name, token=lock.token, pid=os.getpid(), since=since)
        with db.engine.begin() as connection:
            number = connection.execute(row.returning(held.c.id)).scalar_one()
        threading.Event().wait(random.uniform(0.01, 0.4))
        if until := _held_at(lock):
            with db.engine.begin() as connection:
                connection.execute(update(held).where(held.c.id == number).values(until=until))


def _held_at(lock: Lock) -> datetime | None:
    """Return a moment, by the database's clock, at which the lock was held. None if it is lost."""
    with db.engine.connect() as connection:
        clock = connection.execute(select(now())).scalar_one()
    return clock if lock.still_held() else None


@dataclass
class Verdict:
    """The number of spans, the number of overlaps, and the violations as sentences."""

    held: int = 0
    overlaps: int = 0
    violations: list[str] = field(default_factory=list)


def judge(engine: Engine) -> Verdict:
    """Check that the spans of each lock, in the order of their tokens, do not overlap."""
    verdict, by_name = Verdict(), defaultdict[str, list[Row[Any]]](list)
    with engine.connect() as connection:
        for row in connection.execute(select(held).order_by(held.c.token, held.c.id)):
            by_name[row.name].append(row)
    for name, rows in by_name.items():
        verdict.held += len(rows)
        for one, following in pairwise(rows):
            if following.token == one.token or following.since <= (one.until or one.since):
                verdict.overlaps += 1
                verdict.violations.append(f"lock {name}: {_line(one)}, and {_line(following)}")
    return verdict


def _line(row: Row[Any]) -> str:
    until = f"{row.until:%H:%M:%S.%f}" if row.until else "-"
    return f"held by token {row.token} in {row.pid} from {row.since:%H:%M:%S.%f} to {until}"
