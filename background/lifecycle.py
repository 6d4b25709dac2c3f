"""The life of the engine in a process: bound to an application, started, stopped, and forked."""

import logging
import os
import threading
from collections.abc import Callable, Collection, Iterable
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import svcs.flask
from click import Command
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.exc import SQLAlchemyError

from . import settings
from .database.connections import made_once
from .database.dialects import sqlite
from .database.dialects.open_transactions import OpenTransactions
from .database.outages import Outages
from .errors import BackgroundError, InvalidConfig, first_line
from .host import forks, stop_signals
from .host.logs import logger_of
from .ledger.locks import Locks
from .process import serving
from .process.presence import Presence
from .process.recovery import Recovery
from .process.ticks import Ticks
from .registry import Registry
from .runs.fence import fence, is_stopping_within
from .runs.running import Runs
from .stores import Stores, add_tables, prepare_engines
from .worker import AnyWorker

if TYPE_CHECKING:
    from .process.heartbeat import Watch
    from .process.supervisor import Supervisor

log = logger_of(__name__)

SendMail = Callable[[str, str, str, str, datetime], object]
Look = Callable[[], tuple[Iterable[str], Iterable[str]]]


class Lifecycle:
    """Binds the engine to one application, and starts and stops it in each process."""

    commands: ClassVar[tuple[Command, ...]] = ()
    """The command groups that each application gets: `flask workers` and `flask messages`."""

    parts: ClassVar[tuple[Callable[[Any], None], ...]] = ()
    """Functions that get each manager once it is bound to an application: the alarms."""

    def __init__(self, app: Flask | None = None, db: SQLAlchemy | None = None) -> None:
        self._registry = Registry()
        self._before_start: list[Callable[[], None]] = []
        self._checks: list[Callable[[], None]] = []
        self._looks: list[Look] = []
        self._when_added: list[Callable[[AnyWorker], None]] = []
        self._lock = threading.RLock()
        self.watch: Watch | None = None
        """The watch over the fleet, which sends alerts. None if no setting names a channel for alerts."""
        self.send_mail: SendMail | None = None
        """The application's function that sends the mails of ALERT_MAIL.

        It gets the reader, the subject, the text, a key and a moment. Calls with the same key are about one mail.
        """
        self.supervisor: Supervisor | None = None
        """The threads of the started workers. None before a start and after a stop."""
        self._started_in = self._served_in = 0  # process ids: a forked child inherits them, but not the threads
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
        app.extensions["background_workers"] = self
        outages = Outages()
        self._assemble(outages)  # first: a manager that is refused below must still stop
        add_tables(db)
        with app.app_context():
            self._engines = prepare_engines(db, outages)
            self._open = OpenTransactions(db.engine)
        forks.watch_sockets()
        fence(db)
        serving.attach(self, app)
        for command in self.commands:
            app.cli.add_command(command)
        for part in self.parts:
            part(self)

    def _assemble(self, outages: Outages) -> None:
        """Make the parts of one process. Opens nothing."""
        self.__dict__.pop("locks", None)
        self.stores = Stores(self.app, self.db, outages)
        self.runs = Runs(self.app, self.db, outages, self._replace_thread)
        self.presence = Presence(self.stores, self.runs)
        self.recovery = Recovery(self.stores, self.presence, self.runs, self._registry.workers)
        self.ticks = Ticks(self.stores, self.presence, self.recovery, self.runs, self._postpone)

    def _replace_thread(self, thread: int) -> None:
        if self.supervisor is not None:
            self.supervisor.scheduler.replace(thread)

    def _postpone(self, name: str, tick: datetime, schedule: str) -> None:
        if self.supervisor is not None:
            self.supervisor.timers.postpone(name, tick, schedule)

    def begin_anew(self, is_in_a_run: bool) -> None:
        """Begin as another process, in a forked child.

        The child has no threads of its parent, which keep the parent in the fleet. It must not use the parent's
        connections. A child of a run does not even reach the database server with them.
        """
        forks.begin_anew(self.db, self._engines, self.ticks, self.supervisor)
        self._lock, self.supervisor = threading.RLock(), None
        self._assemble(self.stores.outages)
        if is_in_a_run:
            forks.cut_off()
            for engine in self._engines:
                sqlite.wait_briefly(engine)

    @made_once
    def locks(self) -> Locks:
        """The named locks of the fleet."""
        present, prefix = partial(self.presence.present, forget=True), self.app.config["LOCK_PREFIX"]
        return Locks(self.stores.connections.locks, self.stores.leases, present, prefix, is_stopping_within)

    # -- starting and stopping -----------------------------------------------------------------

    def before_start(self, callback: Callable[[], None], check: Callable[[], None] | None = None) -> None:
        """Call `callback` in an app context, before the workers of a serving process start.

        It raises DatabaseNotReady with the reason if they cannot start yet. Commands that only read call `check`
        instead. `check` changes nothing, and raises DatabaseNotReady even if `callback` would repair the database.
        """
        self._before_start.append(callback)
        if check is not None:
            self._checks.append(check)

    def also_check(self, look: Look) -> None:
        """Have `flask workers check` call `look` in an app context, for problems and warnings of the application.

        It returns a sentence for each problem, and for each warning. Only problems make the command exit with 1.
        """
        self._looks.append(look)

    def look(self) -> tuple[list[str], list[str]]:
        """Return the problems and the warnings that the application finds in itself."""
        problems: list[str] = []
        warnings: list[str] = []
        for look in self._looks:
            found, warned = look()
            problems += found
            warnings += warned
        return problems, warnings

    @property
    def is_started(self) -> bool:
        """True from `start` until `stop`: this process is in the fleet, or joins it."""
        return self._started_in == os.getpid()

    @property
    def has_served(self) -> bool:
        """True once this process has begun to serve or to start. It may have stopped since."""
        return self._served_in == os.getpid()

    @property
    def is_to_run(self) -> bool:
        """True if this process should run workers: it has begun to serve, and WORKERS_ENABLED is true."""
        return self.is_started or (self.has_served and bool(self.app.config["WORKERS_ENABLED"]))

    def threads_alive(self) -> dict[str, bool] | None:
        """Return whether each thread that the workers of this process need is alive, by name.

        None if no workers run in this process.
        """
        supervisor = self.supervisor
        return supervisor.threads_alive() if self.is_started and supervisor is not None else None

    def start_under_flask_run(self) -> None:
        """Call `serve` in the process that `flask run` serves with. Do nothing in any other process.

        Call this in the last line of the application's factory.
        """
        serving.start_under_flask_run(self)

    def serve(self) -> bool:
        """Prepare the database, and start unless WORKERS_ENABLED is false. Each serving process calls this.

        If the database is not ready, log that and wait in the background. The web pages work meanwhile. Return False if
        this process called `serve` or `start` before. Raises InvalidConfig if a `before_start` does, as waiting does
        not help then.

        Concurrency: several first requests may call this in different threads. The later ones wait for the first.
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
                log.log(logging.DEBUG if enabled else logging.ERROR, "%s", first_line(error))  # `start` logs it, too
            if enabled:
                self.start()
            else:
                log.info("The background workers are off in this process: WORKERS_ENABLED is false")
            self._served_in = os.getpid()
            return True

    def prepare(self) -> None:
        """Call the `before_start` callbacks, once. Raises their errors, and InvalidConfig for AUTOCOMMIT."""
        with self.app.app_context():
            while self._before_start:
                self._before_start[0]()
                del self._before_start[0]
            self.stores.refuse_autocommit()

    def check(self) -> None:
        """Call the `check` of every `before_start`. Raises their errors, and changes nothing."""
        with self.app.app_context():
            for check in self._checks:
                check()
            self.stores.refuse_autocommit()

    def start(self, names: Collection[str] = ()) -> None:
        """Join the fleet and run all workers until `stop`, or only the workers `names`.

        Returns immediately. Waits for a database in the background.
        """
        with self._lock:
            if self.is_started:
                return
            from .process.supervisor import Supervisor  # imports APScheduler, which only a start needs

            self._started_in = self._served_in = os.getpid()
            stop_signals.stop_when_told(self)
            self.runs.open()
            workers, topics = self._registry.workers, self._registry.topics
            if names:  # the other workers stay registered: a run may enqueue messages for them
                workers = {name: worker for name, worker in workers.items() if name in names}
                always = self.watch.topics if self.watch else ()
                topics = {topic: worker for topic, worker in topics.items() if worker.name in names or topic in always}
            parts = self.stores, self.runs, self.presence, self.recovery, self.ticks
            self.supervisor = Supervisor(*parts, workers, topics, self.prepare, self.watch)
            self.supervisor.join()

    def tell(self) -> None:
        """Ask every run to stop, and begin no other run. `stop` follows."""
        self.runs.tell()

    def hurry(self) -> None:
        """Ask every run to stop, and no longer let `stop` wait for the runs."""
        self.runs.hurry()

    def stop(self, timeout: float | None = None) -> None:
        """Leave the fleet: ask the runs to stop, wait at most `timeout` seconds, and hand back the remaining runs.

        By default, `timeout` is WORKERS_SHUTDOWN_SECONDS.
        """
        with self._lock:
            if self.is_started and self.supervisor is not None:
                try:
                    self.supervisor.leave(self.app.config["WORKERS_SHUTDOWN_SECONDS"] if timeout is None else timeout)
                finally:
                    self._started_in, self.supervisor = 0, None
            self.stores.close()
