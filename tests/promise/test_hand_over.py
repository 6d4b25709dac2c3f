"""Work that one instance hands back: another instance is notified, and takes it immediately without polling.

The heartbeats here are too far apart to help.
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session
from support.databases import on_postgresql, on_sqlite
from support.fleet import PATIENCE, Fleet, Hourly, statements, wait_until

from background import BackgroundWorkerManager, Message, MessageWorker, WorkerContext
from background.ledger.leases import Instance
from background.worker import AnyWorker

SLOW = {"WORKERS_HEARTBEAT_SECONDS": 3 * PATIENCE, "WORKERS_LEASE_SECONDS": 9 * PATIENCE}


class UntilTold(Hourly):
    """Its first run lasts until a stop request. The next run succeeds."""

    def do_work(self, context: WorkerContext) -> None:
        if context.token == 1:
            assert context.stopping.wait(PATIENCE)
        context.raise_if_stopping()


def joined(fleet: Fleet, *workers: AnyWorker) -> BackgroundWorkerManager:
    manager = fleet.manager(*workers, **SLOW)
    manager.start()
    wait_until(lambda: manager.supervisor.listener, "the start")  # type: ignore[union-attr]
    return manager


def test_a_run_that_is_handed_back_is_taken_over_at_once_without_polling(fleet: Fleet) -> None:
    first = joined(fleet, UntilTold)
    wait_until(lambda: fleet.states() == ["running"], "the first run")
    second = joined(fleet, UntilTold)
    wait_until_quiet(second)
    first.stop()
    wait_until(lambda: fleet.states() == ["handed back", "succeeded"], "the run on the second one")


def wait_until_quiet(manager: BackgroundWorkerManager) -> None:
    """Wait until the engines execute nothing for half a second. A listener that watches a file looks twice in it."""
    stores = manager.stores

    def is_quiet() -> bool:
        with statements(stores.main.engine) as looks, statements(stores.leases.engine) as beats:
            threading.Event().wait(0.6)
            return not looks + beats

    wait_until(is_quiet, "half a second without a question")


def test_a_run_that_outlives_its_instances_signing_off_is_taken_over_at_once(fleet: Fleet) -> None:
    with deaf_run(fleet) as first:
        first.stop(timeout=0)
        wait_until(lambda: fleet.states() == ["handed back", "succeeded"], "the run on the second one")


@contextmanager
def deaf_run(fleet: Fleet) -> Iterator[BackgroundWorkerManager]:
    """Start a run that ignores a stop request until the block ends. Another instance has joined."""
    go_on = threading.Event()

    class Deaf(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            assert context.token > 1 or go_on.wait(PATIENCE)

    first = joined(fleet, Deaf)
    wait_until(lambda: fleet.states() == ["running"], "the first run")
    joined(fleet, Deaf)
    yield first
    go_on.set()


def test_messages_that_are_handed_back_are_taken_over_at_once(fleet: Fleet) -> None:
    working, seen = threading.Event(), []

    class Notes(MessageWorker):
        topic = "notes"

        def handle(self, message: Message, context: WorkerContext) -> None:
            seen.append(message.attempt)
            if len(seen) == 1:
                working.set()
                assert context.stopping.wait(PATIENCE)
                context.raise_if_stopping()

    first = joined(fleet, Notes)
    fleet.enqueue("notes", 1)
    assert working.wait(PATIENCE)
    joined(fleet, Notes)
    first.stop()
    wait_until(lambda: [each.state for each in fleet.messages()] == ["done"], "the second one")
    assert seen == [1, 1]


@on_sqlite
def test_leaving_instances_are_recovered_after_another_instances_messages(fleet: Fleet) -> None:
    class Notes(MessageWorker):
        topic = "notes"

        def handle(self, message: Message, context: WorkerContext) -> None: ...

    former = fleet.manager(Notes, **SLOW)
    fleet.enqueue("notes", 1, 2)
    leaving = [former.presence.sign_on() for _ in range(2)]
    assert all(former.stores.queue.claim("notes", "notes", 1, (each.id, each.name)) for each in leaving)
    manager = joined(fleet, Notes)
    wait_until_quiet(manager)
    with former.stores.main.engine.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # as a run that has written
        for each in leaving:
            with statements(manager.stores.leases.engine) as looks:
                former.presence.sign_off(each)
                wait_until(partial(len, looks), "the look")
    wait_until(lambda: [each.state for each in fleet.messages()] == ["done", "done"], "the handling of both")


def test_a_run_that_another_process_requested_begins_at_once(fleet: Fleet) -> None:
    joined(fleet, Hourly)
    wait_until(lambda: fleet.states() == ["succeeded"], "the first run")
    assert fleet.manager(Hourly, **SLOW).request("hourly")
    wait_until(lambda: fleet.states() == ["succeeded", "succeeded"], "the one that was asked for")


class Asked(Hourly):
    """Runs when it is triggered, and at the next tick."""

    catch_up = False
    run_on_first_start = False


def test_each_lease_that_ends_before_the_first_heartbeat_is_noticed_at_its_end(
    fleet: Fleet,
) -> None:
    second = type("Second", (Asked,), {})
    manager = fleet.manager(Asked, second, **SLOW)
    claimed_by_one_that_dies(manager, Asked, timedelta(seconds=1))
    claimed_by_one_that_dies(manager, second, timedelta(seconds=3))
    manager.start()
    wait_until(lambda: fleet.states("asked") == ["lost", "succeeded"], "the taking over of the first")
    wait_until(lambda: fleet.states("second") == ["lost", "succeeded"], "the taking over of the second")


def claimed_by_one_that_dies(manager: BackgroundWorkerManager, worker: type[Hourly], lease: timedelta) -> None:
    """Claim a manual run as an instance that no longer renews its lease."""
    dead, now = Instance(lease), manager.recovery.look(worker).clock
    manager.stores.leases.beat(dead)
    assert manager.stores.ledger.claim_manual(worker.name, now, (dead.id, dead.name))


@on_postgresql
def test_an_instance_whose_idle_connections_broke_receives_a_request_at_once(fleet: Fleet) -> None:
    manager = joined(fleet, Hourly)
    wait_until(lambda: fleet.states() == ["succeeded"], "the first run")
    wait_until_quiet(manager)
    break_connections(manager)
    assert fleet.manager(Hourly, **SLOW).request("hourly")
    wait_until(lambda: fleet.states() == ["succeeded", "succeeded"], "the one that was asked for")


@on_postgresql
def test_a_run_that_outlives_its_instances_signing_off_is_taken_over_at_once_even_if_idle_connections_broke(
    fleet: Fleet,
) -> None:
    with deaf_run(fleet) as first:
        break_connections(first)
        first.stop(timeout=0)
        wait_until(lambda: fleet.states() == ["handed back", "succeeded"], "the run on the second one")


def break_connections(manager: BackgroundWorkerManager) -> None:
    """End the connections that the instance keeps for its claims, as a server or a firewall ends idle connections."""
    engine = manager.stores.main.engine
    with ExitStack() as kept:
        each = [kept.enter_context(engine.connect()) for _ in range(engine.pool.size())]  # type: ignore[attr-defined]
        pids = [connection.scalar(select(func.pg_backend_pid())) for connection in each]
    with manager.stores.leases.engine.connect() as connection:
        for pid in pids:
            assert connection.scalar(select(func.pg_terminate_backend(pid, int(PATIENCE * 1000))))


def cut_off(session: Session) -> None:
    """End the session's connection as a network does. The server tells nothing, so the other connections stay."""
    driver: Any = session.connection().connection.driver_connection
    with socket.socket(fileno=os.dup(driver.pgconn.socket)) as its_own:
        its_own.shutdown(socket.SHUT_RDWR)


@on_postgresql
def test_a_run_whose_connection_broke_runs_again_only_after_a_heartbeat_because_it_may_still_go_on(
    fleet: Fleet,
) -> None:
    began = threading.Semaphore(0)

    class Broken(Asked):
        def do_work(self, context: WorkerContext) -> None:
            began.release()
            cut_off(context.session)
            context.session.execute(select(1))

    manager = joined(fleet, Broken)
    wait_until_quiet(manager)
    assert fleet.manager(Broken, **SLOW).request("broken")
    assert began.acquire(timeout=PATIENCE)
    wait_until(lambda: fleet.states() == ["lost"], "the loss")
    assert not began.acquire(timeout=1.5)
