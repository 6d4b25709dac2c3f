"""A lock belongs to one block in the whole fleet: in turn, in time, and never to two blocks at a time."""

import logging
import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import Connection, event, insert, make_url, select, update
from sqlalchemy.exc import OperationalError
from support.databases import close, on_postgresql, on_sqlite, text
from support.fleet import (
    PATIENCE,
    Fleet,
    Hourly,
    db,
    effect,
    in_threads,
    last_hour,
    make_app,
    statements,
    stop,
    wait_until,
)
from support.fleet import effects as left
from support.proxy import Proxy

from background import (
    BackgroundWorkerManager,
    InvalidLock,
    Lock,
    LockNotAcquired,
    PruneHistoryWorker,
    WorkerContext,
    current_workers,
)
from background.database import tables
from background.database.clock import now

NAME = "invoice-42"


def row(manager: BackgroundWorkerManager, name: str = NAME) -> Any:
    with manager.stores.connections.locks.connect() as connection:
        return connection.execute(select(tables.locks).where(tables.locks.c.name == name)).one_or_none()


def set_row(manager: BackgroundWorkerManager, name: str, **columns: Any) -> None:
    with manager.stores.connections.locks.begin() as connection:
        connection.execute(update(tables.locks).where(tables.locks.c.name == name).values(**columns))


def joined(manager: BackgroundWorkerManager) -> BackgroundWorkerManager:
    manager.start()
    wait_until(lambda: manager.presence.instance, "the joining")
    return manager


def token(manager: BackgroundWorkerManager, name: str = NAME, timeout: float = 0) -> int | None:
    """Return the token of a lock that is acquired and released. None if it was not acquired."""
    with manager.lock(name, timeout) as lock:
        return lock and lock.token


# -- one at a time ---------------------------------------------------------------------------------


def test_threads_of_one_instance_that_count_under_a_lock_count_correctly(fleet: Fleet) -> None:
    manager, counted = joined(fleet.manager()), [0]

    def count() -> None:
        for _ in range(5):
            with manager.lock(NAME, timeout=PATIENCE) as lock:
                assert lock is not None
                seen = counted[0]
                assert lock.still_held()
                counted[0] = seen + 1

    in_threads(*[count] * 4)
    assert counted == [20]
    assert token(manager) == 21


def test_a_lock_that_is_held_elsewhere_is_not_acquired(fleet: Fleet) -> None:
    one, other = fleet.manager(), fleet.manager()
    with one.lock(NAME) as lock:
        assert lock
        assert (lock.name, lock.token, lock.still_held()) == (NAME, 1, True)
        with other.lock(NAME) as refused:
            assert refused is None
        assert token(other, "invoice-43") == 1
        assert lock.still_held()
    assert not lock.still_held()
    assert token(other) == 2


def test_a_waiting_caller_gives_up_after_the_timeout(fleet: Fleet) -> None:
    one, other = fleet.manager(), fleet.manager()
    with one.lock(NAME):
        before = monotonic()
        assert token(other, timeout=0.3) is None
        assert monotonic() - before >= 0.3


def test_a_waiting_caller_gets_the_lock_when_it_is_released(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "background.ledger.locks")
    one, other, tokens = fleet.manager(), fleet.manager(), []
    waiting = threading.Thread(target=lambda: tokens.append(token(other, timeout=PATIENCE)))
    with one.lock(NAME):
        waiting.start()
        wait_until(lambda: "has held it since" in caplog.text, "the first look")
    waiting.join()
    assert tokens == [2]


def test_an_exception_in_the_block_releases_the_lock_and_passes(fleet: Fleet) -> None:
    manager = fleet.manager()
    with pytest.raises(LookupError), manager.lock(NAME):
        raise LookupError
    assert token(manager) == 2


def test_a_lock_can_be_acquired_and_released_amid_a_transaction_that_has_written(fleet: Fleet) -> None:
    """Check this also on SQLite, where that transaction holds the only write lock until it ends."""
    app = fleet.app()
    with app.app_context():
        db.session.execute(insert(left).values(key="mine", note=""))
        with current_workers.lock(NAME) as lock:
            assert lock
        assert token(current_workers) == 2
        db.session.commit()
    assert fleet.keys() == ["mine"]


class LockingWorker(Hourly):
    def do_work(self, context: WorkerContext) -> None:
        effect(context)
        context.session.flush()
        with current_workers.lock(NAME) as lock:
            effect(context, lock and lock.token)


def test_a_run_can_hold_a_lock(fleet: Fleet) -> None:
    manager = fleet.manager(LockingWorker)
    assert manager.trigger("locking_worker").state == "succeeded"
    assert fleet.effects() == ["", "1"]


class Waiter(Hourly):
    began: threading.Event

    def do_work(self, context: WorkerContext) -> None:
        self.began.set()
        with current_workers.lock(NAME, timeout=10 * PATIENCE) as lock:
            assert lock is None
        context.raise_if_stopping()


def test_a_stopping_run_no_longer_waits_for_a_lock(fleet: Fleet) -> None:
    waiter = type("Waiter", (Waiter,), {"began": threading.Event(), "name": "waiter"})
    one, other = fleet.manager(), fleet.manager(waiter)
    with one.lock(NAME):
        run = threading.Thread(target=lambda: other.trigger("waiter"))
        run.start()
        assert waiter.began.wait(PATIENCE)
        other.tell()
        run.join(PATIENCE)
    assert fleet.states("waiter") == ["handed back"]


# -- not re-entrant --------------------------------------------------------------------------------


def test_a_thread_that_requests_its_own_lock_is_refused_at_once_with_a_warning(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    manager = fleet.manager()
    with manager.lock(NAME) as lock:
        with manager.lock(NAME, timeout=10 * PATIENCE) as again:
            assert again is None
        assert lock.still_held()
        assert "'invoice-42': this thread holds it already, and locks are not re-entrant" in caplog.text
        assert in_threads(lambda: token(manager)) == [None]
    assert len(caplog.messages) == 1
    assert token(manager) == 2


# -- its name and its time-out -------------------------------------------------------------------------


@on_sqlite
@pytest.mark.parametrize("name", ["", " ", None, 42, b"invoice", "two\nlines", "null\0", "half\ud800", "x" * 198])
def test_an_invalid_name_of_a_lock_is_refused(fleet: Fleet, name: Any) -> None:
    manager = fleet.manager(LOCK_PREFIX="it:")
    with pytest.raises(InvalidLock, match=r"lock.*; expected .*: ") as error:
        manager.lock(name)
    assert repr(name) in str(error.value)


@on_sqlite
@pytest.mark.parametrize("timeout", [-1, -0.1, math.nan, math.inf, 86_401, True, "2", None, timedelta(seconds=2)])
def test_a_timeout_that_is_not_a_number_of_seconds_is_refused(fleet: Fleet, timeout: Any) -> None:
    manager = fleet.manager()
    with pytest.raises(InvalidLock, match=r"expected a number of seconds") as error:
        manager.lock(NAME, timeout)
    assert repr(timeout) in str(error.value)


def test_the_longest_name_fits(fleet: Fleet) -> None:
    assert token(fleet.manager(LOCK_PREFIX="it:"), "ü" * 197) == 1


def test_a_prefix_separates_the_locks_of_two_shops_on_one_database(fleet: Fleet) -> None:
    one, other = fleet.manager(LOCK_PREFIX="one:"), fleet.manager(LOCK_PREFIX="other:")
    with one.lock(NAME) as lock:
        assert lock.name == NAME
        assert token(other) == 1
    assert row(one, f"one:{NAME}").token == 1


# -- holders that die ------------------------------------------------------------------------------


def test_an_instance_that_leaves_gives_up_the_locks_that_its_threads_still_hold(fleet: Fleet) -> None:
    leaving, other = joined(fleet.manager(WORKERS_LEASE_SECONDS=600)), fleet.manager()
    with leaving.lock(NAME) as lock:
        leaving.stop()
        assert not lock.still_held()
        with other.lock(NAME) as theirs:
            assert theirs.token == 2
            assert not lock.still_held()


@pytest.mark.promise
def test_an_instance_whose_lease_is_over_gets_no_lock_until_its_successor_has_joined(fleet: Fleet) -> None:
    slow = {"WORKERS_HEARTBEAT_SECONDS": 100, "WORKERS_LEASE_SECONDS": 600}
    manager = joined(fleet.manager(**slow))
    with manager.lock(NAME) as lock:
        manager.presence.instance.deadline = 0.0
        assert not lock.still_held()
    with pytest.raises(LockNotAcquired, match="could not renew the lease in time"), manager.lock(NAME):
        pass
    assert row(manager).holder is None


@pytest.mark.promise
def test_one_of_many_callers_that_find_a_dead_holder_gets_the_lock(fleet: Fleet) -> None:
    managers = [fleet.manager() for _ in range(4)]
    assert token(managers[0]) == 1
    set_row(managers[0], NAME, holder="of a dead one", instance="unheard of")
    done = threading.Barrier(len(managers))

    def take(manager: BackgroundWorkerManager) -> int | None:
        with manager.lock(NAME) as lock:
            done.wait(PATIENCE)
            return lock and lock.token

    tokens = in_threads(*[lambda manager=manager: take(manager) for manager in managers])
    assert sorted(tokens, key=str) == [2, None, None, None]


@pytest.mark.promise
@pytest.mark.parametrize("breaks", [False, True], ids=["in time", "called off"])
def test_a_lock_whose_token_repeats_after_lost_commits_stays_with_its_holder(fleet: Fleet, breaks: bool) -> None:
    """Have the database forget the last holder between another caller's look at the lock and its acquisition."""
    manager, other = joined(fleet.manager(WORKERS_LEASE_SECONDS=600)), fleet.manager()
    assert [token(manager), token(manager)] == [1, 2]
    with ExitStack() as held:
        locks: list[Lock] = []

        def forget(_connection: Connection, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
            if is_acquisition(statement) and not locks:
                set_row(other, NAME, token=1)
                locks.append(held.enter_context(other.lock(NAME)))
                if breaks:
                    raise OperationalError(statement, parameters, ConnectionError("it broke"))

        event.listen(manager.stores.connections.locks, "before_cursor_execute", forget)
        if breaks:
            with pytest.raises(LockNotAcquired):
                token(manager)
            wait_until(lambda: not [t for t in threading.enumerate() if t.name == "workers-lock"], "the calling off")
        else:
            assert token(manager) is None
        assert (locks[0].token, locks[0].still_held()) == (2, True)


# -- pruning ---------------------------------------------------------------------------------------


def prune(fleet: Fleet) -> None:
    assert fleet.manager(PruneHistoryWorker).trigger("prune_history_worker").state == "succeeded"


@pytest.mark.promise
def test_a_deleted_lock_continues_above_its_last_token(fleet: Fleet) -> None:
    manager, long_ago = fleet.manager(), now(-timedelta(days=15))
    assert [token(manager) for _ in range(3)] == [1, 2, 3]
    assert token(manager, "died") == token(manager, "lately") == 1
    set_row(manager, NAME, since=long_ago)
    set_row(manager, "died", since=long_ago, holder="of a dead one", instance="unheard of")
    with manager.lock("kept") as kept:
        set_row(manager, "kept", since=long_ago)
        prune(fleet)
        assert kept.still_held()
    assert (row(manager), row(manager, "died")) == (None, None)
    assert (token(manager, "kept"), token(manager, "lately")) == (2, 2)
    assert (token(manager), token(manager, "died")) == (4, 4)
    set_row(manager, "kept", since=long_ago)
    prune(fleet)
    assert (token(manager, "kept"), token(manager)) == (4, 5)


@pytest.mark.promise
def test_a_lock_acquired_while_it_is_deleted_is_kept_or_continues_above_its_last_token(fleet: Fleet) -> None:
    manager, other, over = joined(fleet.manager()), fleet.manager(), threading.Event()

    def forget() -> None:
        pruned = 0
        while pruned < 20:
            pruned += other.locks.prune(last_hour() + timedelta(days=1), 5)
        over.set()

    def acquire() -> list[list[int | None]]:
        rounds = []
        while not over.is_set():
            rounds.append([token(manager, f"invoice-{number}") for number in range(20)])
        return rounds

    _, rounds = in_threads(forget, acquire)
    for tokens in zip(*rounds, strict=True):
        assert None not in tokens
        assert list(tokens) == sorted(set(tokens))


# -- its cost ---------------------------------------------------------------------------------


def test_a_lock_is_one_read_and_two_writes(fleet: Fleet) -> None:
    manager = joined(fleet.manager(WORKERS_HEARTBEAT_SECONDS=100, WORKERS_LEASE_SECONDS=600))
    assert token(manager) == 1
    with statements(manager.stores.connections.locks) as seen:
        assert token(manager) == 2
    assert [each.split()[0] for each in seen if "background_locks" in each] == ["SELECT", "UPDATE", "UPDATE"]


def test_a_process_that_has_not_joined_leaves_no_instance_behind_with_each_lock(fleet: Fleet) -> None:
    manager = fleet.manager()
    assert [token(manager) for _ in range(3)] == [1, 2, 3]
    with manager.stores.leases.engine.connect() as connection:
        assert connection.execute(select(tables.instances)).all() == []


# -- a broken database -----------------------------------------------------------------------------


def test_a_broken_database_is_an_error_and_not_a_held_lock(
    database_url: str,
) -> None:
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite":
        Path(f"{url.database}-instances").write_text("no database")
    else:
        url = url.set(query={"host": "/nowhere"})
    broken: BackgroundWorkerManager = make_app(text(url)).extensions["background_workers"]
    with pytest.raises(LockNotAcquired, match=r"'invoice-42' could not be checked: .* Expected") as error:
        broken.lock(NAME, timeout=PATIENCE).__enter__()
    assert error.value.__cause__


@pytest.fixture
def proxy(database_url: str) -> Iterator[Proxy]:
    proxy = Proxy(make_url(database_url))
    yield proxy
    proxy.close()


@pytest.fixture
def far(proxy: Proxy) -> Iterator[BackgroundWorkerManager]:
    """Give an instance that has joined through the proxy, and whose lease outlasts the test."""
    app = make_app(text(proxy.url), WORKERS_LEASE_SECONDS=600)
    yield joined(app.extensions["background_workers"])
    stop(app)


@on_postgresql
def test_a_restart_of_the_database_since_the_last_lock_causes_no_error(
    proxy: Proxy, far: BackgroundWorkerManager
) -> None:
    alone = make_app(text(proxy.url))
    manager: BackgroundWorkerManager = alone.extensions["background_workers"]
    assert (token(far), token(manager)) == (1, 2)
    proxy.cut()
    assert (token(far), token(manager)) == (3, 4)
    close(alone)


def is_acquisition(statement: str) -> bool:
    return statement.startswith("UPDATE background_locks SET token") and "RETURNING" in statement


@pytest.mark.promise
@on_postgresql
def test_a_lock_whose_acquisition_got_no_reply_does_not_stay_held(
    fleet: Fleet, proxy: Proxy, far: BackgroundWorkerManager
) -> None:
    near = fleet.manager()
    assert token(near) == 1

    def lose(_connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        if is_acquisition(statement):
            proxy.silence(replies_only=True)
            threading.Thread(target=cut_when_acquired).start()

    def cut_when_acquired() -> None:
        wait_until(lambda: row(near).token == 2, "the acquisition")
        proxy.heal()

    event.listen(far.stores.connections.locks, "before_cursor_execute", lose)
    with pytest.raises(LockNotAcquired), far.lock(NAME):
        pass
    assert token(near, timeout=PATIENCE) == 4  # the caller gave up after the lock was acquired
    assert far.presence.instance.is_alive


@pytest.mark.promise
def test_an_acquisition_that_arrives_after_its_caller_gave_up_acquires_nothing(fleet: Fleet) -> None:
    """Break the connection, and have the server execute its last statement a while later."""
    manager, other = joined(fleet.manager(WORKERS_LEASE_SECONDS=600)), fleet.manager()
    assert token(manager) == 1
    under_way: list[tuple[str, Any]] = []

    def delay(_connection: Connection, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if is_acquisition(statement):
            under_way.append((statement, parameters))
            raise OperationalError(statement, parameters, ConnectionError("it broke"))

    event.listen(manager.stores.connections.locks, "before_cursor_execute", delay)
    with pytest.raises(LockNotAcquired), manager.lock(NAME):
        pass
    wait_until(lambda: row(other).token == 2, "the calling off")
    with other.stores.connections.locks.begin() as connection:
        assert connection.exec_driver_sql(*under_way[0]).all() == []
    assert token(other) == 3


@on_postgresql
def test_a_failing_release_hides_no_error_and_is_repeated(
    fleet: Fleet, proxy: Proxy, far: BackgroundWorkerManager, caplog: pytest.LogCaptureFixture
) -> None:
    near = fleet.manager()

    def work(lock: Lock | None) -> None:
        assert lock
        proxy.refuse()
        with pytest.raises(LockNotAcquired):
            lock.still_held()
        raise LookupError

    with pytest.raises(LookupError), far.lock(NAME) as lock:
        work(lock)
    assert len([message for message in caplog.messages if "could not be released yet" in message]) == 1
    assert token(near) is None
    proxy.heal()
    assert token(near, timeout=PATIENCE) == 2
    assert far.presence.instance.is_alive
