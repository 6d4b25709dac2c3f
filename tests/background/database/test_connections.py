"""The engine in applications with their own connections, session routing and schemas."""

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.session import Session
from sqlalchemy import (
    Column,
    Delete,
    Engine,
    Insert,
    MetaData,
    String,
    Table,
    Update,
    create_engine,
    event,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import OperationalError
from support.databases import administer, close
from support.fleet import wait_until

from background import (
    BackgroundWorkerManager,
    ClaimLost,
    CommitFirst,
    InvalidConfig,
    Message,
    MessageWorker,
    NotFenced,
    PeriodicWorker,
    PruneHistoryWorker,
    WorkerContext,
)
from background.database.outages import is_cut_off

NOW = datetime.now(UTC)
on_postgresql = pytest.mark.parametrize("empty_database_url", ["postgresql"], indirect=True)
on_sqlite = pytest.mark.parametrize("empty_database_url", ["sqlite"], indirect=True)
HOST = None


class Noting(PeriodicWorker):
    """Writes one note, then acts as the test says."""

    period = timedelta(days=300)
    run_on_first_start = True
    then: Callable[[WorkerContext], None] | None = None

    def do_work(self, context: WorkerContext) -> None:
        context.session.execute(HOST.notes.insert().values(text="a tick"))
        if type(self).then is not None:
            type(self).then(context)


class Taking(MessageWorker):
    topic = "notes"

    def handle(self, message: Message, context: WorkerContext) -> None:
        context.session.execute(HOST.notes.insert().values(text=message.payload))


class Host:
    """A small application, made with the settings under test."""

    def __init__(self, url: str, db: SQLAlchemy | None = None, **config: Any) -> None:
        global HOST
        HOST = self
        self.app, self.db = Flask("host"), db or SQLAlchemy()
        self.app.config.update(SQLALCHEMY_DATABASE_URI=url, WORKERS_LEASE_SECONDS=2, **config)
        self.db.init_app(self.app)
        self.notes = Table("notes", self.db.metadata, Column("text", String(100)))
        Noting.then = None

    @property
    def engine(self) -> Engine:
        with self.app.app_context():
            return self.db.engine

    def bind(self) -> BackgroundWorkerManager:
        self.manager = BackgroundWorkerManager(self.app, self.db)
        for worker in (Noting, Taking, PruneHistoryWorker):
            self.manager.add(worker)
        return self.manager

    def create(self) -> None:
        with self.app.app_context():
            self.db.create_all()

    def noted(self) -> list[str]:
        with self.app.app_context():
            return sorted(self.db.session.scalars(select(self.notes.c.text)))

    def works(self) -> None:
        """Check a tick, a message, a lock and a pruning, also on a started instance."""
        assert self.manager.tick("noting", NOW).state == "succeeded"
        with self.app.app_context():
            assert self.manager.enqueue("notes", "a message")
            assert self.manager.enqueue_many("notes", ["another"]) == 1
            self.db.session.commit()
        with self.manager.lock("invoice-42") as lock:
            assert lock.still_held()
        assert self.manager.trigger("prune_history_worker").state == "succeeded"
        self.manager.start()
        wait_until(lambda: self.noted() == ["a message", "a tick", "another"], "the messages")
        assert self.manager.request("noting")
        wait_until(lambda: self.noted().count("a tick") == 2, "the run that was requested")
        assert [each.state for each in self.manager.history.executions("noting")] == ["succeeded"] * 2
        assert self.manager.messages.stats()[0].handled == 2


@pytest.fixture
def hosts(empty_database_url: str) -> Iterator[Callable[..., Host]]:
    made: list[Host] = []

    def make(url: str = empty_database_url, db: SQLAlchemy | None = None, **config: Any) -> Host:
        made.append(Host(url, db, **config))
        return made[-1]

    yield make
    for host in made:
        if "background_workers" in host.app.extensions:
            host.app.extensions["background_workers"].stop()
        with host.app.app_context():
            for engine in host.db.engines.values():
                engine.dispose()
    close()


def connect(url: str) -> Any:
    parts = make_url(url)
    if parts.get_backend_name() == "sqlite":
        return sqlite3.connect(parts.database, check_same_thread=False)
    return psycopg.connect(host=parts.query.get("host") or parts.host, user=parts.username, dbname=parts.database)


@pytest.mark.promise
def test_workers_connect_by_the_connection_function_of_the_application(
    hosts: Callable[..., Host], empty_database_url: str, tmp_path: Path
) -> None:
    on_sqlite = empty_database_url.startswith("sqlite")
    dummy = f"sqlite:///{tmp_path / 'dummy.sqlite'}" if on_sqlite else "postgresql+psycopg://reader@127.0.0.1:1/none"
    host = hosts(dummy, SQLALCHEMY_ENGINE_OPTIONS={"creator": lambda: connect(empty_database_url)})
    host.bind()
    host.create()
    host.works()
    assert not (tmp_path / "dummy.sqlite").exists()
    assert not (tmp_path / "dummy.sqlite-instances").exists()


def test_listeners_of_the_application_apply_to_the_engines_connections_too(
    hosts: Callable[..., Host], empty_database_url: str
) -> None:
    host = hosts()
    asked: list[Any] = []
    opened: list[Any] = []
    host.bind()

    @event.listens_for(host.engine, "do_connect")
    def with_a_token(_dialect: Any, _record: Any, given: Any, named: Any) -> None:
        asked.append(named.pop("token", None))

    @event.listens_for(host.engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        opened.append(connection)

    host.create()
    before = len(opened)
    host.works()
    # The claims' connection, the heartbeats', and on PostgreSQL the listener's.
    assert len(opened) - before >= (2 if empty_database_url.startswith("sqlite") else 3)
    assert len(asked) == len(opened)


@on_postgresql
def test_a_password_that_is_fetched_for_each_connection_opens_the_engines_connections(
    hosts: Callable[..., Host], empty_database_url: str
) -> None:
    real = make_url(empty_database_url)
    host = hosts(real.set(username="expired"))

    @event.listens_for(host.engine, "do_connect")
    def with_a_token(_dialect: Any, _record: Any, _given: Any, named: Any) -> None:
        named["user"] = real.username

    host.bind()
    host.create()
    host.works()


@pytest.fixture
def role(empty_database_url: str, postgresql_server: Any) -> Iterator[str]:
    """Give a role of the server that has a schema, "books", in the test's database."""
    database = postgresql_server.set(database=make_url(empty_database_url).database)
    role = f"clerk_{database.database}"
    administer(database, f"CREATE ROLE {role}", f"CREATE SCHEMA books AUTHORIZATION {role}")
    yield role
    administer(database, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


@on_postgresql
def test_a_role_and_a_search_path_that_a_listener_sets_apply_to_the_engine(
    role: str, hosts: Callable[..., Host]
) -> None:
    host = hosts()

    @event.listens_for(host.engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        connection.execute(f"SET ROLE {role}")
        connection.execute("SET search_path TO books")
        connection.commit()

    host.bind()
    host.create()
    host.works()
    with host.engine.connect() as connection:
        tables = connection.execute(text("SELECT schemaname, tableowner FROM pg_tables WHERE tablename LIKE '%o%'"))
        own = [tuple(row) for row in tables if row.schemaname not in ("pg_catalog", "information_schema")]
        assert set(own) == {("books", role)}


@on_postgresql
def test_a_listeners_uncommitted_settings_survive_the_engines_rollbacks(role: str, hosts: Callable[..., Host]) -> None:
    host = hosts()
    event.listen(host.engine, "connect", lambda connection, _record: connection.execute(f"SET ROLE {role}"))
    own = host.bind().stores.connections
    for engine in (own.claims, own.heartbeats):
        for _ in range(2):
            with engine.connect() as connection:
                assert connection.scalar(text("SELECT current_user")) == role
    with own.listening() as driver:
        assert driver.execute("SELECT current_user").fetchone() == (role,)


SCHEMAS = {
    "the metadata's": lambda: (SQLAlchemy(metadata=MetaData(schema="shop")), {}),
    "one that needs quotes": lambda: (SQLAlchemy(metadata=MetaData(schema="Book Shop")), {}),
    "the engine's translation": lambda: (
        SQLAlchemy(),
        {"SQLALCHEMY_ENGINE_OPTIONS": {"execution_options": {"schema_translate_map": {None: "shop"}}}},
    ),
    "the metadata's, translated": lambda: (
        SQLAlchemy(
            metadata=MetaData(schema="template"),
            engine_options={"execution_options": {"schema_translate_map": {"template": "shop"}}},
        ),
        {},
    ),
}


@pytest.mark.promise
@pytest.mark.parametrize("where", SCHEMAS)
def test_the_engine_uses_the_tables_in_the_applications_schema(
    hosts: Callable[..., Host], empty_database_url: str, tmp_path: Path, where: str
) -> None:
    db, config = SCHEMAS[where]()
    host, schema = hosts(db=db, **config), "Book Shop" if "quotes" in where else "shop"
    if empty_database_url.startswith("sqlite"):

        @event.listens_for(host.engine, "connect")
        def connected(connection: Any, _record: Any) -> None:
            connection.execute(f"ATTACH DATABASE '{tmp_path / 'shop.sqlite'}' AS \"{schema}\"")
    else:
        with host.engine.begin() as connection:
            connection.execute(text(f'CREATE SCHEMA "{schema}"'))
    host.bind()
    host.create()
    host.works()
    with host.engine.connect() as connection:
        query = text(f'SELECT count(*) FROM "{schema}".background_executions')
        assert connection.execute(query).scalar() >= 3


# -- AUTOCOMMIT --------------------------------------------------------------------------------


def set_by_a_listener(host: Host) -> None:
    @event.listens_for(host.engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.isolation_level = None
        else:
            connection.autocommit = True


AT_ONCE: dict[str, dict[str, Any]] = {
    "the engine's option": {"SQLALCHEMY_ENGINE_OPTIONS": {"isolation_level": "AUTOCOMMIT"}},
    "the option in small letters": {"SQLALCHEMY_ENGINE_OPTIONS": {"isolation_level": "autocommit"}},
    "an execution option": {"SQLALCHEMY_ENGINE_OPTIONS": {"execution_options": {"isolation_level": "AUTOCOMMIT"}}},
    "the extension's option": {"db": lambda: SQLAlchemy(engine_options={"isolation_level": "AUTOCOMMIT"})},
}


@pytest.mark.parametrize("how", AT_ONCE)
def test_an_autocommit_engine_is_refused_at_binding(hosts: Callable[..., Host], how: str) -> None:
    config = dict(AT_ONCE[how])
    db = config.pop("db", lambda: None)()
    with pytest.raises(InvalidConfig, match=r"are in AUTOCOMMIT: .* expected real transactions\. Take"):
        hosts(db=db, **config).bind()


def test_the_options_of_the_default_bind_are_checked_too(hosts: Callable[..., Host], empty_database_url: str) -> None:
    own = {"url": empty_database_url, "isolation_level": "AUTOCOMMIT"}
    with pytest.raises(InvalidConfig, match="AUTOCOMMIT"):
        hosts(SQLALCHEMY_BINDS={None: own}).bind()


@pytest.mark.parametrize("how", ["a connect listener", "the driver's argument", "the session's option", "set later"])
def test_an_autocommit_session_is_refused_at_the_start_and_keeps_nothing(
    hosts: Callable[..., Host], empty_database_url: str, how: str
) -> None:
    on_sqlite = empty_database_url.startswith("sqlite")
    options: dict[str, Any] = {}
    db = None
    if how == "the driver's argument" and not on_sqlite:
        options = {"SQLALCHEMY_ENGINE_OPTIONS": {"connect_args": {"autocommit": True}}}
    if how == "the session's option":
        db = SQLAlchemy(session_options={"execution_options": {"isolation_level": "AUTOCOMMIT"}})
    host = hosts(db=db, **options)
    host.bind()
    host.create()
    if how in ("a connect listener", "the driver's argument") and not options:  # the engine sets SQLite's own
        set_by_a_listener(host)
    if how == "set later":
        host.engine.update_execution_options(isolation_level="AUTOCOMMIT")
    host.engine.dispose()
    for start in (host.manager.prepare, host.manager.check, host.manager.serve):
        with pytest.raises(InvalidConfig, match="AUTOCOMMIT"):
            start()
    with host.app.app_context(), pytest.raises(InvalidConfig, match="AUTOCOMMIT"):
        host.manager.enqueue("notes", "a message")
    with suppress(InvalidConfig):  # or the log has it
        assert host.manager.tick("noting", NOW).state == "failed"
    assert host.noted() == []


@on_sqlite
def test_a_listener_that_begins_transactions_by_itself_is_not_autocommit(hosts: Callable[..., Host]) -> None:
    """Check the listener by which SQLAlchemy's documentation mends SQLite's savepoints."""
    host = hosts()
    host.bind()
    set_by_a_listener(host)
    event.listen(host.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    host.create()
    host.works()


# -- sessions that send their statements elsewhere -----------------------------------------------


class Routing(Session):
    """Sends reads to a replica, whatever bind is named. Sends writes where the test says."""

    writes: Callable[[SQLAlchemy], Engine] | None = None

    def get_bind(self, mapper: Any = None, clause: Any = None, **more: Any) -> Any:
        if not (self._flushing or isinstance(clause, Insert | Update | Delete)):
            return self._db.engines["replica"]
        return type(self).writes(self._db) if type(self).writes else super().get_bind(mapper, clause=clause, **more)


def routed(hosts: Callable[..., Host], url: str) -> Host:
    Routing.writes = None
    replica = {"url": url, "execution_options": {"is_replica": True}}
    host = hosts(db=SQLAlchemy(session_options={"class_": Routing}), SQLALCHEMY_BINDS={"replica": replica})
    host.bind()
    host.create()
    return host


def test_a_session_that_reads_from_a_replica_is_fenced(hosts: Callable[..., Host], empty_database_url: str) -> None:
    host, refused = routed(hosts, empty_database_url), []

    def lose(context: WorkerContext) -> None:
        context.session.execute(select(text("1")))
        context.lose("the test takes the claim away")
        with pytest.raises(ClaimLost) as caught:
            context.commit()
        refused.append(caught.value)
        context.session.rollback()
        context.refuse_if_lost()

    Noting.then = lose
    assert host.manager.tick("noting", NOW).state == "lost"
    assert refused
    assert host.noted() == []


def test_the_fence_of_a_session_that_reads_from_a_replica_queries_the_main_database(
    hosts: Callable[..., Host], empty_database_url: str
) -> None:
    host = routed(hosts, empty_database_url)

    def take_over(context: WorkerContext) -> None:
        context.session.rollback()
        with host.manager.stores.main.begin() as connection:
            connection.execute(text("UPDATE background_workers SET running = running + 7"))
        context.session.execute(host.notes.insert().values(text="of a zombie"))

    Noting.then = take_over
    assert host.manager.tick("noting", NOW).state == "lost"
    assert host.noted() == []


@pytest.mark.promise
def test_the_engine_works_in_sessions_that_read_from_a_replica(
    hosts: Callable[..., Host], empty_database_url: str
) -> None:
    host = routed(hosts, empty_database_url)
    sent: list[str] = []
    with host.app.app_context():
        replica = host.db.engines["replica"]
    event.listen(replica, "before_cursor_execute", lambda _c, _cursor, statement, *_: sent.append(statement))
    host.works()
    assert [each for each in sent if "background_" in each] == []


@pytest.mark.parametrize("how", ["another engine", "the same engine with other options"])
def test_a_write_to_the_database_by_another_engine_is_refused_before_it_is_sent(
    hosts: Callable[..., Host], empty_database_url: str, how: str
) -> None:
    host = routed(hosts, empty_database_url)
    if how == "another engine":
        Routing.writes = lambda db: db.engines["replica"]
    else:
        Routing.writes = lambda db: db.engine.execution_options(isolation_level="AUTOCOMMIT")
    assert host.manager.tick("noting", NOW).state == "failed"
    (record,) = host.manager.history.executions("noting")
    assert NotFenced.__name__ in record.last_line
    assert "have `get_bind` return db.engine" in record.last_line
    assert host.noted() == []


class ByTenant(Session):
    """Sends everything to the application's engine with the options of a tenant."""

    made: Engine | None = None

    def get_bind(self, mapper: Any = None, clause: Any = None, **more: Any) -> Any:
        if type(self).made is None:
            type(self).made = super().get_bind(mapper, clause=clause, **more).execution_options(tenant="one")
        return type(self).made


@pytest.fixture
def tenants(hosts: Callable[..., Host]) -> Host:
    ByTenant.made = None
    host = hosts(db=SQLAlchemy(session_options={"class_": ByTenant}))
    host.bind()
    host.create()
    return host


@pytest.mark.promise
def test_the_engine_works_in_sessions_with_execution_options_of_their_own(tenants: Host) -> None:
    tenants.works()


def test_a_session_with_execution_options_of_its_own_is_fenced(tenants: Host) -> None:
    def take_over(context: WorkerContext) -> None:
        context.session.rollback()
        with tenants.manager.stores.main.begin() as connection:
            connection.execute(text("UPDATE background_workers SET running = running + 7"))
        context.session.execute(tenants.notes.insert().values(text="of a zombie"))

    Noting.then = take_over
    assert tenants.manager.tick("noting", NOW).state == "lost"
    assert tenants.noted() == []


def test_a_message_in_a_session_with_options_of_its_own_is_rolled_back_with_its_callers_writes(
    tenants: Host,
) -> None:
    with tenants.app.app_context():
        tenants.db.session.execute(tenants.notes.insert().values(text="the caller's"))
        tenants.manager.enqueue("notes", "a message")
        tenants.db.session.rollback()
    assert tenants.noted() == []
    assert tenants.manager.messages.stats()[0].waiting == 0


@pytest.mark.promise
@pytest.mark.parametrize(
    "read", ["/* of: shop */ SELECT 1", "-- of: shop\nSELECT 1", "\n/* a */ -- b\n WITH a AS (SELECT 1) SELECT 1"]
)
def test_a_read_with_a_comment_before_it_goes_to_a_replica(
    hosts: Callable[..., Host], empty_database_url: str, read: str
) -> None:
    host = routed(hosts, empty_database_url)
    Noting.then = lambda context: context.session.execute(text(read))
    assert host.manager.tick("noting", NOW).state == "succeeded"


def test_a_write_with_a_comment_before_it_is_refused_like_any_other(
    hosts: Callable[..., Host], empty_database_url: str
) -> None:
    host = routed(hosts, empty_database_url)
    Noting.then = lambda context: context.session.execute(text("/* SELECT */ INSERT INTO notes (text) VALUES ('a')"))
    assert host.manager.tick("noting", NOW).state == "failed"
    assert host.noted() == []


@pytest.mark.promise
def test_a_run_that_writes_to_a_second_database_is_warned_about_once(
    hosts: Callable[..., Host], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = hosts(SQLALCHEMY_BINDS={"audit": f"sqlite:///{tmp_path / 'audit.sqlite'}"})
    audit = host.db.Table("audit", host.db.Column("text", host.db.String(20)), bind_key="audit")

    def written(context: WorkerContext) -> None:
        context.session.execute(select(audit), bind_arguments={"bind": second})
        context.session.execute(audit.insert().values(text="a tick"))
        context.session.execute(text("WITH a AS (SELECT 1) SELECT * FROM a"), bind_arguments={"bind": second})

    host.bind()
    host.create()
    with host.app.app_context():
        second = host.db.engines["audit"]
    Noting.then = written
    with caplog.at_level(logging.WARNING, logger="background"):
        for _ in range(3):
            assert host.manager.trigger("noting").state == "succeeded"
    warned = [each.getMessage() for each in caplog.records if "second database" in each.getMessage()]
    assert len(warned) == 1
    assert "noting wrote to the second database" in warned[0]
    assert "audit.sqlite" in warned[0]


# -- a server that isolates strictly -----------------------------------------------------------


@pytest.mark.promise
@on_postgresql
@pytest.mark.parametrize("level", ["serializable", "repeatable read"])
def test_ticks_heartbeats_messages_and_locks_work_on_a_server_with_strict_isolation(
    hosts: Callable[..., Host], empty_database_url: str, postgresql_server: Any, level: str
) -> None:
    name = make_url(empty_database_url).database
    administer(postgresql_server, f"ALTER DATABASE {name} SET default_transaction_isolation TO '{level}'")
    host, seen = hosts(), []
    host.bind()
    host.create()

    def outlasted(context: WorkerContext) -> None:
        """Have a skipped tick change the worker's row meanwhile, as when a run is still on at its next tick."""
        seen.append(context.session.scalar(text("SHOW transaction_isolation")))
        with host.manager.stores.main.begin() as connection:
            connection.execute(text("UPDATE background_workers SET scheduled_at = scheduled_at"))
            seen.append(connection.scalar(text("SHOW transaction_isolation")))

    Noting.then = outlasted
    host.works()
    assert set(seen) == {"read committed"}
    with host.manager.stores.leases.single.connect() as connection:
        assert connection.scalar(text("SHOW transaction_isolation")) == "read committed"
    with host.app.app_context():  # the application's own sessions have the server's default
        assert host.db.session.scalar(text("SHOW transaction_isolation")) == level


@on_postgresql
def test_an_isolation_level_that_the_application_chose_applies_to_its_runs_and_is_warned_about_once(
    hosts: Callable[..., Host], caplog: pytest.LogCaptureFixture
) -> None:
    host, seen = hosts(SQLALCHEMY_ENGINE_OPTIONS={"isolation_level": "REPEATABLE READ"}), []
    host.bind()
    host.create()
    Noting.then = lambda context: seen.append(context.session.scalar(text("SHOW transaction_isolation")))
    assert host.manager.tick("noting", NOW).state == "succeeded"
    assert host.manager.trigger("noting").state == "succeeded"
    assert seen == ["repeatable read"] * 2
    (warned,) = [each.getMessage() for each in caplog.records if "run at" in each.getMessage()]
    assert "run at REPEATABLE READ. There a run fails if the row of its worker changes meanwhile" in warned
    with host.manager.stores.main.begin() as connection:
        assert connection.scalar(text("SHOW transaction_isolation")) == "read committed"


# -- a caller that would wait for itself ---------------------------------------------------------

CALLS: dict[str, Callable[[BackgroundWorkerManager], object]] = {
    "tick": lambda manager: manager.tick("noting", NOW),
    "trigger": lambda manager: manager.trigger("noting"),
    "request": lambda manager: manager.request("noting"),
    "pause": lambda manager: manager.pause("noting"),
    "resume": lambda manager: manager.resume("noting"),
    "reschedule": lambda manager: manager.reschedule("noting", period=timedelta(hours=2)),
    "messages.retry": lambda manager: manager.messages.retry(None),
    "messages.discard": lambda manager: manager.messages.discard(None),
}


def refused_at_once(host: Host, call: str) -> str:
    began = time.monotonic()
    with pytest.raises(CommitFirst) as caught:
        CALLS[call](host.manager)
    assert time.monotonic() - began < 2
    assert "call db.session.commit() first, or in a run context.commit()" in str(caught.value)
    return str(caught.value)


@on_sqlite
@pytest.mark.parametrize("call", CALLS)
def test_a_call_after_an_uncommitted_write_is_refused_at_once(hosts: Callable[..., Host], call: str) -> None:
    host = hosts()
    host.bind()
    host.create()
    with host.app.app_context():
        host.db.session.execute(host.notes.insert().values(text="not committed"))
        assert call in refused_at_once(host, call)
        host.db.session.commit()
        CALLS[call](host.manager)
        host.db.session.execute(select(host.notes)).all()
        CALLS[call](host.manager)  # a read blocks nothing
    with host.engine.begin() as connection:  # another session of the thread may have written
        connection.execute(host.notes.insert().values(text="not committed"))
        refused_at_once(host, call)
    assert "not committed" in host.noted()


@pytest.mark.promise
@pytest.mark.parametrize("call", ["tick", "trigger"])
def test_no_worker_runs_amid_a_transaction_whose_rows_it_could_wait_for(hosts: Callable[..., Host], call: str) -> None:
    host = hosts()
    host.bind()
    host.create()
    with host.app.app_context():
        host.db.session.execute(host.notes.insert().values(text="not committed"))
        refused_at_once(host, call)
        host.db.session.commit()
        assert CALLS[call](host.manager).state == "succeeded"


@pytest.mark.promise
@on_postgresql
@pytest.mark.parametrize("call", [each for each in CALLS if "messages" not in each])
def test_a_call_that_needs_a_row_of_its_caller_is_refused_within_a_second(
    hosts: Callable[..., Host], call: str
) -> None:
    host = hosts()
    host.bind()
    host.create()
    host.manager.reschedule("noting", period=timedelta(hours=3))
    if call == "resume":
        host.manager.pause("noting")
    with host.app.app_context():
        host.db.session.execute(text("SELECT * FROM background_workers FOR UPDATE"))
        refused_at_once(host, call)


@on_sqlite
def test_a_worker_that_runs_another_worker_amid_its_own_writes_is_told_to_commit_first(
    hosts: Callable[..., Host],
) -> None:
    host = hosts()
    host.bind()
    host.create()
    said: list[str] = []

    def ask(context: WorkerContext) -> None:
        said.append(refused_at_once(host, "messages.retry"))
        context.commit()
        assert host.manager.request("prune_history_worker")

    Noting.then = ask
    assert host.manager.tick("noting", NOW).state == "succeeded"
    assert said


@pytest.mark.parametrize(
    ("raised", "cuts_off"),
    [
        (psycopg.OperationalError("connection refused"), True),
        (psycopg.errors.AdminShutdown("terminating connection due to administrator command"), True),
        (psycopg.errors.InvalidPassword("password authentication failed"), False),
    ],
    ids=["refused", "ended", "no login"],
)
def test_a_connection_that_the_server_ends_while_it_is_opened_cuts_a_run_off(raised: Exception, cuts_off: bool) -> None:
    def opened() -> None:
        raise raised

    with pytest.raises(OperationalError) as caught:
        create_engine("postgresql+psycopg://", creator=opened).connect()
    assert is_cut_off(caught.value) == cuts_off
