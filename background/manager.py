"""The manager: the engine's public face."""

import logging
import os
import threading
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

import svcs.flask
from click import Command
from flask import Flask, current_app
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from werkzeug.local import LocalProxy

from . import settings
from .database import opening
from .database import tables as models
from .database.connections import made_once
from .database.dialects import postgresql, sqlite
from .database.dialects.open_transactions import OpenTransactions
from .database.outages import Outages, place
from .database.sessions import refuse_autocommit_options
from .errors import (
    BackgroundError,
    DuplicateWorker,
    InvalidConfig,
    InvalidMessage,
    InvalidSchedule,
    UnknownTopic,
    UnknownWorker,
    first_line,
)
from .history.executions import History
from .history.instances import InstanceHistory
from .history.messages import MessageHistory
from .history.why import Answer, why
from .host import forks
from .host import stop_signals as hearing
from .host.dependencies import refuse_driver
from .host.logs import logger_of
from .ledger.locks import Lock, Locks
from .messages.payloads import as_delay, draft, listed
from .process import serving
from .process.presence import Presence
from .process.recovery import Recovery
from .process.ticks import Ticks
from .registry import declared_schedule, declared_topic
from .repair.clock_ahead import is_ahead
from .runs.execution import Execution
from .runs.fence import current_run, fence, is_stopping_within, when_committed
from .runs.running import Runs
from .schedule.parsing import make_schedule
from .stores import Stores
from .worker import AnyWorker, MessageWorker, PeriodicWorker

if TYPE_CHECKING:
    from .process.supervisor import Supervisor

log = logger_of(__name__)


class BackgroundWorkerManager:
    """Runs the workers of one application, once per tick of the fleet that shares its database.

    `add` registers; nothing is opened or started by that. `start` joins the fleet and `stop` leaves it.
    """

    commands: ClassVar[tuple[Command, ...]] = ()
    """The command groups that each application gets: `flask workers` and `flask messages`."""

    def __init__(self, app: Flask | None = None, db: SQLAlchemy | None = None) -> None:
        self._workers: dict[str, type[PeriodicWorker]] = {}
        self._topics: dict[str, type[MessageWorker]] = {}
        self._before_start: list[Callable[[], None]] = []
        self._checks: list[Callable[[], None]] = []
        self._lock = threading.RLock()
        self._supervisor: Supervisor | None = None
        self._started_in = self._served_in = 0  # process ids: a fork inherits the rest, but not the threads
        if app is not None and db is not None:
            self.init_app(app, db)
        elif app is not None or db is not None:
            given, missing = ("an app", "db") if db is None else ("a db", "app")
            raise TypeError(
                f"The manager was given {given} and no {missing}; expected both, or neither and `init_app(app, db)`."
            )

    def init_app(self, app: Flask, db: SQLAlchemy) -> None:
        """Bind to `app` and its initialised `db`: tables, commit fence, `flask workers`. Opens no connection.

        A setting that `app.config` does not have gets its default. Raises InvalidConfig for a wrong value.
        """
        self.app, self.db = app, db
        settings.settle(app.config)
        if "svcs_registry" not in app.extensions:
            svcs.flask.init_app(app)
        self._assemble(Outages())
        _managers.add(self)
        app.extensions["background_workers"] = self
        schema = db.metadata.schema
        for name, table in models.metadata.tables.items():
            if (f"{schema}.{name}" if schema else name) not in db.metadata.tables:
                table.to_metadata(db.metadata, schema=schema)  # type: ignore[arg-type]
        with app.app_context():
            refuse_driver(db.engine)
            sqlite.refuse_memory(db.engine)
            refuse_autocommit_options(db.engine)
            self._open = OpenTransactions(db.engine)
            opening.prepare(db.engine)
            self._engines = tuple(db.engines.values())
            for engine in self._engines:
                sqlite.prepare(engine)
                postgresql.prepare(engine)
                if place(engine.url) == place(db.engine.url):  # a bind may lead to another database
                    self.stores.outages.watch(engine)
        forks.watch_sockets()
        fence(db)
        serving.attach(self, app)
        for command in self.commands:
            app.cli.add_command(command)

    def begin_anew(self) -> None:
        """In a fork: it has none of the threads that keep its parent in the fleet, and must not use its connections."""
        forks.begin_anew(self.db, self._engines, self.ticks, self._supervisor)
        self._lock, self._supervisor = threading.RLock(), None
        self._assemble(self.stores.outages)

    def _assemble(self, outages: Outages) -> None:
        """Make the parts of one process. Nothing is opened by that."""
        self.__dict__.pop("locks", None)
        self.stores = Stores(self.app, self.db, outages)
        self.runs = Runs(self.app, self.db, outages)
        self.presence = Presence(self.app, self.stores, self.runs)
        self.recovery = Recovery(self.app, self.stores, self.presence, self.runs, self._workers)
        self.ticks = Ticks(self.stores, self.presence, self.recovery, self.runs)

    @made_once
    def locks(self) -> Locks:
        """The named locks of the fleet."""
        present, prefix = partial(self.presence.present, forget=True), self.app.config["LOCK_PREFIX"]
        return Locks(self.stores.connections.locks, self.stores.leases, present, prefix, is_stopping_within)

    # -- registering ---------------------------------------------------------------------------

    @property
    def workers(self) -> dict[str, type[PeriodicWorker]]:
        """The registered periodic workers by name, sorted."""
        return dict(sorted(self._workers.items()))

    @property
    def topics(self) -> dict[str, type[MessageWorker]]:
        """The registered message workers by topic, sorted."""
        return dict(sorted(self._topics.items()))

    @property
    def names(self) -> set[str]:
        """The names of all registered workers, periodic ones and those of messages."""
        return {*self._workers, *(worker.name for worker in self._topics.values())}

    def topic_of(self, name: str) -> str | None:
        """The topic whose messages the worker of that name handles; None for any other name."""
        return next((topic for topic, worker in self._topics.items() if worker.name == name), None)

    def add(self, worker: AnyWorker) -> None:
        """Register a worker class. Raises InvalidWorker, InvalidSchedule or DuplicateWorker."""
        if isinstance(worker, type) and issubclass(worker, MessageWorker):
            topic = declared_topic(worker)
            self._refuse_second(worker, "topic", topic, self._topics.get(topic))
            self._refuse_second(worker, "name", worker.name, self._named(worker.name))
            self._topics[topic] = worker
            if self._supervisor is not None:
                self._supervisor.listen()
            return
        declared_schedule(worker)
        self._refuse_second(worker, "name", worker.name, self._named(worker.name))
        self._workers[worker.name] = worker
        if self._supervisor is not None:
            self._supervisor.admit(worker.name)

    def _named(self, name: str) -> AnyWorker | None:
        topic = self.topic_of(name)
        return self._topics[topic] if topic else self._workers.get(name)

    def _refuse_second(self, worker: AnyWorker, what: str, value: str, taken: AnyWorker | None) -> None:
        if taken is not None:
            called = "named" if what == "name" else f"of the {what}"
            raise DuplicateWorker(
                f"There is a worker {called} {value!r} already ({_path(taken)}), "
                f"so {_path(worker)} cannot be added: give one of them another `{what}`, or add it once."
            )

    def remove(self, name: str) -> None:
        """Unregister a worker here; its rows are kept, and other instances go on running it."""
        if topic := self.topic_of(name):
            del self._topics[topic]
            return
        self._known(name)
        del self._workers[name]
        if self._supervisor is not None:
            self._supervisor.dismiss(name)

    def before_start(self, callback: Callable[[], None], check: Callable[[], None] | None = None) -> None:
        """Have `callback` called (in an app context) before the workers of a serving process start.

        It raises DatabaseNotReady to say that they cannot start yet, and why. `check` raises the same, also where
        `callback` would mend it; it changes nothing, and is called for commands that only look.
        """
        self._before_start.append(callback)
        if check is not None:
            self._checks.append(check)

    # -- starting and stopping -----------------------------------------------------------------

    @property
    def is_started(self) -> bool:
        """Whether this process is in the fleet or joining it, from `start` until `stop`."""
        return self._started_in == os.getpid()

    @property
    def has_served(self) -> bool:
        """Whether this process was asked to serve or to start already; it may have stopped since."""
        return self._served_in == os.getpid()

    @property
    def is_to_run(self) -> bool:
        """Whether this process is to run workers: it has begun to serve, and not been told that others do."""
        return self.is_started or (self.has_served and bool(self.app.config["WORKERS_ENABLED"]))

    def threads_alive(self) -> dict[str, bool] | None:
        """Whether the threads that keep the workers going here are alive, by name; None where no workers run here."""
        supervisor = self._supervisor
        return supervisor.threads_alive() if self.is_started and supervisor is not None else None

    def start_under_flask_run(self) -> None:
        """The last line of the factory: `serve` in the process that `flask run` serves with, and nowhere else."""
        serving.start_under_flask_run(self)

    def serve(self) -> bool:
        """What a serving process calls when it begins: prepare, and start unless WORKERS_ENABLED is false.

        A database that is not ready is logged and waited for; the web goes on meanwhile. False if this or `start` was
        called before: of several first requests at once, the others wait here for the first. Raises InvalidConfig if
        a `before_start` does, as waiting does not help then.
        """
        with self._lock:
            if self.has_served:
                return False
            enabled = self.app.config["WORKERS_ENABLED"]
            try:
                self.prepare()
            except InvalidConfig:
                raise
            except (BackgroundError, SQLAlchemyError, OSError) as error:
                log.log(logging.DEBUG if enabled else logging.ERROR, "%s", first_line(error))  # `start` says it too
            if enabled:
                self.start()
            else:
                log.info("The background workers are off here: WORKERS_ENABLED is false")
            self._served_in = os.getpid()
            return True

    def prepare(self) -> None:
        """Call the `before_start` callbacks, once. Raises their errors, and InvalidConfig for AUTOCOMMIT."""
        with self.app.app_context():
            while self._before_start:
                self._before_start[0]()
                del self._before_start[0]
            self._refuse_autocommit()

    def check(self) -> None:
        """Call the `check` of every `before_start`; raises what they raise, and changes nothing."""
        with self.app.app_context():
            for check in self._checks:
                check()
            self._refuse_autocommit()

    def _refuse_autocommit(self) -> None:
        """Open a session as the application does. Raises InvalidConfig if it commits each statement."""
        refuse_autocommit_options(self.db.engine)
        session = self.db.session()
        try:
            self.stores.connections.sessions.within(session)
        finally:
            session.close()

    def start(self, names: Collection[str] = ()) -> None:
        """Join the fleet, from now until `stop`, to run all workers or those of `names` only.

        Returns at once; waits in the background for a database.
        """
        with self._lock:
            if self.is_started:
                return
            from .process.supervisor import Supervisor  # brings APScheduler, for those who start

            self._started_in = self._served_in = os.getpid()
            hearing.stop_when_told(self)
            self.runs.open()
            workers, topics = self._workers, self._topics
            if names:  # the others stay known: a run may enqueue for them
                workers = {name: worker for name, worker in workers.items() if name in names}
                topics = {topic: worker for topic, worker in topics.items() if worker.name in names}
            self._supervisor = Supervisor(
                self.app,
                self.db,
                self.stores,
                self.runs,
                self.presence,
                self.recovery,
                self.ticks,
                workers,
                topics,
                self.prepare,
            )
            self._supervisor.join()

    def tell(self) -> None:
        """Set `stopping` in every run, and begin no other: `stop` follows."""
        self.runs.tell()

    def hurry(self) -> None:
        """Tell them, and let `stop` wait for them no longer."""
        self.runs.hurry()

    def stop(self, timeout: float | None = None) -> None:
        """Leave the fleet: tell the runs, wait until `timeout` seconds after that, and hand back the rest."""
        with self._lock:
            if self.is_started and self._supervisor is not None:
                try:
                    self._supervisor.leave(self.app.config["WORKERS_SHUTDOWN_SECONDS"] if timeout is None else timeout)
                finally:
                    self._started_in, self._supervisor = 0, None
            self.stores.close()

    # -- ticking and steering ------------------------------------------------------------------

    def tick(self, name: str, at: datetime) -> Execution | None:
        """Run the latest tick of worker `name` up to `at` (aware), unless an instance has or does.

        Returns the execution, or None if the tick was not this call's to run. Waits for the database's clock to reach
        the tick, at most one lease. Raises UnknownWorker, and what the database raises. Raises CommitFirst amid a
        transaction of this thread that has written.

        This call asks for that tick, so it runs even if the worker is new to the database. A start does not ask: there
        a new worker begins with its next tick (see `run_on_first_start`).
        """
        worker = self._known(name)
        if not isinstance(at, datetime) or at.tzinfo is None:
            raise InvalidSchedule(
                f"The tick of {name!r} was asked for at {at!r}; expected an aware datetime: write datetime.now(UTC)."
            )
        if not worker.enabled:
            log.debug("%s: not running a tick: it is disabled here (enabled = False)", name)
            return None
        with self._on_its_own(f"tick({name!r})", runs=True):
            self._reopen()
            at = at.astimezone(UTC)
            state = self.recovery.look(worker, asked=at)
            return self.ticks.run(worker, state.schedule.previous(at), state.schedule_text, state)

    def trigger(self, name: str) -> Execution | None:
        """Run worker `name` now, here, whatever its schedule says. None if it is running already.

        A manual run takes no tick away, and a pause does not delay it. Raises UnknownWorker. Raises CommitFirst amid a
        transaction of this thread that has written.
        """
        worker = self._known(name)
        with self._on_its_own(f"trigger({name!r})", runs=True):
            self._reopen()
            return self.ticks.run_now(worker)

    def request(self, name: str) -> bool:
        """Have any instance run worker `name` now, at once or with its next heartbeat.

        As with `trigger`, a pause does not delay it. False if it runs, or will run next, already. Raises UnknownWorker
        and CommitFirst.
        """
        worker = self._known(name)
        with self._on_its_own(f"request({name!r})"):
            self.recovery.look(worker)
            requested = self.stores.ledger.request(name)
        self._look()
        return requested

    def pause(self, name: str) -> bool:
        """Run no more ticks of `name`, anywhere, until `resume`. A run in progress goes on. False if paused already.

        Commits on its own. Raises CommitFirst if it would wait for the caller's own transaction.
        """
        worker = self._known(name)
        with self._on_its_own(f"pause({name!r})"):
            self.recovery.look(worker)
            return self.stores.controls.pause(name)

    def resume(self, name: str) -> bool:
        """Run the ticks of `name` again, from the next one. False if it was not paused. Raises as `pause` does."""
        worker = self._known(name)
        with self._on_its_own(f"resume({name!r})"):
            self.recovery.look(worker)
            return self.stores.controls.resume(name)

    def reschedule(
        self, name: str, period: timedelta | None = None, cron: str | None = None, timezone: str | None = None
    ) -> bool:
        """Give `name` another schedule, for the whole fleet and across restarts; without one, the declared again.

        A release that declares another schedule replaces it. False if that is its schedule already.
        """
        worker = self._known(name)
        declared = period is None and cron is None and timezone is None
        schedule = None if declared else make_schedule(name, period, cron, timezone)
        with self._on_its_own(f"reschedule({name!r})"):
            self.recovery.look(worker)
            changed = self.stores.controls.reschedule(name, schedule)
        self._look()
        return changed

    def repair(self) -> tuple[list[str], int]:
        """Resume what the database's clock put off while it was ahead. Call this once the clock is right.

        The fleet does this by itself after a lease, if the history can prove that no tick runs twice. Returns the
        workers, and the number of messages.
        """
        with self._on_its_own("repair"):
            names = [name for name, state in self.stores.ledger.states().items() if is_ahead(state)]
            healed = (
                [name for name in names if self.stores.clock_repair.worker(name)],
                self.stores.clock_repair.messages(),
            )
        self._look()
        return healed

    def _on_its_own(self, call: str, runs: bool = False) -> AbstractContextManager[None]:
        """Guard `call`, which commits by itself. Raises CommitFirst if the caller would wait for itself."""
        return self._open.refused(call, self.stores.connections.claims, runs)

    def _look(self) -> None:
        """Take in at once what the others see with their next heartbeat."""
        if self._supervisor is not None:
            self._supervisor.refresh()

    # -- messages ------------------------------------------------------------------------------

    def enqueue(
        self, topic: str, payload: Any, key: str | None = None, delay: timedelta | float | None = None
    ) -> int | None:
        """Enqueue a message on the current app context's session: it is there once that is committed, or not at all.

        `payload` is what JSON can carry, at most MESSAGES_MAX_BYTES of it; `delay` is a timedelta or seconds. Returns
        the message's id, or None where one with this topic and `key` was enqueued before (MESSAGES_KEY_DAYS long).
        Raises UnknownTopic and InvalidMessage.
        """
        self._known_topic(topic)
        drafted, delay = draft(payload, key, self.app.config["MESSAGES_MAX_BYTES"]), as_delay(delay)
        session = self.db.session()
        found = self.stores.queue.enqueue(session, topic, drafted, delay)
        if found is not None:
            self._wake_when_committed(session, topic, delay)
        return found

    def enqueue_many(
        self,
        topic: str,
        payloads: Iterable[Any],
        keys: Iterable[str | None] | None = None,
        delay: timedelta | float | None = None,
    ) -> int:
        """Enqueue many at once, in their order; `keys`, if given, one for each. Returns how many were not there before.

        Everything is checked before anything is enqueued.
        """
        self._known_topic(topic)
        most, delay, each = self.app.config["MESSAGES_MAX_BYTES"], as_delay(delay), listed(payloads, "payloads")
        names = [None] * len(each) if keys is None else listed(keys, "keys")
        if len(names) != len(each):
            raise InvalidMessage(f"There are {len(names)} keys for {len(each)} payloads; expected one for each.")
        drafts = [draft(payload, key, most) for payload, key in zip(each, names, strict=True)]
        session = self.db.session()
        count = self.stores.queue.enqueue_many(session, topic, drafts, delay)
        if count:
            self._wake_when_committed(session, topic, delay)
        return count

    def _wake_when_committed(self, session: Session, topic: str, delay: timedelta | None) -> None:
        if (supervisor := self._supervisor) is not None:
            when_committed(session, f"messages:{topic}:{delay}", partial(supervisor.consumers.wake_after, topic, delay))

    # -- locking -------------------------------------------------------------------------------

    def lock(self, name: str, timeout: float = 0) -> AbstractContextManager[Lock | None]:
        """`with workers.lock("invoice-42") as lock:` gives a Lock, or None while others hold it (`timeout`: seconds).

        One block in the whole fleet has it, until the block ends or its process stops or loses its lease. Not
        re-entrant: the thread that has it gets None at once. Those who wait come in no order, and a run that is told
        to stop waits no longer. Raises InvalidLock, and LockNotAcquired where the database does not answer.
        """
        self.locks.check(name, timeout)
        return self.locks.hold(name, timeout)

    # -- looking -------------------------------------------------------------------------------

    @property
    def history(self) -> History:
        """What is written down about the executions, for people to read."""
        return History(self.stores.ledger, self.roster)

    @property
    def roster(self) -> InstanceHistory:
        """Who is alive and who was, for people to read."""
        return InstanceHistory(self.stores.leases)

    @property
    def messages(self) -> MessageHistory:
        """The messages, for people to read, to retry and to discard."""
        return MessageHistory(self.stores.queue, self.roster, self._topics, self._on_its_own)

    def why(self, name: str, at: datetime | None = None) -> Answer:
        """Say in one sentence what happened to the tick that `at` (aware, by default now) belongs to, and why.

        Answers for a worker that only the database knows, too. Raises UnknownWorker.
        """
        around, worker = self.history.around(name, at), self._workers.get(name)
        if around.state is None:
            worker = self._known(name)
        return why(around, worker, self.app.config["WORKERS_HISTORY_DAYS"])

    def _reopen(self) -> None:
        """Open the runs again: a call of `tick` or `trigger` after a stop is meant."""
        if not self.is_started:
            self.runs.open()

    def _known_topic(self, topic: str) -> None:
        if not isinstance(topic, str) or topic not in self._topics:
            raise UnknownTopic(topic, self._topics)

    def _known(self, name: str) -> type[PeriodicWorker]:
        try:
            return self._workers[name]
        except (KeyError, TypeError):
            raise UnknownWorker(name, self.names, self.topic_of(name)) from None


_managers: WeakSet[BackgroundWorkerManager] = WeakSet()


def _forked() -> None:
    is_in_a_run = current_run.get() is not None
    try:
        for manager in _managers:
            manager.begin_anew()
            if is_in_a_run:
                forks.cut_off(manager._engines)
    finally:
        hearing.let_through_in_a_child(is_in_a_run)


os.register_at_fork(before=hearing.hold_back, after_in_parent=hearing.let_through, after_in_child=_forked)


def _path(worker: AnyWorker) -> str:
    return f"{worker.__module__}.{worker.__qualname__}"


def the_manager() -> BackgroundWorkerManager:
    """The current app's own: for what outlives the app context, which `current_workers` does not."""
    manager: BackgroundWorkerManager = current_app.extensions["background_workers"]
    return manager


current_workers: BackgroundWorkerManager = LocalProxy(the_manager)  # type: ignore[assignment]
