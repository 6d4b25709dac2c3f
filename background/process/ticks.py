"""One tick's way: claim and run it; else wait for the database's clock, clear what is in the way, and claim again.

There is no other way.
"""

from collections.abc import Callable
from datetime import datetime
from functools import partial

from ..host.logs import logger_of
from ..ledger.claim import DECIDED, Claim, NotClaimed, WorkerState
from ..runs.execution import Execution
from ..runs.running import Runs
from ..stores import Stores
from ..worker import PeriodicWorker, attempt_after
from .presence import Presence
from .recovery import Recovery

log = logger_of(__name__)


class Ticks:
    """Claims ticks, and runs those that this process gets."""

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

    def run(
        self, worker: type[PeriodicWorker], tick: datetime, schedule: str, state: WorkerState | None = None
    ) -> Execution | None:
        """Run `tick` of `schedule`, unless an instance has or does. None if it is not this instance's to run.

        Losing costs one statement. Pass `state` to have pending work checked first: a tick that was lost or handed back
        is not above the mark, and must not be mistaken for decided.
        """
        name, why = worker.name, "stopping"
        while not self._runs.stopping.is_set():
            if (instance := self._presence.instance) is not None and not instance.is_alive:
                why = "this instance has lost its lease"
                self._postpone(name, tick, schedule)
                break
            if state is not None:
                state, again = self._cleared(worker, self._when_due(worker, tick, state))
                if again and again.claim.tick == tick:
                    return again
                if answer := _why_not(tick, state) or self._passed_over(worker, tick, state):
                    why = answer
                    break
                schedule = state.schedule_text
            claimed = self._claim_and_run(worker, partial(self._stores.ledger.claim, name, tick, schedule))
            if claimed:
                return claimed
            if claimed is DECIDED:
                why = DECIDED.value
                break
            state = self._recovery.look(worker)
        log.debug("%s: not running the tick %s: %s", name, tick.isoformat(), why)
        return None

    def _passed_over(self, worker: type[PeriodicWorker], tick: datetime, state: WorkerState) -> str | None:
        """Return why `tick` does not run now. None if it may be claimed."""
        if self._stores.clock_repair.pass_over(state, tick, partial(attempt_after, worker)):
            return "it ran while the database's clock was ahead"
        return self._skipped_or_postponed(tick, state)

    def _skipped_or_postponed(self, tick: datetime, state: WorkerState) -> str | None:
        """Why `tick` is skipped now, or tried again later; None where it may be claimed."""
        why = _obstacle(state)
        if why and self._is_postponed(tick, state):
            return why
        self._stores.ledger.miss(state, tick)
        return why if why and self._stores.ledger.skip(state.name, tick, state.schedule_text, why) else None

    def _is_postponed(self, tick: datetime, state: WorkerState) -> bool:
        """A manual run takes no tick away: one that is due meanwhile is tried again until that has ended."""
        if state.paused_at or state.running is None or state.running.trigger != "manual":
            return False
        self._postpone(state.name, tick, state.schedule_text)
        return True

    def run_now(self, worker: type[PeriodicWorker]) -> Execution | None:
        """A run that no schedule asked for; None where the worker is running already."""
        state, _ = self._cleared(worker, self._recovery.look(worker))
        return self._claim_and_run(worker, partial(self._stores.ledger.claim_manual, worker.name, state.clock)) or None

    def run_pending(self, worker: type[PeriodicWorker], tick: datetime) -> Execution | None:
        """Run a tick that was lost or handed back, unless another instance has taken it meanwhile."""
        return self._claim_and_run(worker, partial(self._stores.ledger.claim_pending, worker.name, tick)) or None

    def _when_due(self, worker: type[PeriodicWorker], tick: datetime, state: WorkerState) -> WorkerState:
        """Wait, at most a lease, until the database's clock reaches `tick`; rounding it would be early or late."""
        while state.clock < tick <= state.clock + self._stores.lease and not self._runs.stopping.is_set():
            self._runs.stopping.wait((tick - state.clock).total_seconds())
            state = self._recovery.look(worker)
        return state

    def _cleared(self, worker: type[PeriodicWorker], state: WorkerState) -> tuple[WorkerState, Execution | None]:
        """Clear the way of a new tick: a claim whose instance is gone, and a tick that must run again."""
        state, again = self._recovery.freed(worker, state), None
        if state.owed:
            again = self.run_pending(worker, state.owed)
            state = self._recovery.look(worker)
        return state, again

    def _claim_and_run(
        self, worker: type[PeriodicWorker], claim_with: Callable[[tuple[str, str]], Claim | NotClaimed | None]
    ) -> Execution | NotClaimed | None:
        with self._presence.present() as instance:
            if self._runs.stopping.is_set() or not instance.is_alive:
                return None
            claim = claim_with((instance.id, instance.name))
            return self._runs.run(worker, claim, self._stores.ledger, instance) if isinstance(claim, Claim) else claim


def _why_not(tick: datetime, state: WorkerState) -> str | None:
    """Return why no instance may claim `tick`, or None."""
    if state.clock < tick:
        return "it is not due yet"
    if state.mark is not None and state.mark >= tick:
        return DECIDED.value
    if state.pending_tick and not (state.owed or state.paused_at):
        return f"the tick {state.pending_tick.isoformat()} comes before it, and is not due any more"
    if state.scheduled_at <= tick != state.schedule.previous(tick):
        return f"it is not a tick of the schedule in force, {state.schedule}"
    return None


def _obstacle(state: WorkerState) -> str | None:
    if state.paused_at:
        return f"paused since {state.paused_at.isoformat(timespec='seconds')}"
    if state.running:
        return f"still running the tick {state.running.tick.isoformat()} on {state.instance_name}"
    return None
