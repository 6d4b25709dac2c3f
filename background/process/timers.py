"""Fires ticks at their time. Every instance fires every tick, and the ledger decides which instance runs it."""

import logging
import random
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta

from ..errors import InvalidSchedule, first_line
from ..host.logs import logger_of, unless_expected
from ..host.scheduler import Scheduler
from ..ledger.claim import WorkerState
from ..registry import schedule_in_force
from ..runs.running import Runs
from ..worker import PeriodicWorker
from .presence import Presence
from .ticks import Ticks

log = logger_of(__name__)

_RETRY_SECONDS = (0.2, 0.5, 1, 2, 5)
_YIELDED_SECONDS = (0.01, 0.02)
_NEVER = datetime.max.replace(tzinfo=UTC)


class Timers:
    """Arms one tick per worker of `workers`: the next tick, or the latest tick if that is due already."""

    def __init__(
        self,
        scheduler: Scheduler,
        ticks: Ticks,
        presence: Presence,
        runs: Runs,
        workers: Mapping[str, type[PeriodicWorker]],
    ) -> None:
        self._scheduler, self._ticks, self._workers = scheduler, ticks, workers
        self._presence, self._runs = presence, runs
        self._states: Mapping[str, WorkerState] = {}
        self.armed: dict[str, datetime] = {}
        self._yielding: set[str] = set()
        # The same for all workers, so that the scheduler calls them together.
        self._yielded_seconds = random.uniform(*_YIELDED_SECONDS)  # noqa: S311

    def follow(self, states: Mapping[str, WorkerState], rearm: bool) -> None:
        """Follow the schedules in force. With `rearm` arm every worker again, as a clock was set."""
        before, self._states = self._states, states
        for name in self.armed.keys() & before.keys() & states.keys():
            if before[name].schedule_text != states[name].schedule_text:
                if self.armed[name] > self._now():  # a tick that is due fires soon, and arms the next tick
                    self._arm(name, after=states[name].scheduled_at)
            elif rearm:
                # While the clock was wrong, a tick may have fired before its time, without a run.
                self._arm(name, after=self._now(), no_later_than=self.armed[name])

    def arm_first(self, name: str) -> None:
        """Begin with the latest tick. If the worker does not catch up, begin with the next tick.

        The latest tick of a worker without a row counts as decided, unless the worker has `run_on_first_start`.
        """
        worker, state = self._workers.get(name), self._states.get(name)
        self._yielding.discard(name)  # a repair may have opened the tick after the read that found it decided
        if worker is not None and worker.enabled:
            is_first = worker.run_on_first_start and (state is None or state.mark is None)
            self._arm(name, after=None if worker.catch_up or is_first else self._now())

    def disarm(self, name: str) -> None:
        """Fire no further tick of the worker."""
        if self.armed.pop(name, None):
            self._scheduler.forget(f"tick:{name}")

    def postpone(self, name: str, tick: datetime, schedule: str) -> None:
        """Fire the tick again after a pause."""
        self.later(f"retry:{name}", 1, self._fire, name, tick, schedule)

    def later(self, key: str, failures: int, function: Callable[..., None], *args: object) -> None:
        """Call `function(*args, failures + 1)` after a pause that grows with the failures.

        Replaces an earlier call with that `key`.
        """
        if not self._runs.stopping.is_set():
            seconds = _RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)]
            self._scheduler.after(seconds, key, function, *args, failures + 1)

    def _arm(self, name: str, after: datetime | None, no_later_than: datetime | None = None) -> None:
        """Arm the first tick after `after`. If a later tick is already due, or without `after`, arm the latest tick."""
        worker, state = self._workers.get(name), self._states.get(name)
        if worker is None:  # the worker was removed meanwhile
            return
        try:
            # The worker's row may be missing: deleted, or not in a restored backup. A look makes it before a claim.
            schedule = schedule_in_force(worker, state)
        except InvalidSchedule as error:  # a newer release's schedule, until `follow` finds another schedule
            log.error("%s: %s", name, error)
            self.disarm(name)
            self.armed[name] = _NEVER
            return
        text = state.schedule_text if state else str(schedule)
        latest = schedule.previous(self._now())
        tick = latest if after is None else max(schedule.next(after), latest)
        self.armed[name] = tick = min(tick, no_later_than or tick)
        offset = instance.clock_offset if (instance := self._presence.instance) else timedelta()
        spread = random.uniform(0, worker.jitter.total_seconds())  # noqa: S311 - no secret
        if name in self._yielding:
            spread += self._yielded_seconds
        self._scheduler.at(tick - offset + timedelta(seconds=spread), f"tick:{name}", self._fire, name, tick, text)

    def _fire(self, name: str, tick: datetime, schedule: str, failures: int = 0) -> None:
        worker = self._workers.get(name)
        if worker is None or self._runs.stopping.is_set():
            return
        if not failures:
            self._arm(name, after=tick)
        try:
            if name in self._yielding and self._scheduler.is_awaited and self._ticks.is_decided(name, tick):
                return  # one read for all ticks that wait for a thread, instead of a claim for each
            is_ours = self._ticks.run(worker, tick, schedule) is not None
            # After losing a tick, start 10 to 20 ms later next time. Otherwise every loser would wait for the winner's
            # row lock only to learn that it lost.
            (self._yielding.discard if is_ours else self._yielding.add)(name)
        except InvalidSchedule as error:  # the next heartbeat logs this error
            log.debug("%s: not running the tick %s: %s", name, tick.isoformat(), error)
        except Exception as error:  # no other thread of this process would try again
            level = logging.DEBUG if failures else logging.WARNING  # once per tick
            values = name, tick.isoformat(), first_line(error)
            log.log(level, "%s: cannot claim the tick %s yet: %s", *values, exc_info=unless_expected(error))
            self.later(f"retry:{name}", failures, self._fire, name, tick, schedule)

    def _now(self) -> datetime:
        return instance.database_time() if (instance := self._presence.instance) else datetime.now(UTC)
