"""A database that goes away, hangs, loses a reply or refuses: in doubt no tick runs, and the next tick runs."""

import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import URL, create_engine
from sqlalchemy import text as sql
from sqlalchemy.pool import NullPool
from support.databases import administer, text
from support.fleet import PATIENCE, make_app, stop, wait_until
from support.fork_server import Nursery
from support.processes import margin
from support.proxy import Proxy
from support.run_traces import Effects, leave
from support.servers import PostgreSQL
from support.shop import migrate

from background import BackgroundWorkerManager, ClaimLost, PeriodicWorker, WorkerContext

PERIOD = timedelta(seconds=0.5)
RARELY = timedelta(days=366)  # none of its ticks falls due during a test
LEASE = 1.5

Join = Callable[..., BackgroundWorkerManager]


class Ticker(PeriodicWorker):
    period = PERIOD

    def do_work(self, context: WorkerContext) -> None:
        leave(context, os.getpid())


class Daily(PeriodicWorker):
    """Leaves its effect, and waits for the test before it ends."""

    period = RARELY
    run_on_first_start = True
    began: threading.Semaphore
    go_on: threading.Event

    def do_work(self, context: WorkerContext) -> None:
        leave(context, os.getpid())
        self.began.release()
        assert self.go_on.wait(PATIENCE)


@pytest.fixture
def daily() -> type[Daily]:
    return type("Daily", (Daily,), {"began": threading.Semaphore(0), "go_on": threading.Event()})


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSQL]:
    server = PostgreSQL(migrate)
    yield server
    server.close()


@pytest.fixture
def url(server: PostgreSQL) -> URL:
    return server.database()


@pytest.fixture
def proxy(url: URL, join: Join) -> Iterator[Proxy]:  # closed before the instances, so that no instance hangs in it
    proxy = Proxy(url)
    yield proxy
    proxy.close()


@pytest.fixture
def effects(url: URL) -> Effects:
    return Effects(text(url))


@pytest.fixture
def join() -> Iterator[Join]:
    """Start another instance in this process, on the database of the URL."""
    apps = []

    def start(url: URL | str, *workers: type[PeriodicWorker], **config: Any) -> BackgroundWorkerManager:
        name = url if isinstance(url, str) else text(url)
        quick = {"WORKERS_LEASE_SECONDS": LEASE, "WORKERS_SHUTDOWN_SECONDS": 2}
        apps.append(make_app(name, *workers, **quick | config))
        manager: BackgroundWorkerManager = apps[-1].extensions["background_workers"]
        manager.start()
        return manager

    yield start
    stop(*apps)


def runs_on(effects: Effects, more: int = 2) -> None:
    count = len(effects.ticks())
    wait_until(lambda: len(effects.ticks()) >= count + more, f"{more} more runs")


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restart_of_the_database_in_mid_run_is_a_lost_attempt_and_the_tick_is_run_again(
    server: PostgreSQL, url: URL, effects: Effects, join: Join, daily: type[Daily], mode: str
) -> None:
    for _ in range(2):
        join(url, daily, Ticker, WORKERS_LEASE_SECONDS=PATIENCE)  # longer than a restart
    assert daily.began.acquire(timeout=PATIENCE)
    runs_on(effects, 1)
    server.stop(mode)
    server.start()
    daily.go_on.set()
    wait_until(lambda: effects.all("daily"), "the second attempt")
    assert effects.states("daily") == [("lost", 1), ("succeeded", 2)]
    assert [effect.attempt for effect in effects.check_once("daily")] == [2]
    runs_on(effects)
    effects.check_answered(PERIOD)


def test_nothing_is_claimed_while_the_database_is_away_and_the_next_tick_runs_when_it_is_back(
    server: PostgreSQL, url: URL, effects: Effects, join: Join
) -> None:
    managers = [join(url, Ticker) for _ in range(2)]
    runs_on(effects)
    server.stop("immediate")
    away, back = datetime.now(UTC), time.monotonic() + 2 * PERIOD.total_seconds()
    wait_until(lambda: time.monotonic() > back, "two ticks")
    server.start()
    runs_on(effects)
    assert all(manager.presence.instance is not None for manager in managers)
    effects.check_answered(PERIOD)
    assert not [tick for tick in effects.ticks() if away + PERIOD < tick < away + 1.5 * PERIOD]


def test_a_start_without_a_database_waits_for_it(
    proxy: Proxy, effects: Effects, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.refuse()
    join(proxy.url, Ticker)
    wait_until(lambda: "The workers cannot start yet" in caplog.text, "the warning")
    assert effects.ticks() == []
    proxy.heal()
    runs_on(effects)
    effects.check_answered(PERIOD)


def test_repeatedly_terminated_connections_repeat_no_effect_and_leave_no_tick_unanswered(
    server: PostgreSQL, url: URL, effects: Effects, join: Join
) -> None:
    for _ in range(2):
        join(url, Ticker)
    runs_on(effects, 1)
    theirs = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{url.database}'"
    for cut in range(4):
        threading.Event().wait(0.37 + 0.1 * cut)  # at another moment of the period each time
        administer(server.url, theirs)
    runs_on(effects)
    effects.check_answered(PERIOD)


@pytest.mark.parametrize("heals", [True, False], ids=["once", "for longer than the lease"])
def test_connections_that_are_cut_are_opened_again(proxy: Proxy, effects: Effects, join: Join, heals: bool) -> None:
    manager = join(proxy.url, Ticker)
    runs_on(effects, 1)
    instance = manager.presence.instance
    assert instance is not None
    proxy.refuse()
    if not heals:
        wait_until(lambda: not instance.is_alive, "the end of the lease")
    proxy.heal()
    runs_on(effects)
    effects.check_answered(PERIOD)


def test_a_claim_whose_reply_was_lost_runs_once(
    url: URL, proxy: Proxy, effects: Effects, join: Join, daily: type[Daily]
) -> None:
    daily.go_on.set()
    lost = proxy.lose_reply(b"INSERT INTO background_executions", commits_itself=True)
    join(proxy.url, daily)
    assert lost.wait(PATIENCE)
    began = time.monotonic()
    wait_until(lambda: effects.all("daily"), "the run")
    assert time.monotonic() - began < LEASE + 3 + margin()
    assert effects.states("daily") == [("handed back", 1), ("succeeded", 1)]
    assert len(effects.check_once("daily")) == 1


def test_a_run_whose_last_reply_was_lost_has_succeeded_and_is_not_run_again(
    proxy: Proxy, effects: Effects, join: Join, daily: type[Daily], caplog: pytest.LogCaptureFixture
) -> None:
    daily.go_on.set()
    lost = proxy.lose_reply(b"INSERT INTO effects")
    join(proxy.url, daily)
    assert lost.wait(PATIENCE)
    wait_until(lambda: "Succeeded at the tick" in caplog.text, "the run's end")
    join(proxy.url, daily, Ticker)
    runs_on(effects)
    assert effects.states("daily") == [("succeeded", 1)]
    assert len(effects.check_once("daily")) == 1


def test_an_instance_behind_a_silent_network_is_stopped_refused_taken_over_and_works_again_afterwards(
    url: URL, proxy: Proxy, effects: Effects, join: Join
) -> None:
    heard: list[str] = []
    working = threading.Event()

    class Listener(PeriodicWorker):
        period = RARELY
        run_on_first_start = True

        def do_work(self, context: WorkerContext) -> None:
            leave(context, os.getpid())
            if context.attempt > 1:
                return
            working.set()
            assert context.stopping.wait(PATIENCE)
            heard.append("told")
            try:
                context.commit()
            except ClaimLost:
                heard.append("refused")
                raise

    inside = join(proxy.url, Listener, Ticker)
    assert working.wait(PATIENCE)
    outside = join(url, Listener, Ticker)
    wait_until(lambda: outside.presence.instance, "the joining")
    first = inside.presence.instance
    began = time.monotonic()
    proxy.silence()
    wait_until(lambda: effects.all("listener"), "the taking over")
    assert time.monotonic() - began < LEASE + 1 + margin()
    wait_until(lambda: heard == ["told", "refused"], "the refusal")
    assert effects.states("listener") == [("lost", 1), ("succeeded", 2)]
    runs_on(effects)
    proxy.heal()
    wait_until(lambda: (now := inside.presence.instance) and now is not first and now.is_alive, "the new life")
    outside.stop()
    runs_on(effects)
    assert len(effects.check_once("listener")) == 1
    effects.check_answered(PERIOD)


def test_connections_that_ended_unnoticed_by_the_client_are_opened_again(
    proxy: Proxy, effects: Effects, join: Join
) -> None:
    join(proxy.url, Ticker, SQLALCHEMY_ENGINE_OPTIONS={"poolclass": NullPool})  # TCP's own time-outs save a pool
    runs_on(effects)
    proxy.half_open()
    runs_on(effects)
    effects.check_answered(PERIOD)


def test_the_engine_gives_a_dead_connection_up_in_time_whatever_the_application_does(proxy: Proxy, join: Join) -> None:
    """Silence an idle connection, as a firewall does that forgets it: neither side is notified, and no reply comes."""
    connections = join(
        proxy.url, SQLALCHEMY_ENGINE_OPTIONS={"connect_args": {"tcp_user_timeout": 0}}
    ).stores.connections
    for engine in (connections.claims, connections.heartbeats):
        with engine.connect() as connection:
            descriptor = connection.connection.dbapi_connection.fileno()  # type: ignore[union-attr]
            with socket.socket(fileno=os.dup(descriptor)) as line:
                assert (
                    line.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 2_000
                )  # connecting may take as long
                assert line.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 2


def test_a_connection_in_use_while_the_pool_is_emptied_is_closed_when_it_is_given_back(url: URL, join: Join) -> None:
    connections = join(url).stores.connections
    for engine in (connections.claims, connections.heartbeats):
        with engine.connect() as connection:
            in_use = connection.connection.dbapi_connection
            connections.close()
            assert connection.scalar(sql("SELECT 1")) == 1
        assert in_use is not None
        assert in_use.closed  # type: ignore[attr-defined]


def test_a_caller_that_asked_the_pool_right_before_its_connections_closed_gets_an_open_connection(
    url: URL, join: Join
) -> None:
    connections = join(url).stores.connections
    for engine in (connections.claims, connections.heartbeats):
        asked = engine.pool
        with engine.connect():
            connections.close()
        given = asked.connect()
        in_use = given.dbapi_connection
        given.cursor().execute("SELECT 1")
        given.close()
        connections.close()
        assert in_use is not None
        assert in_use.closed  # type: ignore[attr-defined]


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_run_that_cannot_be_serialised_has_failed_and_the_next_one_runs(
    url: URL, effects: Effects, join: Join, level: str
) -> None:
    class Strict(PeriodicWorker):
        period = PERIOD
        conflicts = 1

        def do_work(self, context: WorkerContext) -> None:
            context.session.connection(execution_options={"isolation_level": level})
            count = "UPDATE background_workers SET previous_mark = previous_mark WHERE name = 'counted'"
            context.session.execute(sql("SELECT 1 FROM users")).all()
            if Strict.conflicts:
                Strict.conflicts -= 1
                administer(url, count)
            context.session.execute(sql(count))
            leave(context, os.getpid())

    administer(
        url,
        "INSERT INTO background_workers (name, schedule, declared, scheduled_at) VALUES ('counted', '', '', now())",
    )
    join(url, Strict)
    wait_until(lambda: len(effects.ticks("strict")) >= 3, "three runs")
    failed, *others = [row for row in effects.history("strict") if row["state"] not in ("skipped", "missed")]
    assert failed["state"] == "failed"
    assert "could not serialize access" in failed["reason"]
    assert {row["state"] for row in others} <= {"succeeded", "running"}
    effects.check_once("strict")


def test_a_strict_run_that_outlasts_its_period_has_failed_and_the_next_tick_runs(
    url: URL, effects: Effects, join: Join
) -> None:
    """Check that the run cannot commit after a later tick changed the worker's row, as the README says."""

    class Long(PeriodicWorker):
        period = PERIOD

        def do_work(self, context: WorkerContext) -> None:
            context.session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            leave(context, os.getpid())
            if context.token == 1:
                wait_until(lambda: ("skipped", None) in effects.states("long"), "a skipped tick")

    join(url, Long)
    wait_until(lambda: ("succeeded", 1) in effects.states("long"), "a later run")
    assert effects.states("long")[0] == ("failed", 1)
    effects.check_once("long")


def test_a_holder_of_sqlites_write_lock_makes_ticks_late_but_takes_no_lease(sqlite_url: str, join: Join) -> None:
    effects = Effects(sqlite_url)
    managers = [join(sqlite_url, Ticker) for _ in range(2)]
    wait_until(lambda: all(manager.presence.instance for manager in managers), "both of them signed on")
    runs_on(effects)
    instances = [manager.presence.instance for manager in managers]
    writer = create_engine(sqlite_url, poolclass=NullPool)
    with writer.connect() as stalled:
        stalled.exec_driver_sql("BEGIN IMMEDIATE")
        until = [instance.deadline + LEASE for instance in instances if instance]
        wait_until(lambda: all(i and i.deadline > u for i, u in zip(instances, until, strict=True)), "two leases")
    runs_on(effects)
    assert [manager.presence.instance for manager in managers] == instances
    assert {state for state, _ in effects.states("ticker")} <= {"succeeded", "missed", "skipped", "running"}
    effects.check_answered(PERIOD)


def test_a_full_disk_costs_ticks_and_not_the_instance(sqlite_url: str, nursery: Nursery) -> None:
    effects = Effects(sqlite_url)
    with nursery.started(sqlite_url, PROBE_PERIOD=PERIOD.total_seconds()) as process:
        process.wait_for("joined")
        runs_on(effects)
        unlimited = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, unlimited[1]))
        process.wait_for("cannot claim the tick|Failed at the tick|Lost the tick", times=2)
        process.wait_for("No heartbeat")
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)
        runs_on(effects)
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        assert "Exception in thread" not in process.output
    effects.check_answered(PERIOD)
