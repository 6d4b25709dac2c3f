"""Deletes old history."""

from datetime import UTC, datetime, timedelta

from flask import current_app
from sqlalchemy import and_, delete, exists, func, or_, select

from .context import WorkerContext
from .database.store import count
from .database.tables import executions, messages, tallies, workers
from .manager import current_workers
from .worker import PeriodicWorker

SLICE = 5_000  # rows of one commit
_MOST_ON_SQLITE = 1_000  # rows, because every other writer waits for the commit


class PruneHistoryWorker(PeriodicWorker):
    """Delete the executions and messages that ended more than WORKERS_HISTORY_DAYS ago, and locks not held since then.

    The counts for the charts are deleted after the same time, and those of five minutes after three hours.

    The marks stay, so no tick comes back. The cursor of a tick that will run again stays. Dead letters stay. A message
    with a key stays for MESSAGES_KEY_DAYS, if that is longer, so that its key refuses a second message. The tokens of a
    deleted lock go on above its last token.
    """

    period = timedelta(hours=1)
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        _prune_executions(context)
        _prune_messages(context)
        _prune_tallies(context)
        while current_workers.locks.prune(_ago(context, "WORKERS_HISTORY_DAYS"), SLICE):
            context.raise_if_stopping()


def _prune_executions(context: WorkerContext) -> None:
    cutoff = _ago(context, "WORKERS_HISTORY_DAYS")
    after, deleted = 0, 1
    while deleted:  # ids ascend with time, so the first slice without an old row ends the loop
        context.raise_if_stopping()
        within = context.within(context.session)
        ids = select(executions.c.id).where(executions.c.id > after).order_by(executions.c.id).limit(_slice())
        last = within.execute(select(func.max(ids.subquery().c.id))).scalar() or after
        in_slice = (executions.c.id > after, executions.c.id <= last)
        old = delete(executions).where(*in_slice, executions.c.finished_at < cutoff, or_(~_has_cursor, ~_goes_on))
        deleted = count(within.execute(old))
        _commit_slice(context)
        after = last


_has_cursor = executions.c.cursor.is_not(None)
_is_running = and_(workers.c.running.is_not(None), workers.c.claim_tick == executions.c.tick)
# The next attempt at this tick, or the attempt that runs, begins with the cursor.
_goes_on = exists().where(
    workers.c.name == executions.c.worker, or_(_is_running, workers.c.pending_tick == executions.c.tick)
)


def _prune_messages(context: WorkerContext) -> None:
    """Delete the messages. The database deletes their errors with them."""
    cutoff, key_cutoff = _ago(context, "WORKERS_HISTORY_DAYS"), _ago(context, "MESSAGES_KEY_DAYS")
    is_forgotten = messages.c.state.in_(("done", "discarded")) & or_(
        messages.c.key.is_(None), messages.c.finished_at < key_cutoff
    )
    ended, after = messages.c.finished_at, datetime(1900, 1, 1, tzinfo=UTC)
    while True:
        context.raise_if_stopping()
        within = context.within(context.session)
        old = select(ended).where(ended > after, ended < cutoff).order_by(ended).limit(_slice()).subquery()
        last = within.execute(select(func.max(old.c.finished_at))).scalar()
        if last is None:
            break
        within.execute(delete(messages).where(ended > after, ended <= last, is_forgotten))
        _commit_slice(context)
        after = last


def _slice() -> int:
    """Return the number of rows of one commit."""
    return min(SLICE, _MOST_ON_SQLITE) if current_workers.stores.main.has_one_writer else SLICE


def _commit_slice(context: WorkerContext) -> None:
    """Commit. On SQLite, let the connections write that wait for the write lock."""
    context.commit()
    stores = current_workers.stores
    if stores.main.has_one_writer:
        stores.connections.let_others_write(context.stopping.wait)


def _prune_tallies(context: WorkerContext) -> None:
    """Delete old counts, and counts from a time when the clock was ahead."""
    start = tallies.c.start
    for length, kept in current_workers.stores.roll_up.kept.items():
        is_out = or_(start < context.tick - kept, start > context.tick + timedelta(days=1))
        within = context.within(context.session)
        within.execute(delete(tallies).where(tallies.c.seconds == int(length.total_seconds()), is_out))
        context.commit()


def _ago(context: WorkerContext, setting: str) -> datetime:
    return context.tick - timedelta(days=current_app.config[setting])
