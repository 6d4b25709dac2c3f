"""Repairs the rows after the database's clock was ahead: delayed ticks and messages become due again.

A moment in the clock's future shows that the clock was ahead. The mark goes back to the newest decided tick before now.
No tick runs twice: up to the old mark, no instance claims a tick that has an execution.
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, and_, case, delete, func, or_, select, true, update

from ..database.clock import AHEAD, LONGEST_PAUSE, elapsed, now
from ..database.store import Store, count
from ..database.tables import executions, is_in, messages, workers
from ..errors import InvalidSchedule
from ..ledger.claim import WorkerState, pending_of
from ..ledger.statements import NOTHING_PENDING, attempted, pending
from ..schedule.parsing import parse_schedule
from ..schedule.periods import MICROSECOND, Schedule

_SLICE = 5_000  # messages that one statement changes


def is_ahead(state: WorkerState | Row[Any]) -> bool:
    """Return whether a moment of the worker's row lies in the future of the clock in the same read."""
    retried = state.pending_tick if state.pending_trigger != "manual" else None
    ahead = any(at is not None and at > state.clock + AHEAD for at in (state.mark, state.scheduled_at, retried))
    return ahead or _is_retried_late(state)


def _is_retried_late(state: WorkerState | Row[Any]) -> bool:
    """Return whether a failed tick waits for longer than any backoff."""
    at = pending_of(state).retry_at if isinstance(state, Row) else state.retry_at
    return at is not None and at > state.clock + LONGEST_PAUSE


class ClockRepair:
    """Repairs the moments that a clock wrote while it was ahead."""

    def __init__(self, store: Store, history: timedelta) -> None:
        self._store, self._history = store, history

    def is_proven(self, states: Iterable[WorkerState]) -> bool:
        """Return whether the history still has each tick that any worker ran after now.

        Pruning reads the clock. If it was ahead by more than the length of the history, the rows may be pruned.
        """
        return all(state.mark is None or state.mark <= state.clock + self._history for state in states)

    def all(self, states: Iterable[WorkerState]) -> tuple[list[str], int]:
        """Repair the workers and the messages. Return the names of the repaired workers, and the number of messages."""
        names = [state.name for state in states if is_ahead(state)]
        return [name for name in names if self.worker(name)], self.messages()

    def worker(self, name: str) -> bool:
        """Let the ticks of the worker go on from the clock's present time. False if no moment lies in its future.

        Concurrency: each instance that finds the worker ahead may do this. The row's lock orders them, and the first
        instance repairs the row.
        """
        with self._store.begin() as connection:
            held = update(workers).where(workers.c.name == name).values(name=workers.c.name)
            row = connection.execute(held.returning(*workers.c, now().label("clock"))).one_or_none()
            if row is None or not is_ahead(row):
                return False
            try:
                schedule = parse_schedule(row.schedule)
            except InvalidSchedule:  # the schedule of a newer release, whose instances repair the row
                return False
            connection.execute(
                update(workers).where(workers.c.name == name).values(_repaired(connection, row, schedule))
            )
        return True

    def messages(self) -> int:
        """Repair the due time of each message that the clock delayed. Return their number.

        A message that was never tried is due after the delay that its caller gave, from now on.

        Concurrency: each instance may do this, and consumers claim meanwhile. A message changes once, and only while
        it waits.
        """
        delay = elapsed(messages.c.enqueued_at, messages.c.due_at)
        was_tried = or_(messages.c.attempt > 0, messages.c.claimed_at.is_not(None))
        due_at = case((was_tried, now()), else_=now(func.coalesce(delay, 0.0)))
        enqueued_at = case((messages.c.enqueued_at > now(AHEAD), now()), else_=messages.c.enqueued_at)
        number = 0
        while some := self._put_off():
            ours = and_(messages.c.id.in_(some), _is_put_off)
            repaired = update(messages).where(ours).values(due_at=due_at, enqueued_at=enqueued_at)
            with self._store.begin() as connection:
                number += count(connection.execute(repaired))
        if number:
            self._store.ring()
        return number

    def _put_off(self) -> Sequence[int]:
        """Return the ids of some delayed messages. This read needs no write lock on SQLite."""
        return [row.id for row in self._store.read(select(messages.c.id).where(_is_put_off).limit(_SLICE))]

    def pass_over(self, state: WorkerState, tick: datetime, attempt_after: Callable[[int], int | None]) -> bool:
        """Raise the mark to a tick that an instance ran while the clock was ahead. False if the tick did not run.

        If its last attempt was lost or handed back, the tick is pending from now on.

        Concurrency: each instance that wants to run the tick may do this. The first raises the mark.
        """
        if state.mark_ahead is None or state.mark_ahead < tick:
            return False
        ran = select(executions.c.attempt, executions.c.state).where(attempted(state.name), executions.c.tick == tick)
        rows = self._store.read(ran.order_by(executions.c.id.desc()).limit(1))
        if not rows:
            return False
        row = rows[0]
        again = {"lost": attempt_after(row.attempt), "handed back": row.attempt}.get(row.state)
        values: dict[str, Any] = {"mark": tick}
        if again is not None:
            values |= pending(tick, again, "schedule")
        is_open = or_(workers.c.mark.is_(None), workers.c.mark < tick)
        may = and_(is_open, workers.c.schedule == state.schedule_text)
        is_free = NOTHING_PENDING if again is not None else true()
        with self._store.begin() as connection:
            connection.execute(update(workers).where(workers.c.name == state.name, may, is_free).values(values))
        return True


def repaired_text(names: Sequence[str], number: int) -> str:
    """Return a text that names the repaired workers and counts the repaired messages."""
    parts = [", ".join(sorted(names))] if names else []
    if number:
        parts.append(f"{number:,} message{'' if number == 1 else 's'}")
    return " and ".join(parts)


# A waiting message with a due time that only a clock ahead of now can have written. A message that failed is due again
# after at most `LONGEST_PAUSE`. A message that was never tried is due after the delay that its caller gave. A message
# that its handler postponed was claimed before, and may be due after any time.
_is_put_off = and_(
    is_in("waiting"),
    messages.c.due_at > now(AHEAD),
    or_(
        messages.c.claimed_at > now(AHEAD),
        and_(messages.c.attempt == 0, messages.c.enqueued_at > now(AHEAD)),
        and_(messages.c.attempt > 0, messages.c.postponed.is_(None), messages.c.due_at > now(LONGEST_PAUSE)),
    ),
)
_end = func.coalesce(executions.c.through, executions.c.tick)


def _repaired(connection: Connection, row: Row[Any], schedule: Schedule) -> dict[str, Any]:
    """Return the repaired columns of the worker's row.

    This first shortens the executions that call ticks after the clock skipped or missed.
    """
    values: dict[str, Any] = {}
    last, latest = schedule.previous(row.clock), row.clock + AHEAD
    if row.mark is not None and row.mark > latest:
        _cut(connection, row, schedule, last)
        scheduled = (executions.c.worker == row.name, executions.c.trigger == "schedule", _end <= row.clock)
        newest = select(_end).where(*scheduled).order_by(executions.c.tick.desc(), executions.c.id.desc()).limit(1)
        # Without a history, the latest tick counts as decided: it may have run.
        values["mark"] = connection.execute(newest).scalar() or last
        values["mark_ahead"] = max(row.mark, row.mark_ahead or row.mark)
    if row.scheduled_at > latest:
        values["scheduled_at"] = row.clock
    if row.pending_tick is not None and row.pending_tick > latest and row.pending_trigger != "manual":
        # The tick is due again when the clock reaches it: see `pass_over`.
        values |= pending(None, None, None)
    elif _is_retried_late(row):
        values["pending_after"] = row.clock
    return values


def _cut(connection: Connection, row: Row[Any], schedule: Schedule, last: datetime) -> None:
    """Shorten the rows of skipped or missed ticks, so that they contain no tick after the clock.

    A row of missed ticks does not contain the latest tick either.
    """
    ahead = and_(executions.c.worker == row.name, executions.c.attempt.is_(None), _end > row.clock)
    for each in connection.execute(select(executions.c.id, executions.c.tick, executions.c.state).where(ahead)).all():
        through = last if each.state == "skipped" else schedule.previous(last - MICROSECOND)
        one = executions.c.id == each.id
        if each.tick <= through:
            connection.execute(update(executions).where(one).values(through=through))
        else:
            connection.execute(delete(executions).where(one))
