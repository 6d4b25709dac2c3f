"""The soak's operator, who cancels runs, pauses topics, and deletes rows of workers that run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from random import Random
from typing import NamedTuple

from sqlalchemy import Connection, Engine, delete, select
from sqlalchemy.exc import SQLAlchemyError

from app import create_app
from background import BackgroundWorkerManager
from background.database.tables import executions, workers

from .soak_messages import TOPICS
from .soak_worker import workers as soak_workers

MOST_DELETED = 3
NAME = "the operator"
PAUSE_SECONDS = (0.5, 4.0)
RESUME_AGAIN_SECONDS = 0.5


class Deleted(NamedTuple):
    """A claim in force. `table` is the table of its deleted row, or empty."""

    table: str
    worker: str
    tick: datetime
    token: int

    def __str__(self) -> str:
        return (
            f"{f'{self.table}: ' if self.table else ''}{self.worker}, tick {self.tick:%H:%M:%S.%f}, token {self.token}"
        )


def delete_rows(engine: Engine, random: Random) -> tuple[Deleted, ...]:
    """Delete the executions or the workers' rows of some claims in force. Empty if none could be deleted."""
    forget = random.choice([_forget_execution, _forget_worker])
    try:
        with engine.connect() as connection:
            found = connection.execute(_in_force).all()
            chosen = [
                Deleted("", *row) for row in random.sample(found, min(len(found), random.randint(1, MOST_DELETED)))
            ]
            gone = tuple(each for claim in chosen if (each := forget(connection, claim)))
            connection.commit()
    except SQLAlchemyError:  # the database is away, or a frozen process has locked the row
        return ()
    return gone


@contextmanager
def controls(url: str) -> Iterator[BackgroundWorkerManager]:
    """Give a manager with the soak's workers, which runs none of them."""
    app = create_app({"DATABASE_URL": url, "SECRET_KEY": "soak", "LOG_LEVEL": "ERROR"})
    manager: BackgroundWorkerManager = app.extensions["background_workers"]
    for worker in (*soak_workers(), *TOPICS):
        manager.add(worker)
    try:
        yield manager
    finally:
        manager.stop()


def cancel_run(engine: Engine, manager: BackgroundWorkerManager, random: Random) -> Deleted | None:
    """Cancel a run in force. Return its claim, also if it is unknown whether the request arrived."""
    try:
        with engine.connect() as connection:
            claim = Deleted("", *random.choice(connection.execute(_in_force).all()))
    except (SQLAlchemyError, IndexError):  # the database is away, or nothing runs
        return None
    with suppress(SQLAlchemyError):
        if not manager.cancel(claim.worker, by=NAME, token=claim.token):
            return None
    return claim


class Pauses:
    """Pauses topics, each for some seconds, and resumes them."""

    def __init__(self, manager: BackgroundWorkerManager, random: Random) -> None:
        self._manager, self._random = manager, random
        self._due: dict[str, float] = {}
        self._tried_at: dict[str, float] = {}

    def pause(self) -> tuple[str, float | None, str] | None:
        """Pause a topic. Return it, a moment after the commit, and a note. Return None if all topics are paused.

        The moment is None if the database went away, so that the commit may have failed.
        """
        free = [worker for worker in TOPICS if worker.topic not in self._due]
        if not free:
            return None
        worker, seconds = self._random.choice(free), self._random.uniform(*PAUSE_SECONDS)
        self._due[worker.topic] = time.monotonic() + seconds
        committed = None
        with suppress(SQLAlchemyError):  # the database is away: the pause may be committed or not
            self._manager.pause(worker.name)
            committed = time.time()
        return worker.topic, committed, f"{worker.topic} for {seconds:.1f} s" + ("" if committed else ", perhaps")

    def resume(self, at_once: bool = False) -> Iterator[tuple[str, float]]:
        """Resume the topics that are due. Yield each, with the moment before the first try."""
        for worker in TOPICS:
            topic = worker.topic
            if topic not in self._due or not (at_once or time.monotonic() >= self._due[topic]):
                continue
            tried_at = self._tried_at.setdefault(topic, time.time())
            try:
                self._manager.resume(worker.name)
            except SQLAlchemyError:  # the database is away
                self._due[topic] = time.monotonic() + RESUME_AGAIN_SECONDS
            else:
                del self._due[topic], self._tried_at[topic]
                yield topic, tried_at


_in_force = (
    select(executions.c.worker, executions.c.tick, executions.c.token)
    .join(workers, (workers.c.name == executions.c.worker) & (workers.c.running == executions.c.token))
    .where(executions.c.state == "running", workers.c.name.in_([worker.name for worker in soak_workers()]))
    .order_by(workers.c.name)
)


def _forget_execution(connection: Connection, claim: Deleted) -> Deleted | None:
    is_claim = (executions.c.worker == claim.worker, executions.c.token == claim.token, executions.c.state == "running")
    if claim.worker.startswith("cursor_"):  # its row has the cursor
        return None
    count = connection.execute(delete(executions).where(*is_claim)).rowcount
    return claim._replace(table=executions.name) if count else None


def _forget_worker(connection: Connection, claim: Deleted) -> Deleted | None:
    is_claim = (workers.c.name == claim.worker, workers.c.running == claim.token)
    count = connection.execute(delete(workers).where(*is_claim)).rowcount
    return claim._replace(table=workers.name) if count else None
