"""Repairs rows that a user edited: executions without a claim, claims without an execution.

A claim and its execution begin and end in one transaction, so one read shows an edited row.
"""

from typing import Any

from sqlalchemy import Connection, Row, and_, exists, or_, select, update

from ..database.clock import now
from ..database.store import count
from ..database.tables import executions, workers
from ..ledger import counters
from ..ledger.claim import Claim, is_stray, strays
from ..ledger.ledger import OUTCOME, Ledger, in_force, respecting_cancel
from ..ledger.statements import IS_FREE, marked, pending

GONE = "its claim is gone: it was ended by hand, or the database lost its commit"
_RUNNING = {"state": "running"}
_OPEN = ("running", "lost", "handed back")


class RowRepair:
    """Repairs the rows of one ledger. Each method is one transaction, and changes nothing if the rows agree."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._store = ledger, ledger.store

    def restore(self, claim: Claim) -> bool:
        """Write the missing execution of a claim in force. True for the instance that did.

        Concurrency: every instance that misses the row may do this, and the run's own end too. The claim's token is
        unique, so only the first writes the row.
        """
        with self._store.begin() as connection:
            held = select(workers.c.name).where(in_force(claim)).with_for_update()
            if connection.execute(held).first() is None:
                return False
            return self._ledger.write_anew(connection, claim, _RUNNING, [claim.token]) is not None

    def disown(self, claim: Claim) -> bool:
        """Write the missing execution of a claim that is not in force, so that its tick gets an answer.

        Return whether the execution was missing.

        Concurrency: an instance may take the run over as usual. It leaves a row, and this call changes nothing.
        """
        with self._store.begin() as connection:
            row = and_(executions.c.worker == claim.worker, executions.c.tick == claim.tick)
            is_known = exists().where(row, executions.c.claim == claim.id)
            if connection.scalar(select(or_(is_known, exists().where(in_force(claim))))):
                return False
            return self._ledger.write_anew(connection, claim, _RUNNING, [claim.token, None]) is not None

    def strays(self, worker: str) -> list[Claim]:
        """Return the claims of the worker's executions that say "running", while the claim is not in force."""
        query = (
            select(strays).join_from(strays, workers, is_stray).where(workers.c.name == worker).order_by(strays.c.id)
        )
        return [_claim(row) for row in self._store.read(query)]

    def end_stray(self, claim: Claim, next_attempt: int | None) -> tuple[str | None, int | None]:
        """End a stray execution as lost, or as cancelled. Return the state that this call wrote, or None.

        Also return the attempt that follows, or None.

        The tick runs again only if the worker's token shows that no instance claimed a tick since.

        Concurrency: every instance that sees the stray may do this. The row's lock orders them, and the first ends it.
        """
        with self._store.begin() as connection:
            same = executions.c.id == claim.execution, executions.c.claim.is_not_distinct_from(claim.id)
            ending = update(executions).where(*same, executions.c.state == "running", ~exists().where(in_force(claim)))
            ending = ending.values(respecting_cancel({"state": "lost", "finished_at": now(), "reason": GONE}))
            ended = connection.execute(ending.returning(*OUTCOME)).one_or_none()
            if ended is None:
                return None, None
            attempt = next_attempt if ended.state == "lost" else None
            again = attempt if attempt and _run_again(connection, claim, attempt) else None
            counters.add_execution(connection, claim, *ended)
        if again:
            self._store.ring()
        return str(ended.state), again


def _run_again(connection: Connection, claim: Claim, attempt: int) -> bool:
    decided = executions.c.worker == claim.worker, executions.c.tick == claim.tick, executions.c.state.not_in(_OPEN)
    nothing_since = and_(workers.c.name == claim.worker, workers.c.token <= claim.token, IS_FREE)
    again = update(workers).where(nothing_since, ~exists().where(*decided))
    values = pending(claim.tick, attempt, claim.trigger) | marked(claim.tick, claim.trigger)
    return count(connection.execute(again.values(values))) == 1


def _claim(row: Row[Any]) -> Claim:
    """Return the claim of an execution. A row that was inserted by hand may lack any value."""
    began = row.started_at, row.claim, row.instance, row.instance_name
    return Claim(row.worker, row.tick, row.attempt or 1, row.token or 0, row.trigger, row.id, *began)
