"""Keeps a started process in the fleet: joins, sends heartbeats, follows schedules, recovers lost work, leaves."""

import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import partial

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from ..database.connections import again_if_stale
from ..database.dialects.error_codes import is_undefined
from ..database.notifications import Listener
from ..errors import DatabaseNotReady, first_line
from ..host.logs import Outage, logger_of, unless_expected
from ..host.scheduler import Scheduler
from ..ledger.claim import WorkerState
from ..ledger.leases import LEASE_IS_OVER, OFFSET_WARNED, Instance, Pulse
from ..runs.running import Runs
from ..stores import Stores
from ..worker import AnyWorker, MessageWorker, PeriodicWorker
from .consumers import Consumers
from .heartbeat import Heartbeat, Look, Looking, Watch, Watching
from .presence import Presence
from .recovery import ClockRecovery, MessageRecovery, Recovery
from .schedules import DeclaredSchedules
from .ticks import Ticks
from .timers import Timers

log = logger_of(__name__)

_OFFSET_REARMED = timedelta(milliseconds=20)
_LAST_CALLS_SECONDS = 1.0
_CUT = "no answer came before the lease ended, so this instance cut its connections"
_SPREAD_SECONDS = (0.005, 0.05)  # otherwise all instances would react at the same time


class Supervisor:
    """Keeps this process alive in the fleet, and its timers in line with the fleet's decisions."""

    def __init__(
        self,
        stores: Stores,
        runs: Runs,
        presence: Presence,
        recovery: Recovery,
        ticks: Ticks,
        workers: dict[str, type[PeriodicWorker]],
        topics: dict[str, type[MessageWorker]],
        prepare: Callable[[], None],
        watch: Watch | None = None,
    ) -> None:
        self._config, self._workers, self._prepare = stores.app.config, workers, prepare
        self._stores, self._runs, self._presence, self._recovery, self._ticks = stores, runs, presence, recovery, ticks
        self.scheduler = Scheduler(self._config["WORKERS_THREADS"])
        self.timers = Timers(self.scheduler, ticks, presence, runs, workers)
        self._looking = Looking(self._looked, self._look_failed)
        self._watching = Watching(watch, is_away=lambda: self._outage.is_on)
        apart = self._watching.topics
        self._topics, self.consumers = topics, Consumers(stores, presence, runs, self.scheduler, topics, apart)
        threads = self.consumers.batches, self.scheduler.soon, self.consumers.wake_all
        self.message_recovery = MessageRecovery(stores, presence, topics, *threads)
        self._clock_recovery = ClockRecovery(stores, workers)
        self.schedules = DeclaredSchedules(stores, presence, workers)
        self.listener: Listener | None = None
        self.heartbeat: Heartbeat | None = None
        self._under_way: set[str] = set()
        self._pulse: Pulse | None = None
        self._outage, self._blindness, self._cuts = Outage(), Outage(), 0
        self._beat_at: datetime | None = None
        self._logged_error = ""
        self._is_look_planned = self._is_off = self._left = False
        self._refreshing, self._entering = threading.Lock(), threading.Lock()

    def join(self) -> None:
        """Join in the background, as soon as the database is ready."""
        self.scheduler.start()
        self.scheduler.soon(self._join)

    def leave(self, seconds: float) -> None:
        """Ask the runs to stop, wait at most `seconds`, and sign off. This hands back the remaining runs."""
        runs = self._runs
        runs.tell()
        self.scheduler.stop()
        try:
            if not runs.wait(seconds):
                log.warning("Not every run ended in time: the remaining runs are handed back")
            elif self.heartbeat is not None:  # a join in progress notices the stop by itself
                self.scheduler.wait(_LAST_CALLS_SECONDS)
        finally:
            runs.lose("its instance stopped")
            self._leave()

    def threads_alive(self) -> dict[str, bool]:
        """Return whether the threads that every run needs are alive. True while this process joins or leaves."""
        if self._runs.stopping.is_set():
            return {"scheduler": True, "heartbeat": True}
        heartbeat = self.heartbeat
        is_beating = heartbeat is None or (heartbeat.is_alive and self._looking.is_alive)
        return {"scheduler": self.scheduler.is_alive, "heartbeat": is_beating}

    def admit(self, worker: AnyWorker) -> None:
        """Start a worker that was added after the start of the process."""
        if self.heartbeat is None:
            return
        if issubclass(worker, MessageWorker):
            self.scheduler.soon(self._listen)
        else:
            self.scheduler.soon(self._take_up, worker.name)

    # -- joining and leaving -------------------------------------------------------------------

    def _join(self, failures: int = 0) -> None:
        try:
            self._prepare()
            if self.heartbeat is None and not self._enter():
                return
            self._admit(list(self._workers))
        except Exception as failed:  # no other thread would try again
            error = self._cause(failed)
            level = logging.ERROR if first_line(error) != self._logged_error else logging.DEBUG
            log.log(level, "The workers cannot start yet: %s", first_line(error), exc_info=unless_expected(error))
            self._logged_error = first_line(error)
            self.timers.later("join", failures, self._join)
            return
        if (instance := self._presence.instance) is not None:
            self._listen()
            count = len(self._workers) + len(self._topics)
            log.info("Instance %s joined with %d worker%s", instance.name, count, "" if count == 1 else "s")

    def _cause(self, error: Exception) -> Exception:
        """Return DatabaseNotReady instead of `error` if tables of an older version explain it."""
        if is_undefined(error):
            try:
                with self._runs.app.app_context():
                    self._stores.refuse_old_tables()
            except (DatabaseNotReady, DBAPIError) as cause:
                return cause
        return error

    def _enter(self) -> bool:
        """Sign on, and start the heartbeat. False if `leave` came first."""
        self._watching.before_joining()
        instance = self._presence.sign_on()
        self._warn_of_offset(instance)
        with self._entering:
            if self._left:
                self._presence.sign_off(instance)
                self._stores.close()
                return False
            self._presence.instance = instance
            self._beat_at = instance.database_time()  # an outage may begin before the first heartbeat
            presence = self._presence
            heartbeat = Heartbeat(
                self._config["WORKERS_HEARTBEAT_SECONDS"],
                self._beat,
                self._beat_failed,
                presence.deadline,
                presence.lose_lease,
                lambda: presence.until_expiry() + _spread(),
            )
            self._looking.start()
            self._watching.start()
            heartbeat.start()
            self.heartbeat = heartbeat
        return True

    def _admit(self, names: list[str]) -> None:
        self.schedules.declare(names)
        self.refresh()
        for name in names:
            self.timers.arm_first(name)

    def _take_up(self, name: str, failures: int = 0) -> None:
        try:
            self._admit([name])
        except SQLAlchemyError as error:
            log.warning("%s: cannot start the worker yet: %s", name, first_line(error))
            self.timers.later(f"admit:{name}", failures, self._take_up, name)

    def _listen(self) -> None:
        self.consumers.wake_all()
        with self._entering:
            if not (self._left or self.listener):
                self.listener = Listener(
                    self._stores.connections, self._heard, self.consumers.idle, self._stores.queue.due
                )
                self.listener.start()

    def _leave(self) -> None:
        with self._entering:
            self._left = True
        if self.listener is not None:
            self.listener.stop()
        if self.heartbeat is not None:
            self.heartbeat.stop()
            self._looking.stop()
            self._watching.stop()
        instance, self._presence.instance = self._presence.instance, None
        if instance is not None:
            self._presence.sign_off(instance)
            log.info("Instance %s left", instance.name)

    # -- the heartbeat -------------------------------------------------------------------------

    def _beat(self) -> None:
        """Renew the lease, then follow the pulse, which the heartbeat returns."""
        if (instance := self._life()) is None:
            return
        self._cuts = self._stores.connections.cuts
        offset, before = instance.clock_offset, self._pulse
        topics = sorted(self._topics)
        beat = self.consumers.floors.at_heartbeat(topics)
        self._pulse = pulse = self._stores.leases.beat(instance, topics, beat.moments)
        self._runs.cancel(pulse.cancels)
        self._end_outage(pulse)  # first, as a new instance looks now, and must know the leases that ended
        if instance is not self._presence.instance and not self._begin_anew(instance):
            return
        self._warn_of_offset(instance)
        is_moved = pulse.was_set or abs(instance.clock_offset - offset) > _OFFSET_REARMED
        if is_moved:
            self._is_look_planned = False  # by the clock that was set, the next look may be hours away
        if pulse.is_blind:
            self._warn_of_lock()
        else:
            if is_moved or pulse.has_news(before) or not self.schedules.are_settled:
                self._looking.want(Look.REARM if is_moved else Look.ALL)
            elif pulse.is_busy:
                self._looking.want(Look.BUSY)
            if self._clock_recovery.is_due(pulse):
                self._soon_once("clock", self._recover_clock)
            if self._stores.roll_up.is_due(pulse.clock):
                self._soon_once("tallies", self._roll_up)
        self.consumers.follow(pulse, self._config["WORKERS_HEARTBEAT_SECONDS"], beat)
        self.scheduler.look_again()
        if not self._runs.stopping.is_set():
            self._watching.want()

    def _life(self) -> Instance | None:
        """Return the instance to renew. After its lease is over, return a new instance of this process, or None."""
        instance = self._presence.instance
        if instance is None or instance.is_alive:
            return instance
        self._runs.lose(LEASE_IS_OVER, instance)
        if self._runs.stopping.is_set():
            return None
        self._watching.before_joining()
        return Instance(instance.lease, clock_offset=instance.clock_offset, release=instance.release)

    def _begin_anew(self, instance: Instance) -> bool:
        """Begin another instance, which has signed on. False if `leave` came first."""
        with self._entering:
            if self._left:
                self._presence.sign_off(instance)
                return False
            self._presence.instance = instance
        log.warning("Instance %s could not renew its lease in time, so it begins as a new instance", instance.name)
        return True

    def _end_outage(self, pulse: Pulse) -> None:
        if (lasted := self._outage.ended()) is not None:
            log.warning("Heartbeats continue after %.1f s", lasted)
            # Another instance sends its next heartbeat up to one interval later. Its lease may end before.
            until = pulse.clock + timedelta(seconds=self._config["WORKERS_HEARTBEAT_SECONDS"])
            self.message_recovery.outage = (self._beat_at or pulse.clock, until)
        self._beat_at = pulse.clock

    def _warn_of_offset(self, instance: Instance) -> None:
        """Warn once, until the offset has fallen to half the limit. An offset near the limit would warn again."""
        was_off, least = self._is_off, OFFSET_WARNED / (2 if self._is_off else 1)
        self._is_off = abs(instance.clock_offset) > least
        if self._is_off and not was_off:
            log.warning("This host's clock is %+.1f s off the database's", -instance.clock_offset.total_seconds())

    def _warn_of_lock(self) -> None:
        level = self._blindness.level()
        log.log(level, "The lease is renewed, but no work is found: another client keeps a table of the engine locked")

    def _beat_failed(self, error: Exception) -> None:
        self._pulse = None  # this process may not have followed the last pulse
        self.consumers.floors.forget()
        was_cut, level = self._cuts != self._stores.connections.cuts, self._outage.level()
        log.log(level, "No heartbeat: %s", _CUT if was_cut else first_line(error), exc_info=unless_expected(error))

    # -- looking at the fleet ------------------------------------------------------------------

    def _heard(self, topic: str) -> None:
        if topic:
            self.consumers.hear(topic)
        elif not self._is_look_planned:
            self._is_look_planned = True
            self.scheduler.after(_spread(), "look", self._look)

    def _look(self) -> None:
        """Look at the fleet without waiting for a heartbeat."""
        self._is_look_planned = False
        self._looking.want()
        self.consumers.wake_all()

    def _looked(self, look: Look) -> None:
        self.refresh(look)
        self._blindness.ended()

    def _look_failed(self, error: Exception) -> None:
        """Have the next heartbeat look again. The first heartbeat that fails reports a database that is away."""
        self._pulse = None
        level = logging.DEBUG if self._outage.is_on else self._blindness.level()
        log.log(level, "Cannot look at the fleet: %s", first_line(error), exc_info=unless_expected(error))

    def refresh(self, look: Look = Look.ALL) -> None:
        """Follow the fleet's decisions: schedules, claims whose instance is gone, ticks to claim again.

        Only reads. The heartbeat calls this in another thread, as this may wait for a lock.
        """
        with self._refreshing:
            again_if_stale(partial(self._refresh, look))

    def _refresh(self, look: Look) -> None:
        ledger = self._stores.ledger
        states = ledger.busy_states() if look is Look.BUSY else ledger.states()
        self._runs.cancel({claim: by for state in states.values() for claim, by in state.cancels.items()})
        if look is not Look.BUSY:
            self._follow(states, look is Look.REARM)
        ours = [state for state in states.values() if state.name in self._workers]
        gone = self._recovery.gone(ours)
        if not self._outage.is_on:  # the end of the outage shows which leases it ended
            self.message_recovery.look()
        for state in ours:
            if state.name in gone or state.is_damaged or self._owed(state):
                self._soon_once(f"settle:{state.name}", self._settle, state.name)

    def _follow(self, states: Mapping[str, WorkerState], rearm: bool) -> None:
        """Follow the schedules of all workers."""
        self.timers.follow(states, rearm)
        for name in self._clock_recovery.warn(states):  # the worker's ticks go on, perhaps by a command
            self.timers.arm_first(name)
        if stale := self.schedules.stale(states):
            self._soon_once("declare", self._declare_again, stale)

    def _soon_once(self, key: str, call: Callable[..., object], *args: object) -> None:
        """Make the call in another thread, unless an earlier call still waits for a thread or for a row."""
        if key not in self._under_way:
            self._under_way.add(key)
            self.scheduler.soon(call, *args)

    @contextmanager
    def _ending(self, key: str, failed: str) -> Iterator[None]:
        """End the call `key` of `_soon_once` with the block. If the database fails, a later heartbeat tries again."""
        try:
            yield
        except SQLAlchemyError as error:
            log.warning("%s yet: %s", failed, first_line(error))
        finally:
            self._under_way.discard(key)

    def _settle(self, name: str, failures: int = 0) -> None:
        """Take back the claim of a gone instance, and run the tick that must run again."""
        worker = self._workers.get(name)
        if worker is None or self._runs.stopping.is_set():
            self._under_way.discard(f"settle:{name}")
            return
        try:
            if pending := self._freed(worker):
                self._ticks.run_pending(worker, pending)
        except SQLAlchemyError as error:
            level = logging.DEBUG if failures else logging.WARNING
            log.log(level, "%s: cannot take over its tick yet: %s", name, first_line(error))
            self.timers.later(f"settle:{name}", failures, self._settle, name)

    def _freed(self, worker: type[PeriodicWorker]) -> datetime | None:
        """Return the tick of the worker that must run again, once no gone instance holds it."""
        try:
            state = self._recovery.freed(worker, self._recovery.look(worker))
            return self._owed(state)
        finally:
            self._under_way.discard(f"settle:{worker.name}")

    def _owed(self, state: WorkerState) -> datetime | None:
        """Return the tick to run before any other. For a disabled worker, only a run that a user requested."""
        worker = self._workers.get(state.name)
        return state.owed if worker and (worker.enabled or state.pending_trigger == "manual") else None

    def _declare_again(self, names: list[str]) -> None:
        with self._ending("declare", f"Cannot declare the schedules of {len(names)} workers"):
            self.schedules.declare(names, again=True)

    def _recover_clock(self) -> None:
        with self._ending("clock", "Cannot resume the ticks and messages that a clock ahead delayed"):
            has_messages = self._clock_recovery.recover()
            self._looking.want()
            if has_messages:
                self.consumers.wake_all()

    def _roll_up(self) -> None:
        with self._ending("tallies", "Cannot count the runs and messages for the charts"):
            while self._stores.roll_up.step() and not self._runs.stopping.is_set():
                pass


def _spread() -> float:
    return random.uniform(*_SPREAD_SECONDS)  # noqa: S311 - no secret
