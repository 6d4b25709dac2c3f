"""What it costs the soak's instances to lose: the statements that they send for each tick which another one had before.

Counted in the processes by hooks of SQLAlchemy's, and written down now and then with what they enqueue.
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
    # How many ticks cost a loser so many.
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
        """From when the engine's connections may be opened."""
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
        """Into the caller's transaction, once there are some; what that loses when it fails is no great loss."""
        with self._counting:
            if self._counted.total() < WRITTEN_AT_ONCE:
                return
            counted, self._counted = self._counted, Counter()
        rows = [{"statements": statements, "ticks": ticks} for statements, ticks in counted.items()]
        session.execute(insert(losses).values(at=now()), rows)


def judge(engine: Engine, since: datetime, until: datetime) -> dict[int, int]:
    """How many ticks cost a loser how many statements, by the number of these."""
    query = select(losses.c.statements, func.sum(losses.c.ticks)).where(losses.c.at.between(since, until))
    with engine.connect() as connection:
        found = connection.execute(query.group_by(losses.c.statements).order_by(losses.c.statements))
        return {statements: int(ticks) for statements, ticks in found}
