"""Runs one tick: claim it and run it, or wait until it is due, clear its way, and claim it again.

Every caller uses this path: the timers, the commands, the dashboard and the tests.
"""

import threading
from collections.abc import Callable, Set
from datetime import datetime
from functools import partial

from ..database.clock import steady
from ..host.logs import logger_of
from ..ledger.claim import DECIDED, Claim, NotClaimed, WorkerState
from ..runs.execution import Execution
from ..runs.running import Runs
from ..stores import Stores
from ..worker import PeriodicWorker, attempt_after
from .presence import Presence
from .recovery import Recovery

log = logger_of(__name__)

_DECIDED_FOR = 100  # times as long as the read took, so that it uses 1 % of an instance's time


class Ticks:
    """Claims ticks, and runs each tick whose claim this process wins."""

    def __init__(
        self,
        stores: Stores,
        presence: Presence,
        recovery: Recovery,
        runs: Runs,
        postpone: Callable[[str, datetime, str], None],
    ) -> None:
        """Call `postpone` with each tick, and its schedule, that this instance must try again later."""
        self._stores, self._presence, self._recovery, self._runs = stores, presence, recovery, runs
        self._postpone = postpone
        self._decided: tuple[datetime | None, float, Set[str]] = None, 0.0, set()
        self._reading = threading.Lock()

    def is_decided(self, name: str, tick: datetime) -> bool:
        """Return whether an instance decided the worker's tick. One read answers for all workers, for a short while."""
        with self._reading:
            read, until, names = self._decided
            if read != tick or steady() >= until:
                began = steady()
                names = self._stores.ledger.decided(tick)
                ended = steady()
                self._decided = tick, ended + _DECIDED_FOR * (ended - began), names
        return name in names

    def run(
        self, worker: type[PeriodicWorker], tick: datetime, schedule: str, state: WorkerState | None = None
    ) -> Execution | None:
        """Run `tick` of `schedule`, unless an instance has run it or runs it. None if this instance may not run it.

        Losing costs one statement. Pass `state` to have pending work checked first: a tick that was lost or handed back
        is not above the mark, and must not be mistaken for decided.
        """
        answer = self._claim(worker, tick, schedule) if state is None else None
        while answer is None:
            answer = self._clear_and_claim(worker, tick, state or self._recovery.look(worker))
            state = None
        if isinstance(answer, Execution):
            return answer
        log.debug("%s: not running the tick %s: %s", worker.name, tick.isoformat(), answer)
        return None

    def _claim(self, worker: type[PeriodicWorker], tick: datetime, schedule: str) -> Execution | str | None:
        """Claim the tick and run it. Return the reason if it does not run. None if something may block it."""
        if reason := self._reason_to_stop(worker.name, tick, schedule):
            return reason
        claimed = self._claim_and_run(worker, partial(self._stores.ledger.claim, worker.name, tick, schedule))
        return DECIDED.value if claimed is DECIDED else claimed or None

    def _clear_and_claim(
        self, worker: type[PeriodicWorker], tick: datetime, state: WorkerState
    ) -> Execution | str | None:
        """Wait until the tick is due, clear its way, and claim it. Returns as `_claim` does."""
        if reason := self._reason_to_stop(worker.name, tick, state.schedule_text):
            return reason
        state, again = self._cleared(worker, self._when_due(worker, tick, state))
        if again and again.claim.tick == tick:
            return again
        reason = _reason_not_to_claim(tick, state) or self._reason_to_pass_over(worker, tick, state)
        return reason or self._claim(worker, tick, state.schedule_text)

    def _reason_to_stop(self, name: str, tick: datetime, schedule: str) -> str | None:
        """Return why this process may claim nothing now, or None."""
        if self._runs.stopping.is_set():
            return "stopping"
        if (instance := self._presence.instance) is not None and not instance.is_alive:
            self._postpone(name, tick, schedule)
            return "this instance has lost its lease"
        return None

    def _when_due(self, worker: type[PeriodicWorker], tick: datetime, state: WorkerState) -> WorkerState:
        """Wait, at most a lease, until the database's clock reaches `tick`. A rounded wait would end early or late."""
        while state.clock < tick <= state.clock + self._stores.lease and not self._runs.stopping.is_set():
            self._runs.stopping.wait((tick - state.clock).total_seconds())
            state = self._recovery.look(worker)
        return state

    def _cleared(self, worker: type[PeriodicWorker], state: WorkerState) -> tuple[WorkerState, Execution | None]:
        """Clear the way of a new tick: take back a claim that no instance runs, and run the tick that is owed."""
        state, again = self._recovery.freed(worker, state), None
        if state.owed:
            again = self.run_pending(worker, state.owed)
            state = self._recovery.look(worker)
        return state, again

    def _reason_to_pass_over(self, worker: type[PeriodicWorker], tick: datetime, state: WorkerState) -> str | None:
        """Pass over a tick that may not run now. Return the reason, or None if an instance may claim the tick."""
        if self._stores.clock_repair.pass_over(state, tick, partial(attempt_after, worker)):
            return "it ran while the database's clock was ahead"
        return self._skipped_or_postponed(tick, state)

    def _skipped_or_postponed(self, tick: datetime, state: WorkerState) -> str | None:
        """Skip the tick or try it again later if the worker is paused or running. Return the reason, or None."""
        reason = _obstacle(state)
        if reason and _runs_by_hand(state):  # a manual run takes no tick away
            self._postpone(state.name, tick, state.schedule_text)
            return reason
        self._stores.ledger.miss(state, tick)
        return reason if reason and self._stores.ledger.skip(state.name, tick, state.schedule_text, reason) else None

    def run_now(self, worker: type[PeriodicWorker]) -> Execution | None:
        """Run the worker outside its schedule. None if the worker runs already.

        If a failed tick waits for another attempt, run this attempt instead.
        """
        state = self._recovery.look(worker)
        if state.retry_at and state.pending_tick and self._stores.ledger.hasten(worker.name):
            return self.run_pending(worker, state.pending_tick)
        state, _ = self._cleared(worker, state)
        return self._claim_and_run(worker, partial(self._stores.ledger.claim_manual, worker.name, state.clock)) or None

    def run_pending(self, worker: type[PeriodicWorker], tick: datetime) -> Execution | None:
        """Run a tick that was lost or handed back. None if another instance has taken it meanwhile."""
        return self._claim_and_run(worker, partial(self._stores.ledger.claim_pending, worker.name, tick)) or None

    def _claim_and_run(
        self, worker: type[PeriodicWorker], claim_with: Callable[[tuple[str, str]], Claim | NotClaimed | None]
    ) -> Execution | NotClaimed | None:
        with self._presence.present() as instance:
            if self._runs.stopping.is_set() or not instance.is_alive:
                return None
            claim = claim_with((instance.id, instance.name))
            return self._runs.run(worker, claim, self._stores.ledger, instance) if isinstance(claim, Claim) else claim


def _reason_not_to_claim(tick: datetime, state: WorkerState) -> str | None:
    """Return why no instance may claim `tick`, or None."""
    if state.clock < tick:
        return "it is not due yet"
    if state.mark is not None and state.mark >= tick:
        return DECIDED.value
    if state.pending_tick and not (state.owed or state.paused_at):
        return f"the tick {state.pending_tick.isoformat()} comes before it, and is no longer due"
    if state.scheduled_at <= tick != state.schedule.previous(tick):
        return f"it is not a tick of the schedule in force, {state.schedule}"
    return None


def _obstacle(state: WorkerState) -> str | None:
    if state.paused_at:
        return f"paused since {state.paused_at.isoformat(timespec='seconds')}"
    if state.running:
        return f"still running the tick {state.running.tick.isoformat()} on {state.instance_name}"
    return None


def _runs_by_hand(state: WorkerState) -> bool:
    return not state.paused_at and state.running is not None and state.running.trigger == "manual"
