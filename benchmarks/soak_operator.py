"""The soak's operator, who deletes rows of workers that run: their executions, or their own rows."""

from datetime import datetime
from random import Random
from typing import NamedTuple

from sqlalchemy import Connection, Engine, delete, select
from sqlalchemy.exc import SQLAlchemyError

from background.database.tables import executions, workers

from .soak_worker import workers as soak_workers

MOST_DELETED = 3


class Deleted(NamedTuple):
    """The claim that a deleted row was about."""

    table: str
    worker: str
    tick: datetime
    token: int

    def __str__(self) -> str:
        return f"{self.table}: {self.worker}, tick {self.tick:%H:%M:%S.%f}, token {self.token}"


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


_in_force = (
    select(executions.c.worker, executions.c.tick, executions.c.token)
    .join(workers, (workers.c.name == executions.c.worker) & (workers.c.running == executions.c.token))
    .where(executions.c.state == "running", workers.c.name.in_([worker.name for worker in soak_workers()]))
    .order_by(workers.c.name)
)


def _forget_execution(connection: Connection, claim: Deleted) -> Deleted | None:
    is_claim = (executions.c.worker == claim.worker, executions.c.token == claim.token, executions.c.state == "running")
    count = connection.execute(delete(executions).where(*is_claim)).rowcount
    return claim._replace(table=executions.name) if count else None


def _forget_worker(connection: Connection, claim: Deleted) -> Deleted | None:
    is_claim = (workers.c.name == claim.worker, workers.c.running == claim.token)
    count = connection.execute(delete(workers).where(*is_claim)).rowcount
    return claim._replace(table=workers.name) if count else None
