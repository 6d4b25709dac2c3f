"""A pooler before PostgreSQL that gives each transaction any free connection: no state may stay on a connection."""

import signal
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from sqlalchemy import create_engine, make_url
from sqlalchemy import text as sql
from sqlalchemy.pool import NullPool
from support.databases import text
from support.fleet import PATIENCE, make_app, stop
from support.fork_server import Nursery
from support.processes import eventually, margin
from support.run_traces import Effects
from support.servers import PGBOUNCER, pooler

CONNECTIONS = 2
LEASE = 1.5
PERIOD = timedelta(seconds=1)

pytestmark = pytest.mark.skipif(PGBOUNCER is None, reason="needs pgbouncer")


@pytest.fixture
def effects(postgresql_url: str) -> Effects:
    return Effects(postgresql_url)


@pytest.fixture
def pooled(postgresql_url: str) -> Iterator[str]:
    """Give the URL of the test's database behind the pooler."""
    with pooler(make_url(postgresql_url), CONNECTIONS) as url:
        yield text(url)


def test_the_engine_works_behind_a_transaction_mode_pooler(nursery: Nursery, pooled: str, effects: Effects) -> None:
    more = {"PROBE_PERIOD": PERIOD.total_seconds()}
    with nursery.started(pooled, **more) as one, nursery.started(pooled, **more) as other:
        for process in (one, other):
            process.wait_for("joined")
        assert eventually(lambda: len(effects.ticks()) >= 4)
        assert_nothing_is_left_on_its_connections(pooled)
        for process in (one, other):
            process.signal(signal.SIGTERM)
            assert process.wait() == 0
            assert "WARNING" not in process.output
            assert "ERROR" not in process.output
    effects.check_answered(PERIOD)


def assert_nothing_is_left_on_its_connections(pooled: str) -> None:
    """Check that no connection of the pooler keeps a setting or a prepared statement."""
    limits = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout")
    engine = create_engine(pooled, poolclass=NullPool, connect_args={"prepare_threshold": None})
    seen = set()
    for _ in range(20):
        with engine.connect() as connection:
            seen.add(connection.scalar(sql("SELECT pg_backend_pid()")))
            assert [connection.scalar(sql(f"SHOW {name}")) for name in limits] == ["0", "0", "0"]
            assert connection.scalar(sql("SHOW default_transaction_isolation")) == "read committed"
            assert connection.scalar(sql("SELECT count(*) FROM pg_prepared_statements")) == 0
    assert len(seen) <= CONNECTIONS


def test_behind_a_pooler_a_killed_process_is_taken_over(nursery: Nursery, pooled: str, effects: Effects) -> None:
    more = {"PROBE_WORKERS": "listener", "WORKERS_LEASE_SECONDS": LEASE}
    with nursery.started(pooled, **more) as one:
        one.wait_for("The listener began")
        with nursery.started(pooled, PROBE_SECONDS=0.1, **more) as other:
            other.wait_for("joined")
            one.signal(signal.SIGKILL)
            killed = time.monotonic()
            assert eventually(lambda: effects.ticks("listener"))
            assert time.monotonic() - killed < LEASE + 1 + margin()
    assert effects.states("listener") == [("lost", 1), ("succeeded", 2)]
    effects.check_once("listener")


def test_a_lock_is_held_and_released_behind_a_pooler(pooled: str) -> None:
    joined, alone = make_app(pooled), make_app(pooled)
    one, other = (app.extensions["background_workers"] for app in (joined, alone))
    one.start()
    assert eventually(lambda: one.presence.instance)
    for held in range(1, 10, 2):
        with one.lock("invoice-42") as lock, other.lock("invoice-42") as refused:
            assert (lock.token, lock.still_held(), refused) == (held, True, None)
        with other.lock("invoice-42", timeout=PATIENCE) as lock, one.lock("invoice-42") as refused:
            assert (lock.token, lock.still_held(), refused) == (held + 1, True, None)
    assert_nothing_is_left_on_its_connections(pooled)
    stop(joined, alone)
