"""What releases and people decide for the whole fleet, schedules and pauses; the workers' rows tell everybody."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, and_, case, func, literal, null, select, update

from ..database.clock import UtcDateTime, now
from ..database.store import count
from ..database.tables import executions, workers
from ..errors import InvalidSchedule
from ..host.logs import logger_of
from ..schedule.parsing import parse_schedule
from ..schedule.periods import Schedule
from .ledger import Ledger, marked, pending

log = logger_of(__name__)


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
        """Make the rows of this release's workers. A changed declaration replaces the one in force.

        The schedule that `reschedule` set stays in force, across deploys too. A new worker begins with its next tick.
        If it is in `first`, it begins with the tick after that moment, or, for None, with any past tick. Without
        `first`, every new worker may begin with a past tick. A row of a worker in `known` was there before: a hand
        deleted it.
        """
        with self._store.begin() as connection:
            there = {row.name: row for row in connection.execute(select(workers, now().label("clock")))}
            clock = connection.execute(select(now())).scalar_one()
            for name, schedule in sorted(schedules.items()):  # so that two of them wait for each other in one order
                declared = {"declared": str(schedule), "declared_by": instance}
                if (row := there.get(name)) is None:
                    asked = first.get(name, clock) if first is not None else None
                    begin = clock if name in known else asked
                    new = self._store.insert(workers).values(
                        name=name,
                        schedule=str(schedule),
                        scheduled_at=now(),
                        **_as_before(name, schedule.previous(min(begin, clock)) if begin else None),
                        **declared,
                    )
                    made = new.on_conflict_do_nothing().returning(workers.c.name)  # psycopg counts no INSERT's rows
                    if connection.execute(made).first() is not None:
                        _adopt(connection, name, schedule.previous(clock), name in known)
                elif row.declared != str(schedule):
                    if row.schedule == row.declared:
                        declared |= _in_force(schedule, row.schedule, row.clock)
                    same = (workers.c.declared == row.declared, workers.c.schedule == row.schedule)
                    connection.execute(update(workers).where(workers.c.name == name, *same).values(declared))

    def pause(self, name: str) -> bool:
        """Stop claiming; True where it was not paused already."""
        paused = update(workers).where(workers.c.name == name, workers.c.paused_at.is_(None))
        return self._write(paused.values(paused_at=now()))

    def resume(self, name: str) -> bool:
        """Claim again; True where it was paused."""
        paused = update(workers).where(workers.c.name == name, workers.c.paused_at.is_not(None))
        return self._write(paused.values(paused_at=null()))

    def reschedule(self, name: str, schedule: Schedule | None) -> bool:
        """Replace the schedule in force, for the whole fleet; None goes back to the declared one."""
        state = self._ledger.look(name)
        if state is None:
            return False
        new = schedule or parse_schedule(state.declared)
        changed = update(workers).where(workers.c.name == name, workers.c.schedule == state.schedule_text)
        return str(new) != state.schedule_text and self._write(
            changed.values(_in_force(new, state.schedule_text, state.clock))
        )

    def _write(self, statement: Any) -> bool:
        with self._store.begin() as connection:
            return count(connection.execute(statement)) == 1


def _adopt(connection: Connection, worker: str, latest: datetime, is_known: bool) -> None:
    """Give the new row of `worker` the claim that its predecessor had, by the newest execution.

    A worker with a history is not new. If the history decides nothing, its ticks up to `latest` count as decided.
    `is_known` says that this instance knew the row of a worker that has no history now.

    Concurrency: this is the transaction that makes the row. No instance can claim before it commits.
    """
    claims = select(executions).where(executions.c.worker == worker, executions.c.token.is_not(None))
    newest = connection.execute(claims.order_by(executions.c.token.desc()).limit(1)).one_or_none()
    if newest is None:
        if is_known:
            log.warning(
                "%s: the worker's row was deleted by hand, and no history of it is left. It begins with its next tick",
                worker,
            )
        return
    if newest.state == "running":
        again: dict[str, Any] = {
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
        again = pending(newest.tick, newest.attempt, newest.trigger)
    else:
        again = {}
    this = workers.c.name == worker
    connection.execute(update(workers).where(this, workers.c.mark.is_(None)).values(mark=latest))
    if again:
        connection.execute(update(workers).where(this).values(again | marked(newest.tick, newest.trigger)))
    log.warning(
        "%s: the worker's row was deleted by hand, so its history makes a new one. The tick %s is %s",
        worker,
        newest.tick.isoformat(),
        newest.state,
    )


def _as_before(name: str, mark: datetime | None) -> dict[str, Any]:
    """Return the token and the mark of a worker without a row.

    After a row was deleted by hand, the history gives both: no token and no tick repeats. Without a history the worker
    is new, and `mark` is its mark.
    """
    own = executions.c.worker == name
    decided = own, executions.c.trigger == "schedule", executions.c.state.not_in(("running", "lost", "handed back"))
    newest = func.max(func.coalesce(executions.c.through, executions.c.tick))
    return {
        "token": select(func.coalesce(func.max(executions.c.token), 0)).where(own).scalar_subquery(),
        "mark": select(func.coalesce(newest, literal(mark, UtcDateTime()))).where(*decided).scalar_subquery(),
    }


def _in_force(new: Schedule, old: str, clock: datetime) -> dict[str, Any]:
    """What puts the schedule `new` in the place of `old`.

    Where the old one owes no tick the new one owes none from before: a daily tick that is moved at 10:00 from 03:00
    to 04:00 has run today.
    """
    values: dict[str, Any] = {"schedule": str(new), "scheduled_at": now()}
    with suppress(InvalidSchedule):  # an old one that only another release can read
        owed, settled = parse_schedule(old).previous(clock), new.previous(clock)
        owes_nothing = and_(workers.c.mark >= owed, workers.c.mark < settled)
        values["mark"] = case((owes_nothing, settled), else_=workers.c.mark)
    return values
