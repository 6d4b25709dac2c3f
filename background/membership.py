"""A started process's part in the fleet, from joining to leaving: its heartbeat, and its wake-ups."""

import logging
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from flask import Flask
from sqlalchemy.exc import SQLAlchemyError

from .errors import BackgroundError, first_line
from .instances import Heartbeat, Instance
from .ledger import WorkerState
from .scheduler import Scheduler
from .ticks import Ticks
from .worker import PeriodicWorker, declared_schedule

log = logging.getLogger(__name__)

_OFFSET_WARNED = timedelta(seconds=1)
_OFFSET_REARMED = timedelta(milliseconds=20)
_RETRY_SECONDS = (1, 2, 5, 10, 30)
_INSTANT = timedelta(microseconds=1)


class Membership:
    """Wakes this process up at the ticks of `workers`, and keeps it alive in the fleet."""

    def __init__(
        self, app: Flask, ticks: Ticks, workers: dict[str, type[PeriodicWorker]], prepare: Callable[[], None]
    ) -> None:
        self._config, self._ticks, self._workers, self._prepare = app.config, ticks, workers, prepare
        self._scheduler = Scheduler(app.config["WORKERS_THREADS"])
        self._heartbeat: Heartbeat | None = None
        self._states: dict[str, WorkerState] = {}
        self._armed: dict[str, datetime] = {}

    def join(self) -> None:
        """Join in the background, as soon as the database lets us."""
        self._scheduler.start()
        self._scheduler.soon(self._join)

    def leave(self, seconds: float) -> None:
        """Tell the runs, wait until `seconds` after that, and sign off; what still runs is handed back by that."""
        runs = self._ticks.runs
        runs.tell()
        self._scheduler.stop()
        try:
            if not runs.wait(seconds):
                log.warning("Not everything ended in time; what still runs is handed back")
        finally:
            runs.lose()
            self._sign_off()

    def admit(self, name: str) -> None:
        """Take up a worker that was added after the start."""
        if self._heartbeat is not None:
            self._scheduler.soon(self._admit, [name])

    def dismiss(self, name: str) -> None:
        """Wake up for a worker no more."""
        if self._armed.pop(name, None):
            self._scheduler.forget(f"tick:{name}")

    # -- joining and leaving -------------------------------------------------------------------

    def _join(self, failures: int = 0) -> None:
        try:
            self._prepare()
            self._ticks.instance = self._ticks.sign_on()
            self._admit(list(self._workers))
        except (BackgroundError, SQLAlchemyError, OSError) as error:
            log.error("The workers cannot start yet: %s", first_line(error))
            self._later("join", failures, self._join)
            return
        self._heartbeat = Heartbeat(self._config["WORKERS_HEARTBEAT_SECONDS"], self._beat, self._beat_failed)
        self._heartbeat.start()
        log.info("Instance %s joined with %d workers", self._ticks.instance.name, len(self._workers))

    def _admit(self, names: list[str]) -> None:
        self._ticks.ledger.register({name: declared_schedule(self._workers[name]) for name in names})
        self.refresh()
        for name in names:
            worker = self._workers[name]
            if worker.enabled:
                now = self._now()
                self._arm(name, self._states[name].schedule.previous(now) - _INSTANT if worker.catch_up else now)

    def _sign_off(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.stop()
        instance, self._ticks.instance = self._ticks.instance, None
        if instance is not None:
            try:
                self._ticks.instances.sign_off(instance)
                log.info("Instance %s left", instance.name)
            except SQLAlchemyError as error:
                log.warning("Could not sign off, so the lease must run out first: %s", first_line(error))

    # -- the heartbeat -------------------------------------------------------------------------

    def refresh(self, rearm: bool = False) -> None:
        """Take in what the fleet decided: schedules, claims whose instance is gone, ticks to be claimed again."""
        before, states = self._states, self._ticks.ledger.states()
        if self._ticks.recover(states.values()):
            states = self._ticks.ledger.states()
        self._states = states
        for name in self._armed.keys() & states.keys():
            if before[name].schedule != states[name].schedule:
                self._arm(name, after=states[name].scheduled_at)
            elif rearm:
                self._wake(name, self._armed[name])
        for name in self._workers.keys() & states.keys():
            pending = states[name].pending_tick
            if pending and not states[name].paused_at:
                self._scheduler.soon(self._fire_pending, name, pending)

    def _beat(self) -> None:
        instance = self._ticks.instance
        if instance is None:
            return
        if not instance.is_alive:
            log.warning("Instance %s could not renew its lease in time; it begins anew", instance.name)
            self._ticks.runs.lose(instance)
            self._ticks.instance = instance = Instance(instance.lease, clock_offset=instance.clock_offset)
        offset = instance.clock_offset
        self._ticks.instances.beat(instance)
        if abs(instance.clock_offset) > _OFFSET_WARNED >= abs(offset):
            log.warning("This host's clock is %+.1f s off the database's", -instance.clock_offset.total_seconds())
        self.refresh(rearm=abs(instance.clock_offset - offset) > _OFFSET_REARMED)

    def _beat_failed(self, error: SQLAlchemyError) -> None:
        log.warning("No heartbeat: %s", first_line(error))
        if self._ticks.instance is not None and not self._ticks.instance.is_alive:
            self._ticks.runs.lose(self._ticks.instance)

    # -- waking up -----------------------------------------------------------------------------

    def _arm(self, name: str, after: datetime) -> None:
        """Wake up at the first tick after `after`; of several that are due already, only at the latest."""
        schedule = self._states[name].schedule
        self._wake(name, max(schedule.next(after), schedule.previous(self._now())))

    def _wake(self, name: str, tick: datetime) -> None:
        self._armed[name] = tick
        offset = self._ticks.instance.clock_offset if self._ticks.instance else timedelta()
        spread = random.uniform(0, self._workers[name].jitter.total_seconds())  # noqa: S311 - no secret
        self._scheduler.at(tick - offset + timedelta(seconds=spread), f"tick:{name}", self._fire, name, tick)

    def _fire(self, name: str, tick: datetime, failures: int = 0) -> None:
        worker = self._workers.get(name)
        if worker is None or self._ticks.runs.stopping.is_set():
            return
        if not failures:
            self._arm(name, after=tick)
        try:
            self._ticks.run(worker, tick, self._ticks.look(worker))
        except SQLAlchemyError as error:
            log.warning("%s: cannot claim the tick %s: %s", name, tick.isoformat(), first_line(error))
            self._later(f"retry:{name}", failures, self._fire, name, tick)

    def _fire_pending(self, name: str, tick: datetime) -> None:
        try:
            self._ticks.run_pending(self._workers[name], tick)
        except SQLAlchemyError as error:  # the next heartbeat tries again
            log.warning("%s: cannot claim the tick %s again: %s", name, tick.isoformat(), first_line(error))

    def _later(self, key: str, failures: int, function: Callable[..., None], *args: object) -> None:
        delay = timedelta(seconds=_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)])
        if not self._ticks.runs.stopping.is_set():
            self._scheduler.at(datetime.now(UTC) + delay, key, function, *args, failures + 1)

    def _now(self) -> datetime:
        return self._ticks.instance.database_time() if self._ticks.instance else datetime.now(UTC)
