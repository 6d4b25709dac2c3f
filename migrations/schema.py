"""Checks that the database fits this release, before the workers of a serving process start.

Without DATABASE_URL, `ensure_ready` makes the embedded file or brings it up to date. With DATABASE_URL it changes
nothing. `DatabaseNotReady` names the fault and the command that repairs it.
"""

import logging
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flask import current_app
from sqlalchemy import URL, Connection, Engine, Table, inspect, text
from sqlalchemy.exc import DBAPIError

from background.database import tables
from background.database.dialects.error_codes import (
    is_busy,
    is_database_unknown,
    is_of_another_schema,
    is_of_storage,
)
from background.database.dialects.sqlite_files import make_private
from background.errors import DatabaseNotReady, shortened
from background.host.logs import Outage

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

logger = logging.getLogger(__name__)

LOCK_SECONDS = 30
"""The longest wait of a start for another process: for the lock of the preparation, or SQLite's write lock."""

UNRELEASED = ("0001", "0002", "0003", "0004", "0005", "0006")
"""The revisions before 0.1.0. The last one has the tables of SAME_AS_UNRELEASED."""
SAME_AS_UNRELEASED = "1002"

Fill = Callable[[Connection], None]


def ensure_ready(fill: Fill | None = None) -> None:
    """Prepare the embedded database, or check the database of DATABASE_URL. Needs an application context.

    `fill` writes the first content of a new embedded database, in the transaction that makes its tables.
    """
    engine = current_app.extensions["sqlalchemy"].engine
    if current_app.config["DATABASE_IS_TEMPORARY"] and inspect(engine).has_table("users"):
        return  # by `db.create_all()`, as in a test: such a database is never migrated
    if current_app.config["DATABASE_IS_EMBEDDED"]:
        _prepare(engine, fill)
    else:
        _check(engine)


def check() -> None:
    """Raise DatabaseNotReady for each fault that `ensure_ready` finds or repairs. Needs an application context."""
    _check(current_app.extensions["sqlalchemy"].engine)


def upgrade(finish: Fill | None = None) -> None:
    """Run the pending migrations, then `finish` in the same transaction. Needs an application context."""
    from alembic import command

    config = _config()
    config.attributes["finish"] = finish
    command.upgrade(config, "head")


def _check(engine: Engine) -> None:
    found = _found_revision(engine)
    if found is None:
        raise DatabaseNotReady(
            f"The database {_shown(engine.url)} has no schema; expected the tables of this release. "
            f"Make them with `flask db upgrade`."
        )
    _compare(engine, found)


def _prepare(engine: Engine, fill: Fill | None) -> None:
    """Make the schema and the first content, once.

    Concurrency: several processes may start at once. The first one prepares, the others wait and find it done. Schema
    and first content are one transaction, so a process that is killed here leaves nothing behind.
    """
    path = Path(str(engine.url.database))
    with writing(engine.url), _lock(path.parent / ".prepare.sqlite", path):
        found = _found_revision(engine) if path.exists() else None
        if found is None:
            upgrade(fill)
        elif _is_behind(found):
            logger.info("Bringing %s from revision %s to %s.", engine.url.database, found, _head())
            upgrade()
        else:
            _compare(engine, found)


def _compare(engine: Engine, found: str) -> None:
    head = _head()  # reads all migrations
    if _is_behind(found):
        raise DatabaseNotReady(
            f"The database {_shown(engine.url)} is at revision {found}, behind this release's {head}. "
            f"Bring it up to date with `flask db upgrade`."
        )
    with reaching(engine.url), engine.connect() as connection:
        missing = _missing(connection, tables.metadata.tables)  # the first migration makes them
    if missing:
        raise DatabaseNotReady(
            f"The database {_shown(engine.url)} is at revision {found} by its record, but lacks {missing}. Correct "
            "DATABASE_URL, or record the true revision with `flask db stamp --purge` and run `flask db upgrade`."
        )
    if found != head:
        _warn(
            f"The database is at revision {found}, which this release ({head}) does not know: a newer release made it."
        )


def _found_revision(engine: Engine) -> str | None:
    """Return the revision of the database. None if it has no tables yet."""
    if engine.dialect.name == "sqlite" and not Path(str(engine.url.database)).exists():
        command = "flask run" if current_app.config["DATABASE_IS_EMBEDDED"] else "flask db upgrade"
        raise DatabaseNotReady(f"The database file {engine.url.database} does not exist. Make it with `{command}`.")
    with reaching(engine.url), engine.connect() as connection:
        return _read_revision(connection)


def _read_revision(connection: Connection) -> str | None:
    if inspect(connection).has_table("alembic_version"):  # on any schema of the search path, as Alembic looks
        found: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
        if found is not None:
            refuse_unreleased(connection.engine.url, found)
            return found
    if "users" in inspect(connection).get_table_names():
        _accept_without_record(connection)
        return _head()
    return None


def refuse_unreleased(url: URL, found: str | None) -> None:
    """Raise DatabaseNotReady for a database that the migrations before 0.1.0 made."""
    if found not in UNRELEASED:
        return
    raise DatabaseNotReady(
        f"The database {_shown(url)} is at revision {found} of the migrations before 0.1.0; expected "
        f"{UNRELEASED[-1]}: reach that with the version that made the database, back it up, and record it with "
        f"`flask db stamp --purge {SAME_AS_UNRELEASED}`."
    )


def _accept_without_record(connection: Connection) -> None:
    """Accept a database that has all tables but no revision, as `db.create_all()` leaves it."""
    if missing := _missing(connection, current_app.extensions["sqlalchemy"].metadata.tables):
        raise DatabaseNotReady(
            f"The database {_shown(connection.engine.url)} has tables but no record of its migrations, "
            f"and lacks {missing}. If its revision is known, record it with `flask db stamp`. "
            f"If the data has no value, delete the database and run `flask db upgrade`."
        )
    _warn("The database has no record of its migrations. If it is up to date, run `flask db stamp head`.")


def _missing(connection: Connection, tables: Mapping[str, Table]) -> str:
    """Return the names of the `tables` that the database lacks."""
    inspector = inspect(connection)
    there = set(inspector.get_table_names())  # in one query, for the usual case that all are there
    return ", ".join(
        name
        for name, table in sorted(tables.items())
        if not (name in there or inspector.has_table(table.name, table.schema))
    )


def _warn(sentence: str) -> None:
    """Log the sentence as a warning, once in the life of the application. Each probe of /health/ready comes here."""
    outages = current_app.extensions.setdefault("schema", defaultdict(Outage))
    logger.log(outages[sentence].level(), "%s", sentence)


@contextmanager
def reaching(url: URL) -> Iterator[None]:
    """Raise DatabaseNotReady, with the remedy, for an error of the database's driver in the block."""
    try:
        yield
    except DBAPIError as error:
        raise DatabaseNotReady(_why_not(url, error)) from None


@contextmanager
def writing(url: URL) -> Iterator[None]:
    """Raise DatabaseNotReady for a file that cannot be written, and for tables that the migrations do not expect."""
    try:
        yield
    except DBAPIError as error:
        if is_of_storage(error):
            raise DatabaseNotReady(_why_not(url, error)) from None
        if is_of_another_schema(error):
            raise DatabaseNotReady(_misfit(url, error)) from None
        raise
    except (OSError, sqlite3.Error) as error:
        raise DatabaseNotReady(
            f"The folder of the database file {url.database} cannot be used ({error}); expected a folder that this "
            "process can write to. Make it writable, or set DATABASE_URL."
        ) from None


def _misfit(url: URL, error: DBAPIError) -> str:
    statement = " ".join(str(error.statement).split())
    return (
        f"The database {_shown(url)} does not fit its recorded revision, so nothing was changed: {_reason(url, error)} "
        f"({shortened(statement, 60)}). Record the true revision with `flask db stamp`, or use an empty database."
    )


def _why_not(url: URL, error: DBAPIError) -> str:
    reason = _reason(url, error)
    if url.get_backend_name() == "sqlite":
        folder = Path(str(url.database)).parent
        if not folder.is_dir():
            return f"The folder {folder} of the database file does not exist: make it, or correct DATABASE_URL."
        if "locked" in reason:
            return (
                f"The database file {url.database} cannot be used ({reason}): another process keeps it locked. "
                f"End that process (`fuser {url.database}` shows it), and try again."
            )
        return (
            f"The database file {url.database} cannot be used ({reason}); expected a SQLite database, and room on disk."
        )
    if is_database_unknown(error) or f'database "{url.database}" does not exist' in reason:
        return (
            f"The database {_shown(url)} does not exist on its server. "
            f"Create it with `{_createdb(url)}`, then its tables with `flask db upgrade`."
        )
    return (
        f"The database {_shown(url)} cannot be reached ({reason}). "
        f"Start its server or correct DATABASE_URL, and try again."
    )


def _reason(url: URL, error: DBAPIError) -> str:
    reason = (str(error.orig).strip() or "no reason given").splitlines()[0]
    return reason.replace(f":{url.password}@", ":***@") if url.password else reason


def _shown(url: URL) -> str:
    """Return the URL as an operator writes it, without the password and the additions of `config.py`."""
    return str(url.set(drivername=url.get_backend_name()).difference_update_query(["connect_timeout"]))


def _createdb(url: URL) -> str:
    options = {"-h": url.host or url.query.get("host"), "-p": url.port, "-U": url.username}
    return " ".join(["createdb", *(f"{name} {value}" for name, value in options.items() if value), str(url.database)])


@contextmanager
def _lock(path: Path, database: Path) -> Iterator[None]:
    """Hold the lock at `path`. Raise DatabaseNotReady if another process keeps it for LOCK_SECONDS.

    It is the lock of a database without tables, as SQLite can lock files on every system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    make_private(str(path), like=str(database))
    with closing(sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if not is_busy(error):
                raise
            raise DatabaseNotReady(
                f"Another process has kept the lock {path} for {LOCK_SECONDS} s ({error}); expected it to "
                f"prepare {database} within that time. Wait until it ends, or end it (`fuser {path}` shows it), and "
                "start again."
            ) from None
        yield


def _head() -> str | None:
    return _scripts().get_current_head()


def _is_behind(found: str) -> bool:
    """Return whether this release knows the revision, and has a newer one. A newer release made an unknown one."""
    scripts = _scripts()
    return found != scripts.get_current_head() and found in {each.revision for each in scripts.walk_revisions()}


def _scripts() -> "ScriptDirectory":
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(_config())


def _config() -> "Config":
    from alembic.config import Config

    folder = Path(__file__).parent
    config = Config(folder / "alembic.ini")
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    return config
