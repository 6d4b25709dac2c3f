"""Counts the statements that an instance of the soak sends for a tick that another instance claimed.

Hooks of SQLAlchemy count in each process. The counts are written now and then with the enqueued messages.
"""

import threading
from collections import Counter
from datetime import datetime
from typing import Any

from sqlalchemy import Column, Engine, Integer, MetaData, Table, event, func, insert, select
from sqlalchemy.orm import Session

from background import BackgroundWorkerManager
from background.database.clock import UtcDateTime, now

WRITTEN_AT_ONCE = 50  # ticks

metadata = MetaData()

losses = Table(
    "soak_losses",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Column("statements", Integer, nullable=False),
    # The number of ticks that cost a loser so many statements.
    Column("ticks", Integer, nullable=False),
)


class Losses:
    """Counts in one process. An instance loses a tick that it neither runs, skips nor puts off."""

    def __init__(self, workers: BackgroundWorkerManager) -> None:
        self._stores, self._call, self._counted = workers.stores, threading.local(), Counter[int]()
        self._counting = threading.Lock()
        self._run, self._pass_over = workers.ticks.run, workers.ticks._skipped_or_postponed
        workers.ticks.run = self._count  # type: ignore[method-assign]
        workers.ticks._skipped_or_postponed = self._note  # type: ignore[method-assign]

    def listen(self) -> None:
        """Count from now on. This opens the engine's pool, so call it only in the serving process."""
        event.listen(self._stores.main.engine, "before_cursor_execute", self._sent)

    def _sent(self, *_: Any) -> None:
        self._call.statements = getattr(self._call, "statements", 0) + 1

    def _note(self, *arguments: Any) -> Any:
        self._call.is_no_loss = self._pass_over(*arguments)
        return self._call.is_no_loss

    def _count(self, *arguments: Any) -> Any:
        self._call.statements, self._call.is_no_loss = 0, False
        found = self._run(*arguments)
        if found is None and self._call.statements and not self._call.is_no_loss:
            with self._counting:
                self._counted[self._call.statements] += 1
        return found

    def write(self, session: Session) -> None:
        """Write the counts into the caller's transaction, once there are enough. A rollback loses them."""
        with self._counting:
            if self._counted.total() < WRITTEN_AT_ONCE:
                return
            counted, self._counted = self._counted, Counter()
        rows = [{"statements": statements, "ticks": ticks} for statements, ticks in counted.items()]
        session.execute(insert(losses).values(at=now()), rows)


def judge(engine: Engine, since: datetime, until: datetime) -> dict[int, int]:
    """Return the number of lost ticks for each number of statements."""
    query = select(losses.c.statements, func.sum(losses.c.ticks)).where(losses.c.at.between(since, until))
    with engine.connect() as connection:
        found = connection.execute(query.group_by(losses.c.statements).order_by(losses.c.statements))
        return {statements: int(ticks) for statements, ticks in found}
