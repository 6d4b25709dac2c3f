"""The other clients of the soak do what the soak's table says."""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from random import Random

import psycopg
import pytest
from sqlalchemy import create_engine, make_url
from sqlalchemy.pool import NullPool
from support.databases import on_postgresql, on_sqlite

from background.database.notifications import CHANNEL
from benchmarks.soak_clients import ODD_TOPICS, Clients, ClientsOfPostgresql, ClientsOfSqlite

PATIENCE_SECONDS = 20


@pytest.fixture
def clients(database_url: str) -> Iterator[Clients]:
    url = make_url(database_url)
    if url.drivername == "sqlite":
        clients: Clients = ClientsOfSqlite(Path(url.database or ""))
    else:
        engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        clients = ClientsOfPostgresql(engine, url, Path())
    yield clients
    clients.close()
    assert clients.problems == []


def becomes_true(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def plain(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


@on_sqlite  # the tests' server is newer than the pg_dump of the soak's server
def test_a_whole_backup_is_counted(clients: Clients) -> None:
    clients.backup(Random(1))
    clients.close()
    assert clients.backups == 1


@on_sqlite
def test_a_transaction_on_sqlite_keeps_the_log_from_being_reset(clients: ClientsOfSqlite, database_url: str) -> None:
    def is_in_the_way() -> bool:
        writer.execute("INSERT INTO written DEFAULT VALUES")
        return bool(writer.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()[0])

    with closing(sqlite3.connect(make_url(database_url).database, timeout=0, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("CREATE TABLE written (id INTEGER PRIMARY KEY)")
        clients.transaction(Random(1))
        assert becomes_true(is_in_the_way)
        clients.close()
        assert not is_in_the_way()


@on_postgresql
def test_a_transaction_on_postgresql_keeps_its_snapshot(clients: ClientsOfPostgresql, database_url: str) -> None:
    held = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND state = 'idle in transaction' AND backend_xmin IS NOT NULL"
    )
    with psycopg.connect(plain(database_url), autocommit=True) as other:
        clients.transaction(Random(1))
        assert becomes_true(lambda: other.execute(held).fetchone() == (1,))
        clients.close()
        assert other.execute(held).fetchone() == (0,)


@on_postgresql
def test_a_storm_has_topics_that_no_worker_has(clients: ClientsOfPostgresql, database_url: str) -> None:
    with psycopg.connect(plain(database_url), autocommit=True) as listening:
        listening.execute(f"LISTEN {CHANNEL}")
        clients.storm(Random(1))
        heard = {notice.payload for notice in listening.notifies(timeout=PATIENCE_SECONDS, stop_after=2_000)}
    assert {"", "letters", *ODD_TOPICS} < heard
    assert len(heard) > 1_000
