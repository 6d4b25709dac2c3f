"""Forgets what is long past."""

from datetime import timedelta

from flask import current_app
from sqlalchemy import CursorResult, delete, func, select

from .context import WorkerContext
from .manager import current_workers
from .models import executions
from .worker import PeriodicWorker

SLICE = 5_000


class PruneHistoryWorker(PeriodicWorker):
    """Delete the executions that ended more than WORKERS_HISTORY_DAYS ago, and the locks that nobody has held since.

    The marks stay, so no tick comes back; a lock that is made anew goes on above its last token.
    """

    period = timedelta(hours=1)

    def do_work(self, context: WorkerContext) -> None:
        cutoff = context.tick - timedelta(days=current_app.config["WORKERS_HISTORY_DAYS"])
        after, deleted = 0, 1
        while deleted:  # ids ascend with time, so the first slice without an old row ends it
            context.raise_if_stopping()
            ids = select(executions.c.id).where(executions.c.id > after).order_by(executions.c.id).limit(SLICE)
            last = context.session.scalar(select(func.max(ids.subquery().c.id))) or after
            result = context.session.execute(
                delete(executions).where(
                    executions.c.id > after, executions.c.id <= last, executions.c.finished_at < cutoff
                )
            )
            deleted = result.rowcount if isinstance(result, CursorResult) else 0
            context.commit()
            after = last
        while current_workers.ticks.locks.prune(cutoff, SLICE):
            context.raise_if_stopping()
