"""The manager: started instances of one fleet, the ticks that they catch up with, and the changes that they follow."""

import threading
import time
from datetime import UTC, datetime, timedelta, tzinfo
from functools import partial
from typing import Any

import pytest
from sqlalchemy import delete, select, text
from support.databases import on_postgresql
from support.fleet import HOUR, PATIENCE, Fleet, Hourly, at_once, effect, in_threads, last_hour, statements, wait_until

from background import InvalidSchedule, UnknownWorker, WorkerContext
from background.database import tables
from background.database.connections import made_once
from background.history.text import moment
from background.host.scheduler import Scheduler
from background.ledger.leases import Instance, Pulse
from background.process import timers as timers
from background.process.supervisor import Supervisor
from background.process.ticks import Ticks
from background.registry import declared_schedule
from background.tallies.rollup import RollUp


class Quick(Hourly):
    period = timedelta(seconds=0.25)


def ticks(fleet: Fleet, name: str, state: str = "succeeded") -> list[datetime]:
    return [execution.tick for execution in fleet.executions(name) if execution.state == state]


def test_two_started_instances_run_every_tick_once(fleet: Fleet) -> None:
    for manager in (fleet.manager(Quick), fleet.manager(Quick)):
        manager.start()
    wait_until(lambda: len(ticks(fleet, "quick")) >= 12, "the twelfth run")
    ran = ticks(fleet, "quick")
    assert ran == sorted(set(ran))
    assert all((tick - ran[0]) % Quick.period == timedelta() for tick in ran)
    keys = fleet.keys()
    assert len(keys) == len(set(keys))


def test_no_run_begins_before_its_tick(fleet: Fleet) -> None:
    fleet.manager(Quick).start()
    wait_until(lambda: len(ticks(fleet, "quick")) >= 4, "the fourth run")
    assert all(execution.started_at >= execution.tick for execution in fleet.executions() if execution.started_at)


def test_on_a_new_database_a_worker_with_run_on_first_start_runs_at_once(fleet: Fleet) -> None:
    fleet.manager(Hourly).start()
    wait_until(lambda: fleet.states() == ["succeeded"], "the first run")


@pytest.mark.promise
def test_a_restart_neither_repeats_a_tick_nor_starves_one(fleet: Fleet) -> None:
    for _ in range(3):
        manager = fleet.manager(Hourly)
        manager.start()
        wait_until(lambda: set(fleet.states()) == {"succeeded"}, "the first run")
        manager.stop()
    assert len({execution.tick for execution in fleet.executions()}) == len(fleet.executions())
    fleet.set("hourly", mark=last_hour() - HOUR, scheduled_at=last_hour() - 5 * HOUR)
    before = fleet.states()
    fleet.manager(Hourly).start()
    wait_until(lambda: fleet.states() == [*before, "succeeded"], "the tick that fell while nothing was up")


@pytest.mark.promise
def test_without_catch_up_a_start_waits_for_the_next_tick(fleet: Fleet) -> None:
    class Patient(Hourly):
        period = timedelta(seconds=2)
        catch_up = False
        run_on_first_start = False

    manager = fleet.manager(Patient)
    manager.tick("patient", last_hour())
    began = manager.recovery.look(Patient).clock
    manager.start()
    wait_until(lambda: len(ticks(fleet, "patient")) >= 2, "the next tick")
    assert ticks(fleet, "patient")[1] > began


def test_a_disabled_worker_is_not_woken_but_runs_by_hand(fleet: Fleet) -> None:
    class Off(Quick):
        enabled = False

    manager = fleet.manager(Off, Quick)
    manager.start()
    wait_until(lambda: len(ticks(fleet, "quick")) >= 3, "three runs of the other")
    assert manager.tick("off", last_hour()) is None
    assert fleet.executions("off") == []
    assert manager.trigger("off").state == "succeeded"


@pytest.mark.promise
def test_a_lost_tick_is_left_to_releases_that_enable_the_worker(fleet: Fleet) -> None:
    class Off(Quick):
        enabled = False

    class On(Quick):
        name = "off"
        catch_up = False
        run_on_first_start = False
        period = HOUR

    tick = last_hour()
    manager = fleet.manager(Off, Quick)
    manager.recovery.look(Off)
    fleet.set("off", mark=tick, pending_tick=tick, pending_attempt=1, pending_trigger="schedule")
    manager.start()
    wait_until(lambda: len(ticks(fleet, "quick")) >= 3, "three runs of the other")
    assert fleet.executions("off") == []
    fleet.manager(On).start()
    wait_until(lambda: ticks(fleet, "off") == [tick], "the run where it is enabled")


def test_a_worker_can_be_added_to_and_removed_from_a_started_manager(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    manager.start()
    wait_until(lambda: fleet.states("hourly") == ["succeeded"], "the start")
    manager.add(Quick)
    wait_until(lambda: len(ticks(fleet, "quick")) >= 2, "two runs of the added one")
    manager.remove("quick")
    assert manager.supervisor.scheduler.wait(PATIENCE)  # for runs that had begun
    count = len(fleet.executions("quick"))
    threading.Event().wait(0.6)  # two periods
    assert len(fleet.executions("quick")) == count


def test_a_reschedule_reaches_the_other_instances(fleet: Fleet) -> None:
    class Changing(Hourly):
        catch_up = False
        run_on_first_start = False

    first, second = fleet.manager(Changing), fleet.manager(Changing)
    first.start()
    second.start()
    wait_until(lambda: first.is_started and "changing" in fleet_rows(fleet), "the joining")
    assert first.reschedule("changing", period=Quick.period)
    assert not first.reschedule("changing", period=Quick.period)
    first.stop()
    wait_until(lambda: len(ticks(fleet, "changing")) >= 3, "the second one's runs")
    with pytest.raises(InvalidSchedule, match="neither a period nor a cron"):
        second.reschedule("changing", timezone="UTC")  # a time zone is for a cron only
    assert second.reschedule("changing")
    assert fleet.row("changing").schedule == "every 3600s"


@pytest.mark.promise
def test_a_reschedule_is_followed_within_two_heartbeats(fleet: Fleet) -> None:
    manager = fleet.manager(Rarely)
    manager.start()
    supervisor = wait_until(lambda: ticks(fleet, "rarely") and manager.supervisor, "the first run")
    beat, armed = manager.stores.leases.beat, []

    def note(*beating: Any) -> Pulse:
        armed.append(supervisor.timers.armed["rarely"])
        return beat(*beating)

    manager.stores.leases.beat = note  # type: ignore[method-assign]
    assert fleet.manager(Rarely).reschedule("rarely", period=2 * HOUR)
    began = len(armed)  # the next run to begin is the first of the two
    wait_until(lambda: len(armed) > began + 2, "the beginning of the third")
    assert armed[began + 2] < datetime.now(UTC) + 3 * HOUR


def fleet_rows(fleet: Fleet) -> set[str]:
    with fleet.engine.connect() as connection:
        return set(connection.scalars(select(tables.workers.c.name)))


@pytest.mark.promise
def test_a_worker_whose_row_was_deleted_goes_on(fleet: Fleet) -> None:
    """Delete the row, as a user or the restore of an older backup may do."""
    fleet.manager(Quick).start()
    wait_until(lambda: ticks(fleet, "quick"), "the first run")
    with fleet.engine.begin() as connection:
        connection.execute(delete(tables.workers))
        connection.execute(delete(tables.executions))
    wait_until(lambda: len(ticks(fleet, "quick")) >= 3, "the third run after that")


@pytest.mark.promise
def test_a_worker_with_only_its_own_row_deleted_repeats_no_tick_and_runs_the_next_tick(fleet: Fleet) -> None:
    """Check that its history shows the decided ticks and the used tokens."""
    manager, tick = fleet.manager(Hourly), last_hour()
    for number in (2, 1):
        assert manager.tick("hourly", tick - number * HOUR).state == "succeeded"
    with fleet.engine.begin() as connection:
        connection.execute(delete(tables.workers))
    assert manager.tick("hourly", tick - HOUR) is None
    assert manager.tick("hourly", tick).claim.token == 3
    assert fleet.states() == ["succeeded"] * 3


@pytest.mark.promise
def test_an_instance_survives_an_error_that_is_not_the_databases(fleet: Fleet) -> None:
    """Check, for example, a time that a user wrote in another format."""
    manager = fleet.manager(Quick, WORKERS_LEASE_SECONDS=PATIENCE)
    beat, failures = manager.stores.leases.beat, []

    def fail(*beating: Any) -> Pulse:
        if len(failures) < 3 and manager.presence.instance is not None:
            failures.append(beating)
            raise ValueError("time data does not match format")
        return beat(*beating)

    manager.stores.leases.beat = fail  # type: ignore[method-assign]
    manager.start()
    instance = wait_until(lambda: len(failures) == 3 and manager.presence.instance, "the third failure")
    deadline = instance.deadline
    wait_until(lambda: instance.deadline > deadline, "the next heartbeat")


class Rarely(Hourly):
    period = timedelta(days=300)


def joined(fleet: Fleet) -> tuple[Supervisor, datetime]:
    """Give a started instance that waits for a tick in months, and that tick."""
    manager = fleet.manager(Rarely)
    manager.start()
    wait_until(lambda: ticks(fleet, "rarely"), "the first run")
    supervisor = manager.supervisor
    assert supervisor is not None
    return supervisor, ticks(fleet, "rarely")[0] + Rarely.period


@pytest.mark.promise
def test_a_tick_whose_claim_fails_with_an_unexpected_error_is_claimed_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = fleet.manager(Rarely)
    claim, failures = manager.stores.ledger.claim, [ZeroDivisionError("out of nowhere")]

    def fail_once(*what: Any) -> Any:
        if failures:
            raise failures.pop()
        return claim(*what)

    monkeypatch.setattr(manager.stores.ledger, "claim", fail_once)
    manager.start()
    wait_until(lambda: fleet.states() == ["succeeded"], "the run")
    assert "cannot claim the tick" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.promise
def test_a_tick_fired_by_a_wrong_clock_is_fired_again(fleet: Fleet) -> None:
    supervisor, tick = joined(fleet)
    manager = fleet.apps[-1].extensions["background_workers"]
    schedule = manager.recovery.look(Rarely).schedule_text
    supervisor.timers._fire("rarely", tick, schedule)  # as a host clock that was set ahead does
    assert supervisor.timers.armed["rarely"] > tick
    instance = manager.presence.instance
    assert instance is not None

    def is_armed() -> bool:
        if supervisor.timers.armed["rarely"] == tick:
            return True
        instance.clock_offset += timedelta(seconds=1)  # a heartbeat that begins after this finds another tick
        return False

    wait_until(is_armed, "the tick is waited for again")


@pytest.mark.promise
def test_a_host_that_slept_finds_due_ticks_with_its_next_heartbeat(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor, tick = joined(fleet)
    time.sleep(0.5)  # now it waits only for the heartbeat

    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return tick + timedelta(seconds=1)

    monkeypatch.setattr("apscheduler.schedulers.base.datetime", Later)
    wait_until(lambda: supervisor.timers.armed["rarely"] > tick, "it was fired")


@pytest.mark.promise
def test_losers_of_many_ticks_at_one_moment_find_them_decided_by_one_read(fleet: Fleet) -> None:
    workers = [type(name, (Hourly,), {"name": name}) for name in ("first", "second", "third", "open")]
    winner, loser = fleet.manager(*workers), fleet.manager(*workers)
    for name in ("first", "second", "third"):
        winner.tick(name, last_hour())
    loser.tick("first", last_hour() - HOUR)  # makes its connection
    ticks = Ticks(loser.stores, loser.presence, loser.recovery, loser.runs, print)
    with statements(loser.stores.main.engine) as seen:
        found = [ticks.is_decided(worker.name, last_hour()) for worker in workers]
    assert found == [True, True, True, False]
    assert len(seen) == 1
    winner.tick("open", last_hour())
    wait_until(lambda: ticks.is_decided("open", last_hour()), "another read")


@pytest.mark.promise
def test_a_tick_that_a_yielding_instance_finds_open_is_run(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = fleet.manager(Rarely)
    monkeypatch.setattr(Scheduler, "is_awaited", True)
    asked: list[bool] = []
    is_decided = Ticks.is_decided

    def note(self: Ticks, name: str, tick: datetime) -> bool:
        asked.append(is_decided(self, name, tick))
        return asked[-1]

    monkeypatch.setattr(Ticks, "is_decided", note)
    manager.start()
    supervisor = wait_until(lambda: ticks(fleet, "rarely") and manager.supervisor, "the first run")
    supervisor.timers._yielding.add("rarely")
    tick = supervisor.timers.armed["rarely"] - Rarely.period
    fleet.set("rarely", mark=tick - HOUR)
    supervisor.timers._fire("rarely", tick, manager.recovery.look(Rarely).schedule_text)
    assert asked == [False]
    assert ticks(fleet, "rarely").count(tick) == 2


def test_a_pause_and_a_resume_reach_the_other_instances(fleet: Fleet) -> None:
    started, other = fleet.manager(Quick), fleet.manager(Quick)
    started.start()
    wait_until(lambda: len(ticks(fleet, "quick")) >= 2, "two runs")
    assert other.pause("quick")

    def paused() -> list[Any]:
        return [each for each in fleet.executions() if each.state == "skipped" and each.reason.startswith("paused")]

    skipped = wait_until(paused, "a skipped tick")[-1]
    count = len(ticks(fleet, "quick"))

    # In the same row, or in another one behind a missed tick.
    wait_until(lambda: paused()[-1].through > skipped.through, "the next skipped tick")
    assert other.resume("quick")
    wait_until(lambda: len(ticks(fleet, "quick")) > count, "the next run")


@pytest.mark.promise
def test_a_lost_tick_runs_again_after_a_pause(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    manager.recovery.look(Hourly)
    manager.stores.ledger.claim("hourly", last_hour(), "every 3600s", ("ghost", "elsewhere:1"))
    manager.pause("hourly")
    manager.start()
    wait_until(lambda: fleet.states() == ["lost"], "the taking back")
    manager.resume("hourly")
    wait_until(lambda: fleet.states() == ["lost", "succeeded"], "the second attempt")


@pytest.mark.promise
@on_postgresql
def test_a_row_locked_by_a_frozen_process_does_not_use_up_the_threads(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly, Quick, WORKERS_THREADS=2)
    manager.recovery.look(Hourly)
    manager.stores.ledger.claim("hourly", last_hour(), "every 3600s", ("ghost", "elsewhere:1"))
    with fleet.engine.connect() as frozen:
        frozen.execute(select(tables.workers).where(tables.workers.c.name == "hourly").with_for_update(read=True))
        manager.start()
        wait_until(lambda: len(ticks(fleet, "quick")) >= 6, "six runs of the other worker")
        assert fleet.states("hourly") == ["running"]
    wait_until(lambda: fleet.states("hourly") == ["lost", "succeeded"], "the taking over")


@pytest.mark.promise
def test_two_releases_with_different_periods_run_no_tick_twice_and_follow_the_newest_release(fleet: Fleet) -> None:
    old = type("Changing", (Hourly,), {"period": timedelta(seconds=0.3)})
    new = type("Changing", (Hourly,), {"period": timedelta(seconds=0.5)})
    fleet.manager(old).start()
    wait_until(lambda: len(ticks(fleet, "changing")) >= 3, "the old release's runs")
    fleet.manager(new).start()
    wait_until(lambda: fleet.row("changing").schedule == "every 0.5s", "the new schedule")
    since = fleet.row("changing").scheduled_at
    wait_until(lambda: len([tick for tick in ticks(fleet, "changing") if tick > since]) >= 4, "runs by it")
    ran = ticks(fleet, "changing")
    assert ran == sorted(set(ran))
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    assert all((tick - epoch) % timedelta(seconds=0.5) == timedelta() for tick in ran if tick > since)
    keys = fleet.keys()
    assert len(keys) == len(set(keys))


@pytest.mark.promise
def test_after_the_newest_release_has_left_the_remaining_release_sets_the_schedule(fleet: Fleet) -> None:
    """Restart a process of the old release in the middle of a deploy, and stop it at the end."""
    old = type("Changing", (Hourly,), {"period": timedelta(seconds=0.3)})
    new = type("Changing", (Hourly,), {"period": timedelta(seconds=0.5)})
    fleet.manager(new).start()
    wait_until(lambda: ticks(fleet, "changing"), "the new release's first run")
    late = fleet.manager(old)
    late.start()
    wait_until(lambda: fleet.row("changing").schedule == "every 0.3s", "the old schedule again")
    late.stop()
    wait_until(lambda: fleet.row("changing").schedule == "every 0.5s", "the new schedule for good")
    keys = fleet.keys()
    assert len(keys) == len(set(keys))


@pytest.mark.promise
def test_a_schedule_set_by_a_user_survives_a_release_with_another_schedule(fleet: Fleet) -> None:
    old = fleet.manager(type("Changing", (Hourly,), {"period": 2 * HOUR}))
    old.recovery.look(old.workers["changing"])
    assert old.reschedule("changing", period=3 * HOUR)
    new = fleet.manager(type("Changing", (Hourly,), {"period": 4 * HOUR}))
    new.start()
    row = wait_until(lambda: (row := fleet.row("changing")).declared == "every 14400s" and row, "the new declaration")
    assert row.schedule == "every 10800s"
    assert new.reschedule("changing")
    assert fleet.row("changing").schedule == "every 14400s"


@pytest.mark.promise
def test_a_tick_and_a_start_at_the_same_time_run_it_once(fleet: Fleet) -> None:
    managers = [fleet.manager(Hourly) for _ in range(3)]
    in_threads(*[manager.start for manager in managers[:2]], lambda: managers[2].tick("hourly", last_hour()))
    wait_until(lambda: "succeeded" in fleet.states(), "the run")
    for manager in managers:
        manager.stop()
    assert len(fleet.effects()) == len({execution.tick for execution in fleet.executions()})


@pytest.mark.promise
def test_a_manual_run_does_not_take_the_tick_of_a_started_instance_away(fleet: Fleet) -> None:
    working, go_on = threading.Event(), threading.Event()

    class Slow(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            if not working.is_set():
                working.set()
                assert go_on.wait(PATIENCE)
            effect(context)

    by_hand, started = fleet.manager(Slow), fleet.manager(Slow)
    manual = threading.Thread(target=by_hand.trigger, args=("slow",))
    manual.start()
    assert working.wait(PATIENCE)
    started.start()
    wait_until(lambda: started.presence.instance is not None and started.supervisor.timers.armed, "the start")
    go_on.set()
    manual.join(PATIENCE)
    wait_until(lambda: fleet.states() == ["succeeded", "succeeded"], "the tick")
    assert [execution.trigger for execution in fleet.executions()] == ["manual", "schedule"]


def test_a_start_and_an_immediate_stop_leave_nothing_behind(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    for _ in range(5):
        manager.start()
        manager.stop()
    assert manager.presence.instance is None
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("workers-")], "the threads' end")
    with manager.stores.leases.engine.connect() as connection:
        alive = select(tables.instances.c.id).where(tables.instances.c.signed_off_at.is_(None))
        assert connection.scalars(alive).all() == []


def test_a_stop_requests_the_end_of_the_runs_and_waits_for_them(fleet: Fleet) -> None:
    working = threading.Event()

    class Stoppable(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            working.set()
            assert context.stopping.wait(PATIENCE)
            effect(context, "tidied up")

    manager = fleet.manager(Stoppable)
    manager.start()
    assert working.wait(PATIENCE)
    began = time.monotonic()
    manager.stop()
    assert time.monotonic() - began < 5
    assert (fleet.states(), fleet.effects()) == (["succeeded"], ["tidied up"])


def test_a_stopped_manager_starts_again(fleet: Fleet) -> None:
    manager = fleet.manager(Quick)
    for runs in (2, 4):
        manager.start()
        wait_until(lambda runs=runs: len(ticks(fleet, "quick")) >= runs, "the runs")
        manager.stop()
    count = len(fleet.executions())
    owed = fleet.row("quick").pending_tick  # the run that was handed back comes first
    assert manager.trigger("quick").state == "succeeded"
    assert [row.trigger for row in fleet.executions()[count:]] == ["schedule"] * bool(owed) + ["manual"]


@pytest.mark.promise
def test_a_tick_that_is_due_when_another_schedule_comes_into_force_still_runs(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spread(Hourly):
        period = jitter = timedelta(seconds=1)

    monkeypatch.setattr(timers.random, "uniform", lambda *_: 360_000.0)  # this schedule does not begin in the test
    manager = fleet.manager(Spread, WORKERS_HEARTBEAT_SECONDS=0.1)
    manager.start()
    supervisor = manager.supervisor
    assert supervisor is not None
    armed = supervisor.timers.armed
    tick = wait_until(lambda: armed.get("spread"), "the first tick is waited for")
    assert manager.reschedule("spread", period=HOUR)
    assert fleet.row("spread").schedule == "every 3600s"
    assert armed["spread"] == tick


# -- asking for a run ------------------------------------------------------------------------------


def test_an_instance_of_the_fleet_does_a_requested_run_and_no_tick_is_lost(fleet: Fleet) -> None:
    fleet.manager(Hourly).start()
    wait_until(lambda: fleet.states() == ["succeeded"], "the catching up")
    asking = fleet.manager(Hourly)
    assert asking.request("hourly")
    assert asking.presence.instance is None
    wait_until(lambda: fleet.states() == ["succeeded", "succeeded"], "the requested run")
    assert [row.trigger for row in fleet.executions()] == ["schedule", "manual"]
    assert len({row.instance for row in fleet.executions()}) == 1


@pytest.mark.promise
def test_a_second_request_is_refused_until_the_first_has_ended(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    assert [manager.request("hourly"), manager.request("hourly")] == [True, False]
    manager.start()
    wait_until(lambda: sorted(fleet.states()) == ["succeeded", "succeeded"], "both runs")
    assert manager.request("hourly")
    wait_until(lambda: len(fleet.keys()) == 3, "the third run")


@pytest.mark.promise
def test_one_of_many_simultaneous_requests_is_granted(fleet: Fleet) -> None:
    managers = [fleet.manager(Hourly) for _ in range(4)]
    managers[0].recovery.look(Hourly)
    assert sorted(in_threads(*[partial(each.request, "hourly") for each in managers])) == [False, False, False, True]


@pytest.mark.promise
def test_a_pause_delays_a_requested_run_neither_before_nor_after_it_was_handed_back(fleet: Fleet) -> None:
    ran: list[int] = []

    class HandedBackOnce(Hourly):
        catch_up = False
        run_on_first_start = False

        def do_work(self, context: WorkerContext) -> None:
            ran.append(context.attempt)
            if len(ran) == 1:
                context.stopping.set()
                context.raise_if_stopping()

    manager = fleet.manager(HandedBackOnce)
    manager.pause("handed_back_once")
    manager.start()
    assert manager.request("handed_back_once")
    wait_until(lambda: fleet.states() == ["handed back", "succeeded"], "the second attempt")
    assert ran == [1, 1]
    assert {row.trigger for row in fleet.executions()} == {"manual"}


@pytest.mark.promise
def test_a_requested_run_whose_instance_died_runs_again(fleet: Fleet) -> None:
    class Reluctant(Hourly):
        catch_up = False
        run_on_first_start = False

    manager = fleet.manager(Reluctant)
    manager.pause("reluctant")
    manager.request("reluctant")
    ghost = Instance(timedelta(seconds=-1))
    manager.stores.leases.beat(ghost)
    tick = manager.recovery.look(Reluctant).owed
    assert tick is not None
    assert manager.stores.ledger.claim_pending("reluctant", tick, (ghost.id, ghost.name))
    manager.start()
    wait_until(lambda: fleet.states() == ["lost", "succeeded"], "the second attempt")
    assert [(row.trigger, row.tick, row.attempt) for row in fleet.executions()] == [
        ("manual", tick, 1),
        ("manual", tick, 2),
    ]


def test_a_request_for_an_unknown_worker_is_refused(fleet: Fleet) -> None:
    with pytest.raises(UnknownWorker, match="Did you mean 'hourly'"):
        fleet.manager(Hourly).request("hourli")


# -- its parts -------------------------------------------------------------------------------------


def test_threads_get_the_same_connections() -> None:
    class Slow:
        @made_once
        def connections(self) -> object:
            threading.Event().wait(0.1)
            return object()

    slow = Slow()
    assert len({id(each) for each in at_once(4, lambda _: slow.connections)}) == 1


# -- the first tick of a worker that the database does not know --------------------------------------


class Yearly(Hourly):
    """A worker whose latest tick is up to a year old."""

    period = None
    cron = "0 9 1 1 *"
    run_on_first_start = False


class Seldom(Hourly):
    period = timedelta(days=300)
    run_on_first_start = False


@pytest.mark.promise
@pytest.mark.parametrize("worker", [Yearly, Seldom])
def test_a_new_worker_runs_no_tick_from_before_its_registration(fleet: Fleet, worker: type[Hourly]) -> None:
    first, second = fleet.manager(worker, Quick), fleet.manager(worker, Quick)
    for manager in (first, second):
        manager.start()
    wait_until(lambda: len(ticks(fleet, "quick")) >= 3, "three runs of another worker")
    at = first.history.clock()
    for manager in (first, second, fleet.manager(worker)):
        assert manager.tick(worker.name, at) is None
        assert manager.tick(worker.name, declared_schedule(worker).previous(at)) is None
    assert fleet.executions(worker.name) == []
    answer = first.why(worker.name)
    assert answer.state == "before"
    assert f"whose first tick is {moment(declared_schedule(worker).next(at))}" in answer.sentence


@pytest.mark.promise
def test_a_caller_that_asks_for_the_latest_tick_of_a_new_worker_gets_it_once(fleet: Fleet) -> None:
    first, second = fleet.manager(Yearly), fleet.manager(Yearly)
    at = first.history.clock()
    assert first.tick("yearly", at).claim.tick == declared_schedule(Yearly).previous(at)
    assert second.tick("yearly", at) is None
    assert fleet.states() == ["succeeded"]


@pytest.mark.promise
def test_a_new_worker_begins_with_a_past_tick_that_the_caller_names(fleet: Fleet) -> None:
    tick = datetime(2026, 1, 1, 9, tzinfo=UTC)
    manager = fleet.manager(Yearly)
    assert manager.tick("yearly", tick).claim.tick == tick
    assert fleet.states() == ["succeeded"]


def test_a_new_worker_runs_its_first_tick_after_its_registration(fleet: Fleet) -> None:
    class Brief(Quick):
        period = timedelta(seconds=1)
        run_on_first_start = False

    manager = fleet.manager(Brief)
    manager.start()
    wait_until(lambda: ticks(fleet, "brief"), "the first run")
    state = manager.recovery.look(Brief)
    assert ticks(fleet, "brief")[0] == state.schedule.next(state.scheduled_at)


@pytest.mark.promise
def test_a_known_worker_catches_up_with_a_tick_after_an_outage(fleet: Fleet) -> None:
    fleet.manager(Yearly).recovery.look(Yearly)
    tick = datetime(2026, 1, 1, 9, tzinfo=UTC)
    fleet.set("yearly", scheduled_at=tick - timedelta(days=1), mark=tick.replace(year=2025))
    fleet.manager(Yearly).start()
    wait_until(lambda: ticks(fleet, "yearly") == [tick], "the tick that fell while nothing was up")


@pytest.mark.promise
def test_a_worker_with_run_on_first_start_begins_with_its_latest_tick_even_without_catch_up(fleet: Fleet) -> None:
    class Keen(Yearly):
        run_on_first_start = True
        catch_up = False

    for _ in range(2):
        manager = fleet.manager(Keen, Quick)
        manager.start()
        before = len(ticks(fleet, "quick"))
        wait_until(lambda: len(ticks(fleet, "quick")) > before + 2, "three runs of another worker")  # noqa: B023
        assert len(ticks(fleet, "keen")) == 1
        manager.stop()


# -- counting for the charts ---------------------------------------------------------------------


def test_an_instance_counts_the_runs_for_the_charts_when_its_heartbeat_finds_that_due(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RollUp, "is_due", lambda *_: True)
    manager = fleet.manager(Hourly)
    manager.start()
    wait_until(lambda: manager.charts.runs().gap is None, "all hours are counted")


def test_counting_that_fails_is_logged_and_tried_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(RollUp, "is_due", lambda *_: True)
    with fleet.engine.begin() as connection:
        connection.execute(text("ALTER TABLE background_chores RENAME TO away"))
    manager = fleet.manager(Hourly)
    manager.start()
    wait_until(lambda: "Cannot count the runs and messages for the charts yet" in caplog.text)
    with fleet.engine.begin() as connection:
        connection.execute(text("ALTER TABLE away RENAME TO background_chores"))
    wait_until(lambda: manager.stores.roll_up.counted()[1])
