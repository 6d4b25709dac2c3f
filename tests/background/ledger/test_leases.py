"""Leases: which instances count as alive, by which clock, and for how long."""

import glob
import logging
import os
import threading
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import event, make_url, select, text, update
from sqlalchemy.exc import OperationalError
from support.databases import close, on_postgresql, on_sqlite
from support.fleet import BEAT, HOUR, PATIENCE, Fleet, Hourly, effect, last_hour, make_app, statements, wait_until
from support.processes import margin

from background import BackgroundWorkerManager, Message, MessageWorker, WorkerContext
from background.database import tables
from background.database.clock import steady
from background.database.notifications import ring
from background.host.scheduler import Scheduler
from background.ledger.leases import Instance, Pulse
from background.process.presence import Presence

LEASE = timedelta(seconds=5)
LOOK = {"sqlite": "background_workers.name = ", "postgresql": "EXECUTE background_claim_tick_"}


class Noted(MessageWorker):
    topic = "noted"

    def handle(self, message: Message, context: WorkerContext) -> None: ...


def row(fleet: Fleet, instance: Instance) -> object:
    instances = fleet.manager().stores.leases
    with instances.engine.connect() as connection:
        return connection.execute(select(tables.instances).where(tables.instances.c.id == instance.id)).one()


def test_a_heartbeat_is_one_statement_and_renews_the_lease(fleet: Fleet) -> None:
    instances, instance = fleet.manager().stores.leases, Instance(LEASE)
    with statements(instances.engine) as seen:
        instances.beat(instance)
        instances.beat(instance)
    assert len([statement for statement in seen if not statement.startswith("PRAGMA")]) == 2
    signed_on = row(fleet, instance)
    assert signed_on.expires_at - signed_on.heartbeat_at <= LEASE + timedelta(seconds=0.1)
    assert instance.is_alive


def test_two_starts_of_one_process_are_two_instances(fleet: Fleet) -> None:
    first, second = Instance(LEASE), Instance(LEASE)
    assert first.id != second.id
    assert (first.host, first.pid) == (second.host, second.pid)


def test_the_deadline_counts_from_before_the_heartbeat_was_sent(fleet: Fleet) -> None:
    instances, instance = fleet.manager().stores.leases, Instance(LEASE)
    before = steady()
    instances.beat(instance)
    after = steady()
    assert before + 5 <= instance.deadline <= after + 5


def test_living_lost_and_signed_off_instances_are_distinguished(fleet: Fleet) -> None:
    instances = fleet.manager().stores.leases
    alive, lost, left = Instance(LEASE), Instance(timedelta(seconds=-1)), Instance(LEASE)
    for instance in (alive, lost, left):
        instances.beat(instance)
    instances.sign_off(left)
    assert instances.gone({alive.id, lost.id, left.id, "unheard of"}) == {
        lost.id: False,
        left.id: True,
        "unheard of": False,
    }


def test_a_heartbeat_after_signing_off_does_not_revive_the_instance(fleet: Fleet) -> None:
    instances, instance = fleet.manager().stores.leases, Instance(LEASE)
    instances.beat(instance)
    instances.sign_off(instance)
    instances.beat(instance)
    assert instances.gone({instance.id}) == {instance.id: True}


def test_instances_that_left_long_ago_are_deleted(fleet: Fleet) -> None:
    instances = fleet.manager().stores.leases
    old, new = Instance(LEASE), Instance(LEASE)
    for instance in (old, new):
        instances.beat(instance)
    with instances.engine.begin() as connection:
        long_ago = datetime.now(UTC) - timedelta(days=2)
        forgotten = update(tables.instances).where(tables.instances.c.id == old.id)
        connection.execute(forgotten.values(expires_at=long_ago))
    instances.sign_off(new)
    with instances.engine.connect() as connection:
        assert set(connection.scalars(select(tables.instances.c.id))) == {new.id}


def test_every_heartbeat_reads_the_databases_clock(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    instances, instance = fleet.manager().stores.leases, Instance(LEASE)
    instances.beat(instance)
    assert abs(instance.clock_offset) < timedelta(seconds=1)
    monkeypatch.setattr("background.ledger.leases.time", SimpleNamespace(time=lambda: time.time() - 3600))
    instances.beat(instance)
    assert abs(instance.clock_offset - timedelta(hours=1)) < timedelta(seconds=margin())
    assert abs(instance.database_time() - datetime.now(UTC) - timedelta(hours=1)) < timedelta(seconds=margin())


@pytest.mark.promise
def test_one_heartbeat_renews_everything_that_an_instance_runs(fleet: Fleet) -> None:
    go_on, working = threading.Event(), threading.Semaphore(0)

    class First(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            working.release()
            assert go_on.wait(PATIENCE)
            effect(context)

    second = type("Second", (First,), {})
    manager = fleet.manager(First, second, WORKERS_LEASE_SECONDS=1.5)
    manager.start()
    assert all(working.acquire(timeout=PATIENCE) for _ in range(2))
    began = manager.presence.instance.deadline
    wait_until(lambda: manager.presence.instance.deadline > began + 2, "more than a lease")
    go_on.set()
    wait_until(lambda: fleet.states() == ["succeeded", "succeeded"], "the end of both")


@pytest.mark.promise
def test_a_run_outside_any_started_instance_has_a_lease_as_long_as_it_runs(fleet: Fleet) -> None:
    class Long(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            began = context.instance.deadline
            wait_until(lambda: context.instance.deadline > began + 2, "more than a lease")
            effect(context)

    manager = fleet.manager(Long, WORKERS_LEASE_SECONDS=1.5)
    assert manager.trigger("long").state == "succeeded"
    (execution,) = fleet.executions()
    assert manager.stores.leases.gone({execution.instance}) == {execution.instance: True}


def test_an_instance_that_was_not_started_logs_nothing(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    with statements(manager.stores.leases.engine) as beats, statements(manager.stores.main.engine) as looks:
        threading.Event().wait(0.3)
    assert beats == looks == []


@pytest.mark.promise
def test_an_idle_instance_is_one_statement_per_heartbeat(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    manager.start()
    wait_until(lambda: fleet.states() == ["succeeded"], "the first run")
    with statements(manager.stores.leases.engine) as beats, statements(manager.stores.main.engine) as looks:

        def is_idle() -> bool:  # once it has seen its own start and all earlier notifications
            if looks:
                beats.clear()
                looks.clear()
            return len(beats) >= 10

        wait_until(is_idle, "ten heartbeats that need no look")
    assert all(BEAT[fleet.engine.dialect.name] in statement for statement in beats)
    assert looks == []


@pytest.mark.promise
@on_postgresql
def test_renewing_a_lease_waits_for_no_other_table(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    working, go_on = threading.Event(), threading.Event()

    class Long(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            working.set()
            assert go_on.wait(PATIENCE)
            effect(context)

    manager, lease = fleet.manager(Long, Noted, WORKERS_LEASE_SECONDS=1), 1
    manager.start()
    assert working.wait(PATIENCE)
    first = manager.presence.instance
    others = [table.name for table in tables.metadata.sorted_tables if table is not tables.instances]
    with fleet.engine.begin() as operator:
        operator.execute(text(f"LOCK TABLE {', '.join(others)} IN ACCESS EXCLUSIVE MODE"))  # like VACUUM FULL
        until = first.deadline + 2 * lease
        wait_until(lambda: first.deadline > until or not first.is_alive, "the heartbeats of two leases")
        assert first.is_alive
    go_on.set()
    wait_until(lambda: fleet.states() == ["succeeded"], "the end of the run")
    assert manager.presence.instance is first
    assert caplog.text.count("another client keeps a table of the engine locked") == 1
    assert manager.request("long")
    wait_until(lambda: fleet.states() == ["succeeded", "succeeded"], "a run that a heartbeat found")
    fleet.enqueue("noted", 1)
    wait_until(lambda: [each.state for each in fleet.messages()] == ["done"], "a message that was found")


@pytest.mark.promise
def test_failing_looks_during_good_heartbeats_are_logged_once(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = fleet.manager(Noted, WORKERS_LEASE_SECONDS=1)
    failures: list[int] = []
    caplog.set_level(logging.DEBUG)
    manager.start()
    wait_until(lambda: manager.presence.instance, "the joining")

    def states(*_: object) -> None:
        failures.append(1)
        raise OperationalError("SELECT", {}, Exception("no connection is free"))

    with monkeypatch.context() as away:
        away.setattr(manager.stores.ledger, "states", states)
        ring(manager.stores.connections)
        wait_until(lambda: len(failures) >= 3, "three looks that fail")
    told = [each for each in caplog.records if "Cannot look at the fleet" in each.getMessage()]
    assert [each.levelname for each in told if each.levelno > logging.DEBUG] == ["WARNING"]
    assert manager.presence.instance.is_alive


def test_the_heartbeats_during_a_run_read_the_busy_workers_only(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    working, go_on = threading.Event(), threading.Event()

    class Long(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            working.set()
            assert go_on.wait(PATIENCE)

    manager = fleet.manager(Long, Hourly, WORKERS_HEARTBEAT_SECONDS=0.1)
    busy, ledger = [], manager.stores.ledger
    look_at_busy, look_at_all = ledger.busy_states, ledger.states

    def noted() -> Any:
        busy.append(look_at_busy())
        return busy[-1]

    def looked(names: Any = None) -> Any:
        busy.clear()
        return look_at_all(names)

    monkeypatch.setattr(ledger, "busy_states", noted)
    monkeypatch.setattr(ledger, "states", looked)
    manager.start()
    assert working.wait(PATIENCE)
    wait_until(lambda: len(busy) >= 5, "five looks at the busy workers, without a look at all workers between them")
    assert {name for states in busy for name in states} == {"long"}
    go_on.set()
    wait_until(lambda: fleet.states("long") == ["succeeded"], "the end of the run")


@pytest.mark.promise
@on_postgresql
def test_a_table_locked_right_after_a_heartbeat_does_not_delay_the_next_heartbeat(fleet: Fleet) -> None:
    working, go_on, locked = threading.Event(), threading.Event(), threading.Event()

    class Long(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            working.set()
            assert go_on.wait(PATIENCE)

    manager, lease = fleet.manager(Long, WORKERS_LEASE_SECONDS=1), 1
    manager.start()
    assert working.wait(PATIENCE)
    first, beats = manager.presence.instance, manager.stores.leases.engine
    with fleet.engine.connect() as operator:

        def lock(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            if BEAT["postgresql"] in statement and not locked.is_set():
                operator.execute(text("LOCK TABLE background_workers, background_executions IN ACCESS EXCLUSIVE MODE"))
                locked.set()

        event.listen(beats, "after_cursor_execute", lock)
        assert locked.wait(PATIENCE)
        event.remove(beats, "after_cursor_execute", lock)
        until = first.deadline + 2 * lease
        wait_until(lambda: first.deadline > until or not first.is_alive, "the heartbeats of two leases")
        assert first.is_alive
    go_on.set()
    wait_until(lambda: fleet.states() == ["succeeded"], "the end of the run")


def test_a_loser_of_a_tick_reads_once_and_waits_a_little_at_the_next_tick(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scheduler, "is_awaited", False)  # otherwise one read answers for all ticks that wait
    managers = [fleet.manager(Hourly) for _ in range(2)]
    for manager in managers:
        manager.start()
    wait_until(
        lambda: fleet.states() == ["succeeded"] and all(each.presence.instance for each in managers), "the first run"
    )
    [execution] = fleet.executions()
    [loser] = [each for each in managers if each.presence.instance.id != execution.instance]
    timers = loser.supervisor.timers
    wait_until(lambda: "hourly" in timers._yielding, "the look of the one that comes second")
    with statements(loser.stores.main.engine) as seen:
        timers._fire("hourly", execution.tick, "every 3600s")
    of_one = [each for each in seen if LOOK[fleet.engine.dialect.name] in each]  # a heartbeat looks at all workers
    assert len(of_one) == 1
    assert timedelta(milliseconds=9) < armed_after(loser) < timedelta(milliseconds=21)


def armed_after(manager: BackgroundWorkerManager) -> timedelta:
    """Return the delay between the tick and the next wake-up, by the database's clock."""
    supervisor = manager.supervisor
    planned = supervisor.scheduler._planned["tick:hourly"]
    return planned + manager.presence.instance.clock_offset - supervisor.timers.armed["hourly"]


@pytest.mark.promise
def test_no_instance_counts_as_lost_within_a_lease_after_a_change_of_the_databases_clock(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    instances = fleet.manager(WORKERS_LEASE_SECONDS=1.5).stores.leases
    lost, left, us = Instance(timedelta(seconds=-1)), Instance(LEASE), Instance(LEASE)
    for instance in (lost, left, us):
        instances.beat(instance)
    instances.sign_off(left)
    assert instances.gone({lost.id, left.id}) == {lost.id: False, left.id: True}
    # Two minutes later by the steady clock, as if the database's clock had been set back by two minutes.
    monkeypatch.setattr("background.ledger.leases.steady", lambda: steady() + 120)
    assert instances.beat(us).was_set
    assert not instances.beat(us).was_set
    assert instances.gone({lost.id, left.id}) == {left.id: True}
    assert wait_until(lambda: lost.id in instances.gone({lost.id}), "the lease is over")


def test_slow_replies_are_not_mistaken_for_a_change_of_the_clock(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    instances, us = fleet.manager().stores.leases, Instance(LEASE)
    instances.beat(us)
    for _ in range(3):
        readings = iter((steady(), steady() + 2.6))  # asked now, and answered with this 2.6 s later
        monkeypatch.setattr("background.ledger.leases.steady", lambda: next(readings))  # noqa: B023
        assert not instances.beat(us).was_set
        monkeypatch.setattr("background.ledger.leases.steady", steady)
        assert not instances.beat(us).was_set


@pytest.mark.promise
def test_a_lease_from_before_the_databases_clock_was_set_back_is_invalid(fleet: Fleet) -> None:
    instances, instance = fleet.manager(WORKERS_LEASE_SECONDS=1.5).stores.leases, Instance(LEASE)
    instances.beat(instance)
    later = datetime.now(UTC) + timedelta(minutes=2)
    with instances.engine.begin() as connection:
        connection.execute(update(tables.instances).values(heartbeat_at=later, expires_at=later + LEASE))
    assert instances.gone({instance.id}) == {}  # it has the length of a lease to renew
    assert wait_until(lambda: instances.gone({instance.id}), "the lease is over") == {instance.id: False}


@pytest.mark.promise
def test_a_lease_that_ends_while_a_heartbeat_hangs_is_noticed(fleet: Fleet) -> None:
    working, told, go_on = threading.Event(), threading.Event(), threading.Event()

    class Long(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            if not working.is_set():
                working.set()
                assert context.stopping.wait(PATIENCE)
                told.set()
                assert go_on.wait(PATIENCE)
            effect(context)

    manager = fleet.manager(Long, WORKERS_LEASE_SECONDS=0.5)
    manager.start()
    assert working.wait(PATIENCE)
    beat, released = manager.stores.leases.beat, threading.Event()

    def hang(*beating: Any) -> Pulse:
        assert released.wait(PATIENCE)
        return beat(*beating)

    manager.stores.leases.beat = hang  # type: ignore[method-assign]
    assert told.wait(PATIENCE)
    manager.stores.leases.beat = beat  # type: ignore[method-assign]
    released.set()
    go_on.set()
    wait_until(lambda: fleet.states()[0] != "running" and fleet.states()[-1] == "succeeded", "the second run")
    assert len(fleet.effects()) == 1


@pytest.mark.promise
def test_an_instance_whose_lease_is_over_begins_no_run_until_its_successor_has_joined(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    manager.start()
    wait_until(lambda: fleet.states() == ["succeeded"], "the first run")
    beat, went = manager.stores.leases.beat, threading.Event()

    def fail(*_beating: object) -> Pulse:
        went.set()
        raise RuntimeError("no answer")

    manager.stores.leases.beat = fail  # type: ignore[method-assign]
    assert went.wait(PATIENCE)
    before = manager.presence.instance
    before.deadline = steady()
    fleet.set("hourly", mark=last_hour() - HOUR)
    assert manager.tick("hourly", last_hour()) is None
    assert fleet.states() == ["succeeded"]
    manager.stores.leases.beat = beat  # type: ignore[method-assign]
    wait_until(lambda: fleet.states() == ["succeeded", "succeeded"], "the postponed tick")
    assert fleet.executions()[1].instance == manager.presence.instance.id != before.id


def test_a_process_that_leaves_while_its_threads_read_its_instance_ends_cleanly(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = fleet.manager(Hourly)
    manager.start()
    wait_until(lambda: fleet.states() == ["succeeded"], "the first run")
    supervisor, instance = manager.supervisor, manager.presence.instance
    manager.stop()
    asked: list[Instance | None] = []

    def leaving(_presence: Presence) -> Instance | None:
        """Return an object that is there for the first reader, and gone for the second."""
        asked.append(None if asked else instance)
        return asked[-1]

    monkeypatch.delattr(manager.presence, "instance")
    monkeypatch.setattr(Presence, "instance", property(leaving), raising=False)
    questions = [
        manager.presence.deadline,
        manager.presence.until_expiry,
        manager.presence.lose_lease,
        partial(supervisor.schedules.declare, ["hourly"]),
        supervisor.timers._now,
        partial(supervisor.timers.arm_first, "hourly"),
        partial(manager.recovery.gone, []),
        partial(ExitStack().enter_context, manager.presence.present()),
    ]
    for ask in questions:
        asked.clear()
        ask()
        assert asked, ask


@pytest.mark.promise
def test_work_held_when_a_lease_ends_is_lost_and_not_handed_back(fleet: Fleet) -> None:
    class Once(Hourly):
        on_lost = "skip"

        def do_work(self, context: WorkerContext) -> None:
            effect(context)
            context.instance.lease = timedelta()
            manager.stores.leases.beat(context.instance)  # the last heartbeat, with a lease that is over

    manager = fleet.manager(Once, WORKERS_HEARTBEAT_SECONDS=60, WORKERS_LEASE_SECONDS=200)
    assert manager.tick("once", last_hour()).state == "lost"
    assert fleet.states() == ["running"]
    assert manager.tick("once", last_hour()) is None
    assert (fleet.states(), fleet.effects()) == (["lost"], [])


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_processes_that_open_one_database_by_different_links_are_one_fleet(
    fleet: Fleet, database_url: str, tmp_path: Path
) -> None:
    paths = [Path(make_url(database_url).database), tmp_path / "releases" / "2" / "shop.sqlite"]
    paths[1].parent.mkdir(parents=True)
    paths[1].symlink_to(paths[0])
    apps = [make_app(f"sqlite:///{path}") for path in paths]
    here, there = [app.extensions["background_workers"] for app in apps]
    assert there.stores.leases.gone({here.presence.sign_on().id}) == {}
    close(*apps)


@on_sqlite
def test_after_the_file_of_the_instances_is_deleted_they_join_in_a_new_file(fleet: Fleet, sqlite_url: str) -> None:
    manager, newcomer = fleet.manager(), fleet.manager()
    manager.start()
    instance = wait_until(lambda: manager.presence.instance, "the joining")
    with manager.lock("invoice-42") as lock:
        for path in glob.glob(f"{make_url(sqlite_url).database}-instances*"):
            os.unlink(path)
        wait_until(lambda: newcomer.stores.leases.gone({instance.id}) == {}, "a heartbeat into the new file")
        with newcomer.lock("invoice-42") as other:
            assert other is not None
            assert not lock.still_held()
            assert other.still_held()
