"""Public incidents of other schedulers. Each is a test here, and a section of docs/incidents.md."""

import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, make_url
from support.databases import administer, on_postgresql, on_sqlite
from support.fleet import HOUR, PATIENCE, Fleet, Hourly, at_once, effect, last_hour, wait_until
from support.fork_server import Nursery, Shops
from support.processes import ROOT, environment, eventually, flask, gunicorn, started
from support.proxy import Proxy
from support.run_traces import EPOCH, Effects

from background import ClaimLost, Message, MessageWorker, WorkerContext
from background.database import tables
from background.schedule.cron import Cron

PAGE = ROOT / "docs" / "incidents.md"
SECOND = timedelta(seconds=1)
RARELY = timedelta(days=366)


class EverySecond(Hourly):
    period = SECOND


def ran(fleet: Fleet, name: str) -> list[datetime]:
    return [row.tick for row in fleet.executions(name) if row.state == "succeeded"]


def is_once(keys: list[str]) -> bool:
    return len(keys) == len(set(keys))


# -- one job, several processes --------------------------------------------------------------------


def test_flask_apscheduler_13_four_processes_of_gunicorn_run_each_tick_once(nursery: Nursery, effects: Effects) -> None:
    command = gunicorn("-w", "4", "support.traced_app:create_app()")
    with nursery.forked(command, environment(effects.url)) as server:
        server.wait_for("joined", times=4)
        before = len(effects.ticks())
        assert eventually(lambda: len(effects.ticks()) >= before + 3)
        assert len(effects.instances(alive=True)) == 4
    effects.check_once()


@on_sqlite
def test_flask_apscheduler_139_in_debug_mode_the_serving_process_alone_runs_workers(effects: Effects) -> None:
    with started(flask("run", "--debug", "--port", "0"), environment(effects.url)) as server:
        server.wait_for("joined")
        assert eventually(lambda: len(effects.ticks()) >= 3)
        (serving,) = effects.instances()
        assert serving != server.pid
    effects.check_once()


@on_sqlite
def test_flask_apscheduler_87_with_preload_each_process_starts_its_workers_after_the_fork(
    nursery: Nursery, effects: Effects
) -> None:
    command = gunicorn("-w", "2", "--preload", "support.traced_app:create_app()")
    with nursery.forked(command, environment(effects.url)) as server:
        server.wait_for("joined", times=2)
        assert eventually(lambda: len(effects.ticks()) >= 2)
        assert len(effects.instances()) == 2
        assert server.pid not in effects.instances()
    effects.check_once()


def test_tickerq_900_of_two_nodes_at_the_same_instant_one_runs_the_tick(
    fleet: Fleet, nursery: Nursery, tmp_path: Path
) -> None:
    nodes = fleet.command("shared", last_hour().isoformat(), 2)
    code, said = nursery.run(nodes, environment(), tmp_path / "errors")
    assert code == 0, (tmp_path / "errors").read_text()
    assert sorted(said.split()) == ["None", "succeeded"]
    assert len(fleet.effects()) == 1


def test_oban_1488_a_process_that_lost_its_lease_unnoticed_doubles_no_tick(shops: Shops, effects: Effects) -> None:
    stale = shops.start(PROBE_FREEZES_AT="claimed", WORKERS_LEASE_SECONDS=1)
    stale.wait_until_frozen()
    shops.join()
    assert eventually(lambda: len(effects.ticks()) >= 2)
    stale.thaw()
    stale.wait_for("Instance .* could not renew its lease in time")
    before = len(effects.ticks())
    assert eventually(lambda: len(effects.ticks()) >= before + 3)
    assert len(effects.instances(alive=True)) == 2
    effects.check_once()


def test_oban_py_32_processes_of_one_host_name_and_one_process_id_are_two_instances(
    shops: Shops, effects: Effects
) -> None:
    """Check it with containers' process ids: each process is the first of its own namespace."""
    try:
        one = shops.start(alone=True, PROBE_WORKERS="deaf", WORKERS_LEASE_SECONDS=1)
    except PermissionError as error:
        pytest.skip(str(error))
    one.wait_for("The deaf one began")
    shops.join(alone=True, PROBE_WORKERS="deaf", PROBE_SECONDS=0)
    assert effects.states("deaf") == [("running", 1)]
    one.kill()
    assert eventually(lambda: effects.states("deaf") == [("lost", 1), ("succeeded", 2)])
    lost, again = effects.history("deaf")
    assert lost["instance_name"] == again["instance_name"]
    assert lost["instance"] != again["instance"]
    effects.check_once("deaf")


# -- a restart, a deploy, an outage ----------------------------------------------------------------


def test_sidekiq_6804_a_run_of_a_process_that_is_told_to_stop_goes_on_in_another_at_once(
    shops: Shops, effects: Effects
) -> None:
    patient = {"PROBE_WORKERS": "listener", "WORKERS_LEASE_SECONDS": 600}
    [leaving] = shops.join(**patient)
    leaving.wait_for("The listener began")
    shops.join(PROBE_SECONDS=0, **patient)
    leaving.signal(signal.SIGTERM)
    assert eventually(lambda: effects.ticks("listener"))
    assert effects.states("listener") == [("handed back", 1), ("succeeded", 1)]
    effects.check_once("listener")


def test_goodjob_1484_a_tick_between_the_old_release_and_the_new_one_runs_once(fleet: Fleet) -> None:
    old = fleet.manager(Hourly)
    assert old.tick("hourly", last_hour() - HOUR).state == "succeeded"
    old.stop()
    new = fleet.manager(Hourly)
    new.start()
    wait_until(lambda: ran(fleet, "hourly") == [last_hour() - HOUR, last_hour()], "the tick of the gap")
    assert len(fleet.effects()) == 2


def test_bullmq_3262_a_second_process_and_a_restart_of_both_leave_the_schedule_alive(
    shops: Shops, effects: Effects
) -> None:
    members = []
    for more in (1, 1, 2):
        if more == 2:
            for member in members:
                member.signal(signal.SIGTERM)
            assert [member.wait() for member in members] == [0, 0]
        members += shops.join(more)
        before = len(effects.ticks())
        assert eventually(lambda: len(effects.ticks()) >= before + 2)  # noqa: B023
    effects.check_once()


def test_kubernetes_42649_after_a_night_off_the_latest_tick_runs_and_one_row_has_the_rest(fleet: Fleet) -> None:
    manager, hours = fleet.manager(Hourly), 500
    manager.tick("hourly", last_hour() - hours * HOUR)
    fleet.set("hourly", scheduled_at=last_hour() - hours * HOUR)
    manager.start()
    wait_until(lambda: len(ran(fleet, "hourly")) == 2, "the latest tick")
    _, missed, run = fleet.executions("hourly")
    assert (missed.state, missed.tick, missed.through) == (
        "missed",
        last_hour() - (hours - 1) * HOUR,
        last_hour() - HOUR,
    )
    assert run.tick == last_hour()


@on_sqlite
def test_dbos_803_a_process_that_was_suspended_does_not_replay_each_tick(shops: Shops, effects: Effects) -> None:
    [process] = shops.join(PROBE_PERIOD=0.1, WORKERS_LEASE_SECONDS=60)
    assert eventually(effects.ticks)
    process.freeze()
    frozen = datetime.now(UTC)
    time.sleep(1)
    thawed = datetime.now(UTC)
    process.thaw()
    assert eventually(lambda: effects.ticks()[-1] > thawed)
    assert len([tick for tick in effects.ticks() if frozen < tick < thawed - 2 * SECOND / 10]) <= 1
    effects.check_answered(timedelta(seconds=0.1))


@on_postgresql
def test_windmill_10168_a_run_whose_connections_are_ended_leaves_the_schedule_alive(fleet: Fleet) -> None:
    working, go_on = threading.Event(), threading.Event()

    class Cut(EverySecond):
        def do_work(self, context: WorkerContext) -> None:
            effect(context, context.attempt)
            if context.token == 1:
                context.session.flush()
                working.set()
                assert go_on.wait(PATIENCE)

    fleet.manager(Cut).start()
    assert working.wait(PATIENCE)
    url = make_url(fleet.database_url)
    others = f"datname = '{url.database}' AND pid <> pg_backend_pid()"
    administer(url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
    go_on.set()
    wait_until(lambda: len(ran(fleet, "cut")) >= 2, "two runs")
    first, again, *_ = fleet.executions("cut")
    assert (first.state, again.state, again.tick, again.attempt) == ("lost", "succeeded", first.tick, 2)
    assert is_once(fleet.keys())


@pytest.fixture
def wire(postgresql_url: str) -> Iterator[Proxy]:
    wire = Proxy(make_url(postgresql_url))
    yield wire
    wire.close()


@on_postgresql
def test_shedlock_1254_a_worker_whose_database_went_away_runs_again_without_a_restart(
    fleet: Fleet, wire: Proxy
) -> None:
    working, go_on = threading.Event(), threading.Event()

    class Away(EverySecond):
        def do_work(self, context: WorkerContext) -> None:
            effect(context)
            if context.token == 1:
                working.set()
                assert go_on.wait(PATIENCE)

    fleet.database_url = wire.url.render_as_string(hide_password=False)
    manager = fleet.manager(Away, WORKERS_LEASE_SECONDS=1)
    manager.start()
    assert working.wait(PATIENCE)
    instance = manager.presence.instance
    wire.refuse()
    wait_until(lambda: not instance.is_alive, "the end of the lease")
    go_on.set()
    wire.heal()
    wait_until(lambda: len(ran(fleet, "away")) >= 2, "two runs")
    assert fleet.states("away")[0] == "lost"
    assert is_once(fleet.keys())


def test_cockroachdb_58418_a_run_from_before_a_restore_cannot_commit_after_it(fleet: Fleet) -> None:
    working, go_on, refused = threading.Event(), threading.Event(), threading.Event()

    class Backup(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            fleet.set("backup", mark=None, token=0, running=None, claim=None)
            with fleet.engine.begin() as connection:
                connection.execute(delete(tables.executions))
            again.start()
            assert working.wait(PATIENCE)
            effect(context, "from before the restore")
            try:
                context.commit()
            except ClaimLost:
                refused.set()
                raise
            finally:
                context.session.rollback()
                go_on.set()
                again.join()

    class Restored(Hourly):
        name = "backup"

        def do_work(self, context: WorkerContext) -> None:
            working.set()
            assert go_on.wait(PATIENCE)
            effect(context, context.token)

    old, restored = fleet.manager(Backup), fleet.manager(Restored)
    again = threading.Thread(target=restored.tick, args=("backup", last_hour()))
    old.tick("backup", last_hour())
    assert refused.is_set()
    assert fleet.effects() == ["1"]


# -- clocks and time zones -------------------------------------------------------------------------


def test_apscheduler_292_a_tick_that_starts_more_than_a_second_late_runs(fleet: Fleet) -> None:
    began, go_on = threading.Event(), threading.Event()

    class Long(Hourly):
        period = RARELY

        def do_work(self, context: WorkerContext) -> None:
            began.set()
            assert go_on.wait(PATIENCE)

    class Late(Hourly):
        period = 2 * SECOND
        run_on_first_start = False

    manager = fleet.manager(Long, Late, WORKERS_THREADS=1)
    manager.start()
    assert began.wait(PATIENCE)
    now = manager.recovery.look(Late).clock
    tick = now + Late.period - (now - EPOCH) % Late.period
    time.sleep((tick - now).total_seconds() + 1.1)
    go_on.set()
    row = wait_until(lambda: [row for row in fleet.executions("late") if row.state == "succeeded"], "the late run")[0]
    assert row.started_at - row.tick > SECOND


def test_solid_queue_615_timers_that_wake_up_early_wait_for_the_tick_and_run_it_once(fleet: Fleet) -> None:
    managers = [fleet.manager(EverySecond) for _ in range(3)]
    clock = managers[0].recovery.look(EverySecond).clock
    tick = clock.replace(microsecond=0) + SECOND
    runs = at_once(3, lambda number: managers[number].tick("every_second", tick))
    assert len([run for run in runs if run]) == 1
    (row,) = fleet.executions("every_second")
    assert row.started_at >= tick
    assert len(fleet.effects()) == 1


def test_kubernetes_121594_a_daily_tick_in_the_repeated_hour_of_autumn_falls_once() -> None:
    daily, night = Cron("0 2 * * *", "Europe/Berlin"), datetime(2023, 10, 28, 12, tzinfo=UTC)
    first = daily.next(night)
    assert first == datetime(2023, 10, 29, 0, tzinfo=UTC)
    assert daily.next(first) == datetime(2023, 10, 30, 1, tzinfo=UTC)


def test_celery_6438_a_tick_each_minute_goes_on_through_the_repeated_hour_of_autumn() -> None:
    each, tick = Cron("* * * * *", "Europe/Paris"), datetime(2020, 10, 24, 23, tzinfo=UTC)
    for _ in range(4 * 60):
        following = each.next(tick)
        assert following == tick + timedelta(minutes=1)
        tick = following


def test_db_scheduler_59_a_new_worker_waits_for_its_first_tick(fleet: Fleet) -> None:
    class Daily(Hourly):
        period = RARELY
        run_on_first_start = False

    class Witness(EverySecond):
        """Its first run shows that the scheduler has armed both workers."""

    fleet.manager(Daily, Witness).start()
    wait_until(lambda: len(ran(fleet, "witness")) >= 2, "two runs of the other worker")
    assert fleet.executions("daily") == []


# -- long runs, locks and messages -----------------------------------------------------------------


def test_apscheduler_1116_a_run_that_lasts_longer_than_the_lease_runs_once(fleet: Fleet) -> None:
    class Long(Hourly):
        period = RARELY

        def do_work(self, context: WorkerContext) -> None:
            threading.Event().wait(1.8)
            effect(context, context.attempt)

    for _ in range(2):
        fleet.manager(Long, WORKERS_LEASE_SECONDS=1).start()
    wait_until(fleet.effects, "the end of the run")
    assert fleet.states("long") == ["succeeded"]
    assert fleet.effects() == ["1"]


def test_windmill_10844_each_tick_that_a_long_run_swallows_has_a_row_with_the_reason(fleet: Fleet) -> None:
    class Slow(EverySecond):
        period = timedelta(seconds=0.2)

        def do_work(self, context: WorkerContext) -> None:
            threading.Event().wait(0.5)

    fleet.manager(Slow).start()
    wait_until(lambda: len(ran(fleet, "slow")) >= 3, "three runs")
    rows = fleet.executions("slow")
    decided = {row.tick + number * Slow.period for row in rows for number in range(ticks_of(row, Slow.period))}
    first, last = min(decided), max(decided)
    assert decided == {first + number * Slow.period for number in range((last - first) // Slow.period + 1)}
    skipped = [row for row in rows if row.state == "skipped"]
    assert skipped
    assert all("still running the tick" in row.reason for row in skipped)


def ticks_of(row: Any, period: timedelta) -> int:
    """Return the number of ticks that an execution's row answers for."""
    return int(((row.through or row.tick) - row.tick) / period) + 1


def test_solid_queue_761_a_zombie_releases_no_lock_that_another_process_holds(shops: Shops, fleet: Fleet) -> None:
    zombie, manager = shops.start(PROBE_WORKERS="locker", WORKERS_LEASE_SECONDS=1), fleet.manager()
    zombie.wait_for("The locker has the token 1")
    zombie.freeze()
    with manager.lock("invoice-42", timeout=PATIENCE) as lock:
        zombie.thaw()
        zombie.wait_for("The locker released it")
        assert lock.still_held()
        with fleet.manager().lock("invoice-42") as third:
            assert third is None


def test_kombu_337_a_message_delayed_beyond_the_lease_is_handled_once(fleet: Fleet) -> None:
    class Delayed(MessageWorker):
        topic = "delayed"

        def handle(self, message: Message, context: WorkerContext) -> None:
            effect(context, message.attempt)

    for _ in range(3):
        fleet.manager(Delayed, WORKERS_LEASE_SECONDS=0.5).start()
    sent = time.monotonic()
    fleet.enqueue("delayed", 1, delay=1.2 * SECOND)
    wait_until(fleet.effects, "the message")
    assert time.monotonic() - sent >= 1.2
    (message,) = fleet.messages()
    assert message.state == "done"
    assert fleet.effects() == ["1"]


# -- the page --------------------------------------------------------------------------------------


def test_each_incident_of_the_page_has_a_test_of_its_number_and_the_other_way_round() -> None:
    sections = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
    named = []
    for section in sections:
        title = section.partition("\n")[0]
        number = re.search(r" #(\d+):", title)
        assert number, f"{title}: expected a title such as 'Oban #1488: a cron that was doubled for nineteen days'"
        (test,) = re.findall(r"`(test_\w+)`", section)
        project = re.sub(r"\W+", "_", title[: number.start()].lower())
        assert test.startswith(f"test_{project}_{number[1]}_"), f"{title}: it names {test}"
        assert re.search(rf"\(https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/{number[1]}\)", section), title
        named.append(test)
    tests = [name for name in vars(sys.modules[__name__]) if re.match(r"test_\w+?_\d+_", name)]
    assert sorted(named) == sorted(tests)
    assert len(tests) >= 15
