"""Recovers work: ticks and messages of gone instances, edited rows, and rows from a clock that was ahead."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from datetime import datetime

from sqlalchemy.exc import SQLAlchemyError

from ..errors import first_line
from ..host.logs import logger_of
from ..ledger.claim import Claim, WorkerState
from ..ledger.leases import Instance, Pulse
from ..messages.message import Freed
from ..registry import begins, declared_schedule
from ..repair.clock_ahead import is_ahead, repaired_text
from ..repair.edited_rows import GONE
from ..runs.batch import signal_buried
from ..runs.execution import follows
from ..runs.running import Runs
from ..schedule.periods import MICROSECOND
from ..signals import of_state, send
from ..stores import Stores
from ..worker import MessageWorker, PeriodicWorker, attempt_after
from .presence import Presence

log = logger_of(__name__)

_UNKNOWN = "its claim has neither an id nor an execution, so the instance that runs it is unknown"
_STRANDED = "the reply to its claim was lost"


class Recovery:
    """Recovers the ticks of `workers` (by name)."""

    def __init__(
        self, stores: Stores, presence: Presence, runs: Runs, workers: Mapping[str, type[PeriodicWorker]]
    ) -> None:
        self._stores, self._presence, self._runs, self._workers = stores, presence, runs, workers

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
        """Repair the worker's rows, and take back a claim that no instance runs. Return the state after that."""
        if state.is_damaged:
            self._mend(worker, state)
            state = self.look(worker)
        return self.look(worker) if state.running and self.recover([state]) else state

    def _mend(self, worker: type[PeriodicWorker], state: WorkerState) -> None:
        if state.is_bare and state.running:
            if state.running.id is not None:
                self._stores.row_repair.restore(state.running)
            elif ended := self._stores.ledger.end(state.running, "lost", _UNKNOWN):
                self._tell(state.running, ended, _UNKNOWN)
        for claim in self._stores.row_repair.strays(worker.name) if state.has_strays else ():
            stray, again = self._stores.row_repair.end_stray(claim, attempt_after(worker, claim.attempt))
            if stray:
                self._tell(claim, stray, GONE, again)

    def _tell(self, claim: Claim, state: str, reason: str, again: int | None = None) -> None:
        """Log that a run ended in `state`, and send its signal. `again` is the attempt that follows."""
        tick = claim.tick.isoformat()
        if state == "lost":
            log.warning("%s: lost the tick %s, %s: %s", claim.worker, tick, reason, follows(again))
        elif state == "cancelled":
            log.info("%s: the cancelled run of the tick %s is over: %s", claim.worker, tick, reason)
        send(self._stores.app, of_state[state], claim=claim, reason=reason)

    def recover(self, states: Collection[WorkerState]) -> bool:
        """End the claims that no instance runs. False if every claim runs."""
        gone = self.gone(states)
        for state in states:
            if state.name in gone and state.running:
                self._take_back(self._workers[state.name], state.running, state, gone[state.name])
        return bool(gone)

    def gone(self, states: Collection[WorkerState]) -> dict[str, bool]:
        """Return the workers with a claim that no instance runs: True if the claim was handed back, False if lost.

        Only reads. Leaves out workers that this release does not have.
        """
        held = [state for state in states if state.running and state.name in self._workers]
        # After its lease is over, treat this instance like any other: its successor may not have signed on yet.
        own = instance.id if (instance := self._presence.instance) and instance.is_alive else None
        gone = self._stores.leases.gone({str(state.instance) for state in held} - {own}) if held else {}
        return {
            state.name: gone.get(str(state.instance), True)
            for state in held
            if state.instance in gone or (state.instance == own and self._is_stranded(state))
        }

    def _is_stranded(self, state: WorkerState) -> bool:
        """Return whether this instance holds the claim but does not run it: the reply to the claim was lost."""
        if state.running is None or state.started_at is None or self._runs.has(state.running):
            return False
        return abs(state.clock - state.started_at) > self._stores.lease  # the clock may have been ahead at the claim

    def _take_back(self, worker: type[PeriodicWorker], claim: Claim, state: WorkerState, signed_off: bool) -> None:
        if signed_off:
            own = self._presence.instance
            is_own = own is not None and state.instance == own.id  # another instance may have run the tick in part
            reason = f"{state.instance_name} {'did not run it' if is_own else 'signed off before the run ended'}"
            if ended := self._stores.ledger.end(claim, "handed back", reason, claim.attempt):
                self._tell(claim, ended, reason)
            return
        again = attempt_after(worker, claim.attempt)
        reason = f"{state.instance_name} {self._stores.leases.ending(str(state.instance))}"
        if ended := self._stores.ledger.end(claim, "lost", reason, again):
            self._tell(claim, ended, reason, again)


class MessageRecovery:
    """Recovers the messages of `workers` (by topic)."""

    def __init__(
        self,
        stores: Stores,
        presence: Presence,
        workers: Mapping[str, type[MessageWorker]],
        batches: Set[str],
        soon: Callable[..., None],
        wake: Callable[[], None],
    ) -> None:
        """Take the batches that this process handles, and calls that use another thread and wake the consumers."""
        self._stores, self._presence, self._workers = stores, presence, workers
        self._batches, self._soon, self._wake = batches, soon, wake
        self._freeing: set[str] = set()
        self.outage: tuple[datetime, datetime] | None = None
        """The last outage of the database: from the last heartbeat before it until every instance had time for one."""

    def look(self) -> None:
        """Free the messages that no instance handles, in another thread. Only reads in this thread."""
        instance = self._presence.instance
        if instance is None or not instance.is_alive or not self._workers:
            return
        holders = self._stores.queue.holders(list(self._workers))
        others = holders - {instance.id}
        gone = self._stores.leases.gone(others) if others else {}
        if news := (gone.keys() | {instance.id} & holders) - self._freeing:
            self._freeing |= news
            self._soon(self._free, instance, {each: gone[each] for each in gone.keys() & news})

    def _free(self, instance: Instance, gone: Mapping[str, bool]) -> None:
        most = {topic: worker.max_attempts for topic, worker in self._workers.items()}
        try:
            excused = self._excused_holders(gone)
            for holder, signed_off in gone.items():
                is_excused = signed_off or holder in excused
                self._take_back(holder, most, signed_off, is_excused)
            # Read the batches first, and name them: the write may wait for its lock while this process claims another.
            if stranded := self._stores.queue.batches(instance.id, instance.lease) - self._batches:
                self._bury(self._stores.queue.take_back_stranded(stranded, most, _STRANDED), _STRANDED)
        except SQLAlchemyError as error:  # the next heartbeat tries again
            log.warning("Cannot take messages back: %s", first_line(error))
        finally:
            self._freeing.difference_update(gone, [instance.id])
        self._wake()

    def _excused_holders(self, gone: Collection[str]) -> Collection[str]:
        """Return the holders whose leases ended during an outage, when no instance could renew its lease."""
        return self._stores.leases.expired(gone, *self.outage) if gone and self.outage else ()

    def _take_back(self, holder: str, most: dict[str, int], signed_off: bool, is_excused: bool) -> None:
        error = None if is_excused else f"its instance {self._stores.leases.ending(holder)}"
        if freed := self._stores.queue.take_back(holder, most, error):
            level = logging.INFO if signed_off else logging.WARNING
            log.log(level, "Took %d messages of a gone instance back", len(freed))
        if error is not None:
            self._bury(freed, error)

    def _bury(self, freed: Sequence[Freed], error: str) -> None:
        if dead := [each for each in freed if each.state == "dead"]:
            log.error("Buried %d of these messages after their last attempt", len(dead))
            signal_buried(self._stores.app, dead, error)


class ClockRecovery:
    """Recovers the ticks of `workers` (by name) and the messages that a clock ahead delayed."""

    def __init__(self, stores: Stores, workers: Mapping[str, type[PeriodicWorker]]) -> None:
        self._stores, self._workers = stores, workers
        self._ahead: set[str] = set()
        self._is_done = False

    def warn(self, states: Mapping[str, WorkerState]) -> Collection[str]:
        """Warn once of each worker whose ticks are decided past now. Return the workers whose ticks go on again."""
        ahead = {name: state for name, state in states.items() if name in self._workers and is_ahead(state)}
        is_proven = self._stores.clock_repair.is_proven(states.values())
        for name in ahead.keys() - self._ahead:
            until = max(filter(None, (ahead[name].mark, ahead[name].scheduled_at, ahead[name].pending_tick)))
            log.warning(
                "%s: the database's clock was ahead: the ticks are decided up to %s, and the clock says %s now. %s",
                name,
                until.isoformat(),
                ahead[name].clock.isoformat(),
                "Ticks and messages up to then go on once the clock has been right for the length of a lease"
                if is_proven
                else "The history is shorter than this lead. If the clock is right now, run `flask workers repair`",
            )
        go_on, self._ahead = self._ahead - ahead.keys(), set(ahead)
        return go_on

    def is_due(self, pulse: Pulse) -> bool:
        """Return whether `recover` should run: once after each change of the clock, and while rows are delayed."""
        self._is_done = self._is_done and not (pulse.was_set or pulse.is_ahead)
        return self._stores.leases.is_steady and not self._is_done

    def recover(self) -> bool:
        """Make the delayed ticks and messages due again. Return whether messages are among them."""
        self._is_done = True  # first, as a later heartbeat may see another change
        try:
            return self._recover()
        except SQLAlchemyError:
            self._is_done = False
            raise

    def _recover(self) -> bool:
        states = self._stores.ledger.states()
        ours = [state for state in states.values() if state.name in self._workers]
        if not self._stores.clock_repair.is_proven(states.values()):  # only `flask workers repair` may do this
            ours = []
        repaired, number = self._stores.clock_repair.all(ours)
        if repaired or number:
            log.warning("The database's clock is right again. Due again: %s", repaired_text(repaired, number))
        return number > 0
