"""Schedules, pauses and requests to cancel a run. Releases declare schedules, and users change all of them."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, and_, case, func, literal, null, select, update

from ..database.clock import UtcDateTime, now
from ..database.dialects.sqlite import lock_soon
from ..database.store import count
from ..database.tables import executions, workers
from ..errors import ClaimLost, InvalidSchedule
from ..host.logs import logger_of
from ..schedule.parsing import parse_schedule
from ..schedule.periods import Schedule
from .claim import Claim
from .ledger import Ledger, own
from .statements import marked, pending

log = logger_of(__name__)

_PATIENCE_SECONDS = 1.0


class Controls:
    """Writes the schedules and pauses of one ledger's workers. Each change is one conditional UPDATE."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._store = ledger, ledger.store

    def register(
        self,
        schedules: dict[str, Schedule],
        instance: str | None = None,
        first: Mapping[str, datetime | None] | None = None,
        known: Collection[str] = (),
    ) -> None:
        """Insert the rows of this release's workers. A changed declaration replaces the declared schedule in force.

        A schedule that `reschedule` set stays in force, across deploys too. A new worker begins with its next tick.
        A new worker in `first` begins with the tick after that moment, or, for None, with any past tick. Without
        `first`, every new worker may begin with a past tick. A worker in `known` had a row before: a user deleted it.
        """
        with self._store.begin() as connection:
            rows = {row.name: row for row in connection.execute(select(workers))}
            clock = connection.execute(select(now())).scalar_one()
            for name, schedule in sorted(schedules.items()):  # two instances wait for the rows in the same order
                declared = {"declared": str(schedule), "declared_by": instance}
                if (row := rows.get(name)) is None:
                    wanted = first.get(name, clock) if first is not None else None
                    begin = clock if name in known else wanted
                    new = self._store.insert(workers).values(
                        name=name,
                        schedule=str(schedule),
                        scheduled_at=now(),
                        **_from_history(name, schedule.previous(min(begin, clock)) if begin else None),
                        **declared,
                    )
                    # RETURNING, because psycopg does not count the rows of an INSERT.
                    inserted = new.on_conflict_do_nothing().returning(workers.c.name)
                    if connection.execute(inserted).first() is not None:
                        _adopt(connection, name, schedule.previous(clock), name in known)
                elif row.declared != str(schedule):
                    if row.schedule == row.declared:
                        declared |= _replacing(schedule, row.schedule, clock)
                    unchanged = (workers.c.declared == row.declared, workers.c.schedule == row.schedule)
                    connection.execute(update(workers).where(workers.c.name == name, *unchanged).values(declared))

    def pause(self, name: str) -> bool:
        """Pause the worker: no instance claims its ticks. True if it was not paused before."""
        paused = update(workers).where(workers.c.name == name, workers.c.paused_at.is_(None))
        return self._write(paused.values(paused_at=now()))

    def resume(self, name: str) -> bool:
        """End the pause of the worker. True if it was paused."""
        paused = update(workers).where(workers.c.name == name, workers.c.paused_at.is_not(None))
        return self._write(paused.values(paused_at=null()))

    def reschedule(self, name: str, schedule: Schedule | None) -> bool:
        """Replace the schedule in force for the whole fleet. None restores the declared schedule. True if changed."""
        state = self._ledger.look(name)
        if state is None:
            return False
        new = schedule or parse_schedule(state.declared)
        changed = update(workers).where(workers.c.name == name, workers.c.schedule == state.schedule_text)
        return str(new) != state.schedule_text and self._write(
            changed.values(_replacing(new, state.schedule_text, state.clock))
        )

    def cancel(self, claim: Claim, by: str | None) -> bool:
        """Write into the execution of `claim` that the user `by` cancelled it. False if the claim ended otherwise.

        On SQLite the run may hold the write lock for long. Then its instance writes the request, with the outcome.

        Concurrency: the run may end, another user may cancel it, and an instance may recover it. The worker's row
        orders them. The first request stays, and a claim with a request ends as cancelled.
        """
        is_first = executions.c.cancelled_at.is_(None)
        request = update(executions).where(own(claim), is_first).values(cancelled_at=now(), cancelled_by=by)
        is_written = False
        with self._store.begin() as connection, suppress(ClaimLost):
            if self._store.on_sqlite and not lock_soon(connection, _PATIENCE_SECONDS):
                return True
            self._ledger.check(claim, connection)
            connection.execute(request)
            is_written = True
        if is_written:
            self._store.ring()
        return is_written or self._ledger.outcome(claim) == "cancelled"

    def _write(self, statement: Any) -> bool:
        with self._store.begin() as connection:
            return count(connection.execute(statement)) == 1


def _adopt(connection: Connection, worker: str, latest: datetime, is_known: bool) -> None:
    """Give the new row of `worker` the claim of the deleted row, from the newest execution.

    A worker with a history is not new. If the history decides no tick, the ticks up to `latest` count as decided.
    `is_known`: this instance knew the worker's row, so the worker is not new, even without a history.

    Concurrency: this transaction inserts the row. No instance can claim before it commits.
    """
    claims = select(executions).where(executions.c.worker == worker, executions.c.token.is_not(None))
    newest = connection.execute(claims.order_by(executions.c.token.desc()).limit(1)).one_or_none()
    if newest is None:
        if is_known:
            log.warning(
                "%s: the worker's row was deleted by hand, and it has no history. It begins with its next tick",
                worker,
            )
        return
    if newest.state == "running":
        restored: dict[str, Any] = {
            "running": newest.token,
            "claim": newest.claim,
            "claim_tick": newest.tick,
            "claim_attempt": newest.attempt,
            "claim_trigger": newest.trigger,
            "claim_instance": newest.instance,
            "claim_instance_name": newest.instance_name,
            "claim_at": newest.started_at,
        }
    elif newest.state == "handed back":
        restored = pending(newest.tick, newest.attempt, newest.trigger)
    else:
        restored = {}
    this = workers.c.name == worker
    connection.execute(update(workers).where(this, workers.c.mark.is_(None)).values(mark=latest))
    if restored:
        connection.execute(update(workers).where(this).values(restored | marked(newest.tick, newest.trigger)))
    log.warning(
        "%s: the worker's row was deleted by hand, and is restored from the history. The tick %s is %s",
        worker,
        newest.tick.isoformat(),
        newest.state,
    )


def _from_history(name: str, mark: datetime | None) -> dict[str, Any]:
    """Return the token and the mark of a worker without a row.

    If the row was deleted by hand, the history has both, so that no token and no tick repeats. Without a history, the
    worker is new, and `mark` is its mark.
    """
    own = executions.c.worker == name
    decided = own, executions.c.trigger == "schedule", executions.c.state.not_in(("running", "lost", "handed back"))
    newest = func.max(func.coalesce(executions.c.through, executions.c.tick))
    return {
        "token": select(func.coalesce(func.max(executions.c.token), 0)).where(own).scalar_subquery(),
        "mark": select(func.coalesce(newest, literal(mark, UtcDateTime()))).where(*decided).scalar_subquery(),
    }


def _replacing(new: Schedule, old: str, clock: datetime) -> dict[str, Any]:
    """Return the columns that replace the schedule `old` with `new`.

    If all past ticks of the old schedule are decided, the past ticks of the new one count as decided too. Example: at
    10:00 a user moves a daily tick from 03:00 to 04:00. It has run today.
    """
    values: dict[str, Any] = {"schedule": str(new), "scheduled_at": now()}
    with suppress(InvalidSchedule):  # only another release can read the old schedule
        latest_old, latest_new = parse_schedule(old).previous(clock), new.previous(clock)
        is_decided = and_(workers.c.mark >= latest_old, workers.c.mark < latest_new)
        values["mark"] = case((is_decided, latest_new), else_=workers.c.mark)
        following = new.next(clock)
        values["pending_until"] = case((workers.c.pending_until > following, following), else_=workers.c.pending_until)
    return values
