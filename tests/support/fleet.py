"""Helpers of the engine's tests: instances on one database, and the effects of their runs."""

import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import CheckConstraint, Column, Engine, Integer, String, Table, event, insert, select, text, update
from support.databases import close
from support.processes import PATIENCE, eventually

from background import BackgroundWorkerManager, PeriodicWorker, WorkerContext
from background.dashboard import dashboard
from background.database import tables
from background.database.clock import UtcDateTime
from background.monitoring.health import health
from background.monitoring.metrics import metrics
from background.settings import SETTINGS
from background.worker import AnyWorker

HOUR = timedelta(hours=1)

QUICK = {"WORKERS_HEARTBEAT_SECONDS": 0.1, "WORKERS_LEASE_SECONDS": 2, "WORKERS_SHUTDOWN_SECONDS": 10}

db = SQLAlchemy()

effects = Table(
    "effects",
    db.metadata,
    Column("id", Integer, primary_key=True),
    Column("key", String(300), nullable=False),
    Column("note", String(100), nullable=False),
    Column("unique", Integer, unique=True),
)


class Note(db.Model):  # type: ignore[name-defined, misc]
    """A row that an application writes by itself, not a run."""

    __tablename__ = "notes"
    __table_args__ = (CheckConstraint("number >= 0", name="number"),)

    id = Column(Integer, primary_key=True)
    text = Column(String(300), nullable=False)
    number = Column(Integer, nullable=False, default=0)
    at = Column(UtcDateTime)


def effect(context: WorkerContext, note: object = "") -> None:
    """Write an effect of the run in its own session. The row is kept if and only if the run commits."""
    context.session.execute(insert(effects).values(key=context.idempotency_key, note=str(note)))


class Hourly(PeriodicWorker):
    """A worker that leaves one effect per run. The workers of the tests inherit from it."""

    period = HOUR
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        effect(context)


def make_app(database_url: str, *workers: AnyWorker, **config: Any) -> Flask:
    """Return an application of a few lines with `workers`, and with short heartbeats."""
    app = Flask("host", root_path=str(Path(__file__).parent))
    # Without an answer the connections end within seconds. A test's own options come on top.
    arguments = {"prepare_threshold": None, "keepalives_idle": 10, "tcp_user_timeout": 20_000, "connect_timeout": 10}
    options = {"pool_pre_ping": True, "connect_args": arguments} if database_url.startswith("postgresql") else {}
    given = config.get("SQLALCHEMY_ENGINE_OPTIONS", {})
    options |= given | {"connect_args": options.get("connect_args", {}) | given.get("connect_args", {})}
    app.config |= QUICK | {"TESTING": True, "SECRET_KEY": "test", "RELEASE": "tested"} | config
    app.config |= {"SQLALCHEMY_DATABASE_URI": database_url, "SQLALCHEMY_ENGINE_OPTIONS": options}
    db.init_app(app)
    manager = BackgroundWorkerManager(app, db)
    for worker in workers:
        manager.add(worker)
    for blueprint in (health(), metrics(), dashboard(lambda: None)):
        app.register_blueprint(blueprint)
    manager.start_under_flask_run()
    return app


FLASK_APP = "support.fleet:from_environment()"


def from_environment(*workers: AnyWorker) -> Flask:
    """Return the application for a process of its own, with the engine's settings from the environment."""
    logging.basicConfig(level=logging.INFO)
    return make_app(
        os.environ["DATABASE_URL"], *workers, **{name: os.environ[name] for name in SETTINGS if name in os.environ}
    )


def make_tables(database_url: str) -> None:
    """Give the database the tables of the engine and of its tests."""
    app = make_app(database_url)
    with app.app_context():
        db.create_all()
    close(app)


class Fleet:
    """Applications on one database. Each is an instance of its own. The end of the test stops all of them."""

    def __init__(self, database_url: str) -> None:
        self.database_url = database_url
        self.apps: list[Flask] = []
        app = self.app()
        with app.app_context():
            self.engine: Engine = db.engine
            db.metadata.create_all(self.engine, [effects, Note.__table__])  # a copy of the shop has neither table

    def app(self, *workers: AnyWorker, **config: Any) -> Flask:
        self.apps.append(make_app(self.database_url, *workers, **config))
        return self.apps[-1]

    def manager(self, *workers: AnyWorker, **config: Any) -> BackgroundWorkerManager:
        manager: BackgroundWorkerManager = self.app(*workers, **config).extensions["background_workers"]
        return manager

    def command(self, *arguments: object) -> list[str]:
        """Return the command that runs `main` of this file with `arguments` in another process."""
        return [sys.executable, "-m", "fleet", self.database_url, *map(str, arguments)]

    def close(self) -> None:
        stop(*self.apps)

    def enqueue(self, topic: str, *payloads: Any, **more: Any) -> list[int | None]:
        """Enqueue through the newest application."""
        app = self.apps[-1]
        with app.app_context():
            ids = [app.extensions["background_workers"].enqueue(topic, payload, **more) for payload in payloads]
            db.session.commit()
        return ids

    def messages(self) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(select(tables.messages).order_by(tables.messages.c.id)).all())

    def errors(self) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(select(tables.message_errors).order_by(tables.message_errors.c.id)).all())

    # -- the rows in the database -----------------------------------------------------------------

    def effects(self) -> list[str]:
        """Return the notes that the runs left, in order."""
        with self.engine.connect() as connection:
            return list(connection.scalars(select(effects.c.note).order_by(effects.c.id)))

    def keys(self) -> list[str]:
        with self.engine.connect() as connection:
            return list(connection.scalars(select(effects.c.key).order_by(effects.c.id)))

    def executions(self, name: str | None = None) -> list[Any]:
        query = select(tables.executions).order_by(tables.executions.c.id)
        if name:
            query = query.where(tables.executions.c.worker == name)
        with self.engine.connect() as connection:
            return list(connection.execute(query))

    def states(self, name: str | None = None) -> list[str]:
        query = select(tables.executions.c.state).order_by(tables.executions.c.id)
        if name:
            query = query.where(tables.executions.c.worker == name)
        with self.engine.connect() as connection:
            return list(connection.scalars(query))

    def row(self, name: str) -> Any:
        with self.engine.connect() as connection:
            return connection.execute(select(tables.workers).where(tables.workers.c.name == name)).one()

    def is_blocked(self) -> bool:
        """Return whether a session of this PostgreSQL waits for a lock.

        Each call opens a new transaction. Within one transaction, PostgreSQL repeats the list of its first read.
        """
        blocked = "SELECT true FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        with self.engine.connect() as connection:
            return bool(connection.scalar(text(blocked)))

    def set(self, name: str, **columns: Any) -> None:
        """Set columns of a worker's row, as if the fleet had been there before."""
        with self.engine.begin() as connection:
            connection.execute(update(tables.workers).where(tables.workers.c.name == name).values(**columns))

    def take_over(self, name: str) -> None:
        """Raise the token, as if another instance held the worker from now on."""
        token = tables.workers.c.token + 1
        self.set(name, token=token, running=token)


def states(fleet: Fleet) -> list[str]:
    """Return the states of the messages, in their order."""
    with fleet.engine.connect() as connection:
        return list(connection.scalars(select(tables.messages.c.state).order_by(tables.messages.c.id)))


def stop(*apps: Flask) -> None:
    """Stop the workers of the apps, and wait until the threads end."""
    for app in apps:
        app.extensions["background_workers"].stop()
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("workers-")], "the threads' end")
    close(*apps)  # also the connections that a late thread opened again


def start_and_look(manager: BackgroundWorkerManager) -> None:
    """Start the workers, and wait until the process has made the looks of its start.

    It looks for messages at the start, and again after it listens. Then it also looks at the fleet.
    """
    # These import APScheduler. Some tests assert that nothing does.
    from background.process.consumers import Consumers
    from background.process.supervisor import Supervisor

    looks = threading.Semaphore(0)

    def counted(look: Callable[..., None]) -> Callable[..., None]:
        def count(*arguments: Any) -> None:
            look(*arguments)
            looks.release()

        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Consumers, "wake_all", counted(Consumers.wake_all))
        patch.setattr(Supervisor, "_looked", counted(Supervisor._looked))
        manager.start()
        for _ in ("messages at the start", "messages after it listens", "the fleet after it listens"):
            assert looks.acquire(timeout=PATIENCE)


def last_hour() -> datetime:
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0)


def wait_until(is_true: Callable[[], Any], what: str = "it") -> Any:
    """Poll the database (which sends no events) until `is_true()` holds. Return its value."""
    found = eventually(is_true, pause=0.02)  # polling in this process is cheap
    assert found, f"waited {PATIENCE} s in vain until {what} happened"
    return found


BEAT = {"sqlite": "INSERT INTO background_instances", "postgresql": "EXECUTE background_heartbeat_"}
"""The text of a heartbeat."""


@contextmanager
def statements(engine: Engine | type[Engine]) -> Iterator[list[str]]:
    """Collect the statements that `engine` executes in the block. `Engine` itself stands for all engines."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(engine, "before_cursor_execute", note)


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """Call the functions at the same instant, each in a thread. Return their results in order."""
    results: list[Any] = [None] * len(functions)
    barrier = threading.Barrier(len(functions))

    def call(number: int) -> None:
        barrier.wait()
        results[number] = functions[number]()

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return results


def at_once(number: int, work: Callable[[int], Any]) -> list[Any]:
    """Call `work(0)` to `work(number - 1)` at the same instant. Return their results in order."""
    return in_threads(*[partial(work, index) for index in range(number)])


def main(database_url: str, name: str, at: str, processes: str = "1") -> None:
    """Run the same tick at the same instant in `processes` new processes. Each prints the outcome."""
    manager: BackgroundWorkerManager = make_app(database_url, *WORKERS).extensions["background_workers"]
    if processes == "1":
        print(manager.tick(name, datetime.fromisoformat(at)))
        return
    context = multiprocessing.get_context("fork")  # as under gunicorn --preload, no connection is open
    barrier = context.Barrier(int(processes))

    def member() -> None:
        barrier.wait()
        execution = manager.tick(name, datetime.fromisoformat(at))
        os.write(1, f"{execution.state if execution else None}\n".encode())
        manager.stop()

    members = [context.Process(target=member) for _ in range(int(processes))]
    for process in members:
        process.start()
    for process in members:
        process.join()


class Shared(Hourly):
    """The worker that the processes of `main` run."""


class StuckAtTheEnd(Hourly):
    """Leaves its effect, and hangs between this effect and the commit of "succeeded"."""

    def do_work(self, context: WorkerContext) -> None:
        effect(context)
        session = context.session

        @event.listens_for(session, "before_commit")
        def hang(_session: object) -> None:
            session.flush()
            print("working", flush=True)
            threading.Event().wait()


WORKERS = (Shared, StuckAtTheEnd)

if __name__ == "__main__":
    main(*sys.argv[1:])
