"""The soak's operator, who cancels runs, and deletes rows of workers that run."""

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

from .soak_worker import workers as soak_workers

MOST_DELETED = 3
NAME = "the operator"


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
    for worker in soak_workers():
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
