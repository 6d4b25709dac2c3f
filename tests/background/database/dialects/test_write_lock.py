"""The connections that wait for SQLite's write lock, as other processes see them."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from sqlalchemy import Connection, insert, text
from sqlalchemy.exc import OperationalError
from support.fleet import PATIENCE, Fleet, effects, wait_until

from background.database.dialects import sqlite, write_lock
from background.database.dialects.writes import changes_rows

A_NOTE = {"key": "a key", "note": "a note"}
ASK = "import runpy, sys; print(runpy.run_path(sys.argv[1])['is_awaited'](sys.argv[2]))"


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    return sqlite_url


@pytest.fixture
def path(fleet: Fleet) -> str:
    return str(fleet.engine.url.database)


def is_awaited(path: str) -> bool:
    return write_lock.is_awaited(os.path.dirname(path))


def is_awaited_elsewhere(path: str) -> bool:
    """Ask in another process."""
    command = [sys.executable, "-c", ASK, write_lock.__file__, os.path.dirname(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True\n"


def write(connection: Connection) -> None:
    connection.execute(insert(effects).values(A_NOTE))


def write_by_cte(connection: Connection) -> None:
    connection.execute(
        text("WITH one AS (SELECT 'a note' AS note) INSERT INTO effects (key, note) SELECT note, note FROM one")
    )


def write_in_a_savepoint(connection: Connection) -> None:
    with connection.begin_nested():
        write(connection)


def lock(connection: Connection) -> None:
    assert sqlite.lock_soon(connection, PATIENCE)


@pytest.mark.parametrize("take", [write, write_by_cte, write_in_a_savepoint, lock])
def test_a_connection_is_seen_for_as_long_as_it_waits(
    fleet: Fleet, path: str, take: Callable[[Connection], None]
) -> None:
    def waiting() -> None:
        with fleet.engine.begin() as connection:
            take(connection)

    with closing(sqlite3.connect(path, isolation_level=None)) as other, ThreadPoolExecutor(1) as beside:
        other.execute("BEGIN IMMEDIATE")
        try:
            assert not is_awaited(path)
            waits = beside.submit(waiting)
            wait_until(lambda: is_awaited(path), "the connection that waits")
            assert is_awaited_elsewhere(path)
        finally:
            other.rollback()
        waits.result(PATIENCE)
        assert not is_awaited(path)
        assert not is_awaited_elsewhere(path)


def test_a_connection_that_has_the_lock_does_not_count_as_waiting(fleet: Fleet, path: str) -> None:
    with fleet.engine.begin() as connection:
        write(connection)
        write(connection)
        assert not is_awaited(path)
    with fleet.engine.connect() as connection:
        assert connection.execute(effects.select()).all()
        assert not is_awaited(path)


def test_a_write_that_waits_in_vain_raises_the_usual_error(fleet: Fleet, path: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other, fleet.engine.connect() as connection:
        other.execute("BEGIN IMMEDIATE")
        connection.connection.driver_connection.execute("PRAGMA busy_timeout = 0")  # type: ignore[union-attr]
        with pytest.raises(OperationalError, match="database is locked"):
            write(connection)
        other.rollback()
        assert not is_awaited(path)
        connection.rollback()
        write(connection)
        connection.commit()
    assert fleet.effects() == ["a note"]


def test_a_folder_that_cannot_be_locked_counts_as_awaited_and_lets_connections_write() -> None:
    assert write_lock.is_awaited("/no such folder")
    with write_lock.waiting("/no such folder"), write_lock.waiting(None):
        pass


@pytest.mark.parametrize("statement", ["INSERT INTO t", "  /* why */ update t", "REPLACE INTO t", "WITH a DELETE"])
def test_a_statement_that_changes_rows_begins_a_transaction(statement: str) -> None:
    assert changes_rows(statement)


@pytest.mark.parametrize("statement", ["SELECT 'insert'", "PRAGMA x", "CREATE TABLE t", "VACUUM", "WITH a SELECT 1"])
def test_another_statement_begins_none(statement: str) -> None:
    assert not changes_rows(statement)
