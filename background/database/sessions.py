"""The engine's statements in the application's sessions, and settings of sessions that the engine refuses."""

from typing import Any

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import URL, Connection, Engine, Executable, event, update
from sqlalchemy.orm import Session

from ..errors import InvalidConfig, NotFenced
from ..host.logs import logger_of
from .dialects.writes import is_write
from .outages import place
from .tables import workers

log = logger_of(__name__)

_READ_COMMITTED = 2  # of psycopg's IsolationLevel


class Within:
    """The engine's statements in one session. They use the database and the schema of the engine's tables."""

    def __init__(self, session: Session, engine: Engine, schema: str | None) -> None:
        # Not `session.execute`: it asks `get_bind`, which may send a SELECT to a replica.
        self._connection = session.connection(bind_arguments={"bind": home(session, engine)})
        refuse_autocommit(self._connection)
        self._options = {"schema_translate_map": {None: schema} if schema else {}, "stream_results": False}

    def execute(self, statement: Executable, parameters: Any = None, /) -> Any:
        return self._connection.execute(statement, parameters, execution_options=self._options)

    def get_execution_options(self) -> dict[str, Any]:
        return self._options


Executes = Connection | Within

_A_WRITE = update(workers)


def home(session: Session, engine: Engine) -> Engine:
    """Return the SQLAlchemy engine to which `session` writes: `engine`, or a copy of it with other options.

    A session class may give each tenant such a copy. Two copies in one session would be two transactions.
    """
    try:
        found: Any = session.get_bind(clause=_A_WRITE)
    except Exception:  # the class needs more, such as a request
        return engine
    return found if isinstance(found, Engine) and found.pool is engine.pool else engine


class Sessions:
    """Adds the engine's statements to the sessions of one application, and guards its runs' sessions."""

    def __init__(self, engine: Engine, schema: str | None) -> None:
        self.engine = engine
        self._schema = schema
        self.is_strict = False
        """True if the server isolates more strictly than READ COMMITTED by default."""
        self._warned: set[tuple[str, str]] = set()
        self._has_warned_of_strictness = False

    def within(self, session: Session, engine: Engine | None = None) -> Within:
        """Return the engine's statements in `session`. Raises InvalidConfig if each would commit separately.

        Pass `engine` for the session of another application on the same database.
        """
        return Within(session, self.engine if engine is None else engine, self._schema)

    def begin(self, connection: Connection) -> None:
        """Begin a run's transaction. Refuse AUTOCOMMIT, and use READ COMMITTED if the server's default is stricter.

        An isolation level that the application chose stays. The log warns of a stricter level once.
        """
        refuse_autocommit(connection)
        if connection.dialect.name == "sqlite":
            return
        driver: Any = connection.connection.driver_connection
        chosen = driver.isolation_level
        if chosen is None and self.is_strict:
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
        if chosen is not None and chosen > _READ_COMMITTED and not self._has_warned_of_strictness:
            self._has_warned_of_strictness = True
            log.warning(
                "The application's sessions run at %s. There a run fails if the row of its worker changes meanwhile: "
                "by a tick that falls during the run, a pause or a request. Prefer READ COMMITTED for runs",
                chosen.name.replace("_", " "),
            )

    def watch(self, connection: Connection, worker: str) -> None:
        """Watch a run's statements on a `connection` that the fence does not guard.

        Reads are allowed. A write to the same database is refused, because no check of the claim would guard it. The
        first write to another database is logged as a warning.
        """
        url = connection.engine.url

        @event.listens_for(connection, "before_cursor_execute")
        def sending(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            if not is_write(statement):
                return
            if place(url) == place(self.engine.url):
                raise NotFenced(
                    f"The run of {worker!r} writes to {url} by another engine or connection than db.engine, so no "
                    "check of its claim would guard the write; expected its writes on db.engine: have `get_bind` "
                    "return db.engine for every statement that is not a read."
                )
            if (worker, str(url)) not in self._warned:
                self._warned.add((worker, str(url)))
                log.warning(
                    "%s wrote to the second database %s, which is not part of the run's transaction: its commit is "
                    "neither fenced nor part of the outcome's transaction. Make this write idempotent",
                    worker,
                    url,
                )


def schema_of(db: SQLAlchemy) -> str | None:
    """Return the schema of the engine's tables: the schema of the application's MetaData, after translation."""
    translated: dict[str | None, str | None] = {}
    for options in (db.engine.get_execution_options(), db.session.session_factory.kw.get("execution_options") or {}):
        translated |= options.get("schema_translate_map") or {}
    return translated.get(db.metadata.schema, db.metadata.schema)


# -- AUTOCOMMIT --------------------------------------------------------------------------------


def refuse_autocommit_options(engine: Engine) -> None:
    """Raise InvalidConfig for an engine that commits each statement. Opens no connection."""
    # The second value is the `isolation_level` of `create_engine`, which has no public name.
    levels = (
        engine.get_execution_options().get("isolation_level"),
        getattr(engine.dialect, "_on_connect_isolation_level", None),
    )
    if any(str(each).replace("_", " ").strip().upper() == "AUTOCOMMIT" for each in levels):
        raise autocommit_refused(engine.url)


def refuse_autocommit(connection: Connection) -> None:
    """Raise InvalidConfig if `connection` commits each statement. Sends no statement."""
    if commits_each_statement(connection):
        raise autocommit_refused(connection.engine.url)


def commits_each_statement(connection: Connection) -> bool:
    """Return whether `connection` is in AUTOCOMMIT, and no `begin` listener has begun a transaction."""
    driver: Any = connection.connection.driver_connection
    if connection.dialect.name == "sqlite":
        # Since Python 3.12, `autocommit` may be a bool. It then overrides `isolation_level`.
        setting = getattr(driver, "autocommit", None)
        commits = driver.isolation_level is None if not isinstance(setting, bool) else setting
        return bool(commits and not driver.in_transaction)
    return bool(driver.autocommit and driver.info.transaction_status == 0)


def autocommit_refused(url: URL) -> InvalidConfig:
    """Return the error for a database whose statements are not one transaction."""
    return InvalidConfig(
        f"The application's sessions on {url} are in AUTOCOMMIT: each statement is committed at once, so a run's "
        "effects and its outcome cannot be one transaction; expected real transactions. Take AUTOCOMMIT out of the "
        "engine's options, its connect_args, its `connect` listeners and the session's options."
    )
