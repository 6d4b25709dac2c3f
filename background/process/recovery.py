"""Recovers ticks: ends claims that no instance runs, and mends rows that were changed by hand."""

from collections.abc import Collection, Mapping
from datetime import datetime

from flask import Flask

from ..host.logs import logger_of
from ..ledger.claim import Claim, WorkerState
from ..registry import begins, declared_schedule
from ..repair.edited_rows import GONE
from ..runs.execution import follows
from ..runs.running import Runs
from ..schedule.periods import MICROSECOND
from ..signals import execution_handed_back, execution_lost, send
from ..stores import Stores
from ..worker import PeriodicWorker, attempt_after
from .presence import Presence

log = logger_of(__name__)

_UNKNOWN = "its claim has neither an id nor an execution, so the instance that runs it is unknown"


class Recovery:
    """Recovers the ticks of `workers` (by name)."""

    def __init__(
        self, app: Flask, stores: Stores, presence: Presence, runs: Runs, workers: Mapping[str, type[PeriodicWorker]]
    ) -> None:
        self._app, self._stores, self._presence, self._runs, self._workers = app, stores, presence, runs, workers

    def look(self, worker: type[PeriodicWorker], asked: datetime | None = None) -> WorkerState:
        """Read the worker's state. If it has no row, make the row first.

        A worker without a row begins with its latest tick up to `asked`, if a caller asks for that tick.
        """
        state = self._stores.ledger.look(worker.name)
        if state is None:
            schedule, first = declared_schedule(worker), begins([worker])
            if asked is not None:
                first = {worker.name: schedule.previous(asked) - MICROSECOND, **first}
            self._stores.controls.register({worker.name: schedule}, first=first)
            state = self._stores.ledger.look(worker.name)
            assert state is not None  # noqa: S101 - the row was just written
        return state

    def freed(self, worker: type[PeriodicWorker], state: WorkerState) -> WorkerState:
        """Return `state`, or the one after mending its rows and taking back a claim that no instance runs."""
        if state.is_damaged:
            self._mend(worker, state)
            state = self.look(worker)
        return self.look(worker) if state.running and self.recover([state]) else state

    def _mend(self, worker: type[PeriodicWorker], state: WorkerState) -> None:
        if state.is_bare and state.running:
            if state.running.id is not None:
                self._stores.row_repair.restore(state.running)
            elif self._stores.ledger.end(state.running, "lost", _UNKNOWN):
                self._tell_of_loss(state.running, _UNKNOWN, None)
        for claim in self._stores.row_repair.strays(worker.name) if state.has_strays else ():
            ended, again = self._stores.row_repair.end_stray(claim, attempt_after(worker, claim.attempt))
            if ended:
                self._tell_of_loss(claim, GONE, again)

    def _tell_of_loss(self, claim: Claim, reason: str, again: int | None) -> None:
        log.warning("%s: lost the tick %s, %s: %s", claim.worker, claim.tick.isoformat(), reason, follows(again))
        send(self._app, execution_lost, claim=claim, reason=reason)

    def recover(self, states: Collection[WorkerState]) -> bool:
        """End the claims that no instance runs. True if there were any."""
        gone = self.gone(states)
        for state in states:
            if state.name in gone and state.running:
                self._take_back(self._workers[state.name], state.running, state, gone[state.name])
        return bool(gone)

    def gone(self, states: Collection[WorkerState]) -> dict[str, bool]:
        """Return the workers with a claim that no instance runs: True if it was handed back, False if it was lost.

        Only reads. A worker unknown to this release is left alone.
        """
        held = [state for state in states if state.running and state.name in self._workers]
        # After its lease is over, this instance is judged as any other: a heartbeat of its next life may come later.
        own = instance.id if (instance := self._presence.instance) and instance.is_alive else None
        gone = self._stores.leases.gone({str(state.instance) for state in held} - {own}) if held else {}
        return {
            state.name: gone.get(str(state.instance), True)
            for state in held
            if state.instance in gone or (state.instance == own and self._is_stranded(state))
        }

    def _is_stranded(self, state: WorkerState) -> bool:
        """Whether this instance holds a claim that it does not run: the reply to the claim got lost."""
        if state.running is None or state.started_at is None or self._runs.has(state.running):
            return False
        return abs(state.clock - state.started_at) > self._stores.lease  # the clock may have been ahead at the claim

    def _take_back(self, worker: type[PeriodicWorker], claim: Claim, state: WorkerState, signed_off: bool) -> None:
        if signed_off:
            is_own = (
                own := self._presence.instance
            ) is not None and state.instance == own.id  # else it may have run it in part
            reason = f"{state.instance_name} {'did not run it' if is_own else 'signed off before the run ended'}"
            if self._stores.ledger.end(claim, "handed back", reason, claim.attempt):
                send(self._app, execution_handed_back, claim=claim, reason=reason)
            return
        again = attempt_after(worker, claim.attempt)
        reason = f"{state.instance_name} {self._stores.leases.ending(str(state.instance))}"
        if self._stores.ledger.end(claim, "lost", reason, again):
            self._tell_of_loss(claim, reason, again)
