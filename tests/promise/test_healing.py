"""Ticks and messages go on after the database's clock was ahead and is right again. No tick runs twice."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, delete, event, insert, make_url, update
from support.databases import administer
from support.fleet import HOUR, Fleet, Hourly, effect, last_hour, wait_until
from support.fork_server import Nursery, Shops
from support.run_traces import Effects

from background import Message, MessageWorker, PeriodicWorker, WorkerContext
from background.database import tables
from background.history.status import statuses
from background.repair import clock_ahead as clock_repair
from tests.promise.test_clocks import Host, clock_ahead, end, faked, host, ticks_on  # noqa: F401 - fixtures
from tests.promise.test_clocks import set_clock as set_host_clock

PERIOD = timedelta(seconds=1)
DAY = timedelta(days=1)


class Often(PeriodicWorker):
    period = timedelta(milliseconds=500)

    def do_work(self, context: WorkerContext) -> None:
        effect(context, context.attempt)


class Noting(MessageWorker):
    topic = "notes"

    def handle(self, message: Message, context: WorkerContext) -> None:
        effect(context, message.payload)


def now() -> datetime:
    return datetime.now(UTC)


def write(fleet: Fleet, worker: str, state: str, tick: datetime, through: datetime | None = None, **more: Any) -> None:
    """Write a row of the history."""
    ran = {"attempt": 1, "started_at": tick, "finished_at": tick} if state not in ("skipped", "missed") else {}
    row = {"worker": worker, "tick": tick, "through": through, "state": state, "trigger": "schedule", **ran, **more}
    with fleet.engine.begin() as connection:
        connection.execute(insert(tables.executions).values(row))


def rows(fleet: Fleet, name: str = "hourly") -> list[tuple[str, datetime, datetime | None]]:
    return [(row.state, row.tick, row.through) for row in fleet.executions(name)]


def assert_once(fleet: Fleet) -> None:
    keys = fleet.keys()
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("ahead", [timedelta(minutes=2), 3 * HOUR, 13 * DAY], ids=str)
def test_ticks_go_on_by_themselves_after_a_clock_that_was_ahead(fleet: Fleet, ahead: timedelta) -> None:
    manager = fleet.manager(Often)
    manager.start()
    wait_until(lambda: len(fleet.effects()) >= 2, "two runs")
    fleet.set("often", mark=now() + ahead, scheduled_at=now() + ahead)
    before = len(fleet.effects())
    wait_until(lambda: len(fleet.effects()) >= before + 3, "more runs")
    assert_once(fleet)
    assert not [each for each in statuses(manager.stores, manager.workers) if each.is_overdue]
    assert fleet.row("often").scheduled_at <= now()


def test_ticks_that_ran_while_the_clock_was_ahead_do_not_run_again_and_the_other_ticks_run(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    manager.recovery.look(Hourly)
    last = last_hour()
    write(fleet, "hourly", "succeeded", last - HOUR)
    write(fleet, "hourly", "missed", last, last + 3 * HOUR)  # the moment at which the clock was set ahead
    write(fleet, "hourly", "succeeded", last + 4 * HOUR)
    fleet.set("hourly", mark=last + 4 * HOUR, scheduled_at=last - DAY)
    assert manager.repair() == (["hourly"], 0)
    assert manager.repair() == ([], 0)
    assert fleet.row("hourly").mark == last - HOUR
    assert manager.tick("hourly", now()).state == "succeeded"
    assert rows(fleet) == [("succeeded", at, None) for at in (last - HOUR, last + 4 * HOUR, last)]
    # Four hours later, both by the worker's row and by the requested tick.
    state = manager.recovery.look(Hourly)
    passed = manager.stores.clock_repair.pass_over(state, last + 4 * HOUR, lambda attempt: attempt + 1)
    assert passed
    assert fleet.row("hourly").mark == last + 4 * HOUR
    assert not manager.stores.clock_repair.pass_over(state, last + 5 * HOUR, lambda attempt: attempt + 1)


def test_a_tick_with_an_execution_is_not_claimed_even_if_its_mark_was_lowered(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    assert manager.tick("hourly", now()).state == "succeeded"
    lowered = {"mark": last_hour() - HOUR, "mark_ahead": last_hour(), "scheduled_at": last_hour() - DAY}
    fleet.set("hourly", **lowered)
    schedule = manager.recovery.look(Hourly).schedule_text
    assert not manager.stores.ledger.claim("hourly", last_hour(), schedule, ("id", "name"))
    assert manager.ticks.run(Hourly, last_hour(), schedule) is None
    assert fleet.effects() == [""]
    assert fleet.row("hourly").mark == last_hour()


def test_no_tick_that_ran_while_the_clock_was_ahead_is_recorded_as_missed(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    manager.recovery.look(Hourly)
    last = last_hour()
    for hours in (7, 4, 3):
        write(fleet, "hourly", "succeeded", last - hours * HOUR)
    fleet.set("hourly", mark=last - 7 * HOUR, mark_ahead=last + HOUR, scheduled_at=last - DAY)
    assert manager.tick("hourly", now()).state == "succeeded"
    assert rows(fleet)[3:] == [
        ("missed", last - 6 * HOUR, last - 5 * HOUR),
        ("missed", last - 2 * HOUR, last - HOUR),
        ("succeeded", last, None),
    ]


def test_a_skipped_row_that_reaches_into_the_future_ends_at_the_latest_tick(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    manager.recovery.look(Hourly)
    last = last_hour()
    write(fleet, "hourly", "skipped", last - HOUR, last + 5 * HOUR)
    write(fleet, "hourly", "skipped", last + 7 * HOUR)
    fleet.set("hourly", mark=last + 7 * HOUR)
    assert manager.repair() == (["hourly"], 0)
    assert rows(fleet) == [("skipped", last - HOUR, last)]
    assert fleet.row("hourly").mark == last


@pytest.mark.parametrize(("state", "attempt"), [("handed back", 1), ("lost", 2)])
def test_a_tick_to_run_again_delays_no_other_tick_and_runs_when_it_is_due(
    fleet: Fleet, state: str, attempt: int
) -> None:
    manager = fleet.manager(Often)
    manager.recovery.look(Often)
    later = manager.recovery.look(Often).schedule.previous(now() + timedelta(seconds=8))
    write(fleet, "often", state, later)
    fleet.set(
        "often", mark=later, pending_tick=later, pending_attempt=attempt, pending_trigger="schedule", scheduled_at=now()
    )
    manager.start()
    wait_until(lambda: len(fleet.effects()) >= 2, "runs before it")
    assert now() < later
    wait_until(lambda: fleet.keys().count(f"often:{later.isoformat()}"), "its run")
    assert_once(fleet)
    found = [row for row in fleet.executions("often") if row.tick == later]
    assert [(row.state, row.attempt) for row in found] == [(state, 1), ("succeeded", attempt)]
    assert found[1].started_at >= later


def test_without_a_history_the_latest_tick_counts_as_run(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    manager.recovery.look(Hourly)
    fleet.set("hourly", mark=now() + DAY, scheduled_at=now() - 40 * DAY)
    manager.repair()
    assert fleet.row("hourly").mark == last_hour()
    assert manager.tick("hourly", now()) is None


def test_a_clock_that_was_ahead_of_all_history_waits_for_the_command(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    app = fleet.app(Often)
    manager = app.extensions["background_workers"]
    manager.start()
    wait_until(lambda: len(fleet.effects()) >= 2, "two runs")
    fleet.set("often", mark=now() + 400 * DAY)
    wait_until(lambda: "run `flask workers repair`" in caplog.text, "the warning")
    wait_until(
        lambda: [each for each in statuses(manager.stores, manager.workers) if each.is_overdue], "an overdue worker"
    )
    assert manager.stores.leases.is_steady
    before = len(fleet.effects())
    result = app.test_cli_runner().invoke(args=["workers", "repair"])
    assert (result.exit_code, result.output.endswith(": often.\n")) == (0, True), result.output
    wait_until(lambda: len(fleet.effects()) >= before + 2, "more runs")
    assert_once(fleet)
    result = app.test_cli_runner().invoke(args=["workers", "repair"])
    assert result.output.startswith("No worker and no message lies in the future")


def put_off(fleet: Fleet, by: timedelta, **more: Any) -> None:
    with fleet.engine.begin() as connection:
        moments = {"enqueued_at": now() + by, "due_at": now() + by}
        connection.execute(update(tables.messages).where(tables.messages.c.state == "waiting").values(**moments | more))


def test_messages_that_a_clock_ahead_delayed_are_handled_without_a_command(fleet: Fleet) -> None:
    app = fleet.app(Noting)
    manager = app.extensions["background_workers"]
    manager.stores.queue  # noqa: B018 - the tables are there
    fleet.enqueue("notes", *range(20))
    put_off(fleet, 400 * DAY)
    fleet.enqueue("notes", "much later", delay=HOUR)  # the next tick is before them now
    manager.start()
    wait_until(lambda: sorted(fleet.effects()) == sorted(map(str, range(20))), "the messages")
    fleet.enqueue("notes", "another", delay=30)
    put_off(fleet, DAY, due_at=now() + DAY)
    assert {row.state for row in fleet.messages()} == {"done", "waiting"}
    wait_until(lambda: {row.state for row in fleet.messages()} == {"done"}, "those that were put off meanwhile")


def test_a_message_that_its_handler_postponed_comes_after_that_time_or_once_the_clock_is_right(fleet: Fleet) -> None:
    manager = fleet.manager(Noting)
    year = now() + 365 * DAY
    fleet.enqueue("notes", "never failed", "failed before", "postponed by the right clock")
    put_off(fleet, timedelta(), postponed=1, due_at=year, claimed_at=year, attempt=tables.messages.c.id - 1)
    with fleet.engine.begin() as connection:
        right = update(tables.messages).where(tables.messages.c.id == 3)
        connection.execute(right.values(claimed_at=now()))
    assert manager.stores.leases.beat(manager.presence.sign_on(), ["notes"]).is_ahead
    assert manager.repair() == ([], 2)
    soon = now() + HOUR
    assert [row.due_at < soon for row in fleet.messages()] == [True, True, False]


def test_a_requested_delay_stays_and_a_delayed_attempt_comes_at_once(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock_repair, "_SLICE", 2)
    manager = fleet.manager(Noting)
    ids = fleet.enqueue("notes", "asked for", "delayed while ahead", "tried", "tried long ago", delay=2 * HOUR)
    asked, delayed, tried, long_ago = ids

    def change(id: int | None, **columns: Any) -> None:
        with fleet.engine.begin() as connection:
            connection.execute(update(tables.messages).where(tables.messages.c.id == id).values(**columns))

    change(delayed, enqueued_at=now() + DAY, due_at=now() + DAY + 2 * HOUR)
    change(tried, attempt=1, claimed_at=now() + DAY, due_at=now() + DAY + timedelta(minutes=1))
    change(long_ago, attempt=1, claimed_at=now() - HOUR, due_at=now() + DAY)
    before = {row.id: row.due_at for row in fleet.messages()}
    assert manager.repair() == ([], 3)
    due_in = {row.id: round((row.due_at - now()).total_seconds() / 60) for row in fleet.messages()}
    assert due_in == {asked: 120, delayed: 120, tried: 0, long_ago: 0}
    assert {row.id: row.due_at for row in fleet.messages()}[asked] == before[asked]
    assert all(row.enqueued_at <= now() + timedelta(seconds=1) for row in fleet.messages())
    assert manager.repair() == ([], 0)


@pytest.fixture
def set_clock(database_url: str) -> Iterator[Callable[[float], None]]:
    """Set the database's clock `seconds` ahead of the host's, by a function that replaces the database's own."""
    if database_url.startswith("sqlite"):
        ahead = [0.0]

        def strftime(_form: str, _now: str, *more: str) -> str:
            seconds = ahead[0] + (float(more[0].split()[0]) if more else 0.0)
            return (now() + timedelta(seconds=seconds)).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + "000"

        def opened(connection: Any, _record: Any) -> None:
            connection.create_function("strftime", -1, strftime)

        event.listen(Engine, "connect", opened)
        yield lambda seconds: ahead.__setitem__(0, seconds)
        event.remove(Engine, "connect", opened)
        return
    url = make_url(database_url)
    read = "SELECT pg_catalog.clock_timestamp() + seconds * interval ''1 second'' FROM fake.ahead"
    administer(
        url,
        "CREATE SCHEMA fake",
        "CREATE TABLE fake.ahead AS SELECT 0.0::float AS seconds",
        f"CREATE FUNCTION fake.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS '{read}'",
        f"ALTER DATABASE {url.database} SET search_path = fake, pg_catalog, public",
    )
    yield lambda seconds: administer(url, f"UPDATE fake.ahead SET seconds = {seconds}")


def test_after_the_clock_was_ahead_every_tick_runs_once_and_no_tick_waits_for_the_wrong_time(
    set_clock: Callable[[float], None], fleet: Fleet
) -> None:
    managers = [fleet.manager(Often, Noting, WORKERS_LEASE_SECONDS=1) for _ in range(2)]
    for manager in managers:
        manager.start()
    wait_until(lambda: len(fleet.keys()) >= 2, "two runs")
    set_clock(6)
    before = len(fleet.keys())
    wait_until(lambda: len(fleet.keys()) >= before + 3, "runs while it is ahead")
    fleet.enqueue("notes", "a", delay=1)
    set_clock(0)
    ahead, began = fleet.row("often").mark, time.monotonic()
    assert ahead > now() + timedelta(seconds=3)
    count = len(fleet.keys())
    wait_until(lambda: len(fleet.keys()) >= count + 2, "runs after it")
    wait_until(lambda: [row.state for row in fleet.messages()] == ["done"], "the message")
    assert now() < ahead
    print(f"\nticks and messages went on after {time.monotonic() - began:.1f} s")
    wait_until(lambda: fleet.row("often").mark > ahead, "the ticks after those that ran")
    assert_once(fleet)
    ran, told = [], []
    for row in fleet.executions("often"):
        (ran if row.attempt else told).append(row)
    assert {row.state for row in ran} <= {"succeeded", "running"}
    assert len(ran) == len({row.tick for row in ran})
    assert not [a.tick for a in ran for b in told if b.tick <= a.tick <= b.through]


def test_on_sqlite_ticks_go_on_after_the_hosts_clock_was_an_hour_ahead_and_no_tick_runs_twice(
    sqlite_url: str,
    tmp_path: Path,
    host: Host,  # noqa: F811
    faked: Nursery,  # noqa: F811
) -> None:
    effects, clock = Effects(sqlite_url), clock_ahead(tmp_path, 0)
    with ExitStack() as stack:
        hosts = [stack.enter_context(host(sqlite_url, clock, WORKERS_LEASE_SECONDS=2)) for _ in range(2)]
        for process in hosts:
            process.wait_for("joined")
        ticks_on(effects, 2)
        set_host_clock(clock, timedelta(seconds=12))
        ticks_on(effects, 3)
        set_host_clock(clock, timedelta())
        ahead, began = len(effects.ticks()), time.monotonic()
        ticks_on(effects, 3)
        print(f"\nwent on after {time.monotonic() - began:.1f} s")
        until = max(effects.ticks()[:ahead]) + 3 * PERIOD
        wait_until(lambda: effects.ticks()[-1] >= until, "the ticks after those that ran")
        for process in hosts:
            end(process)
    ticks = effects.ticks()
    assert len(ticks) == len(set(ticks))
    assert min(ticks[ahead:]) < max(ticks[:ahead])  # the tick did not wait until the clock reached that moment again
    assert all(each.at >= each.tick for each in effects.all())
    told = [row for row in effects.history("ticker") if row["state"] == "missed"]
    assert not [tick for tick in ticks for row in told if row["tick"] <= tick <= (row["through"] or row["tick"])]


def test_a_worker_whose_executions_are_deleted_before_its_process_is_killed_runs_again(
    shops: Shops, effects: Effects, fleet: Fleet
) -> None:
    more = {"PROBE_WORKERS": "listener", "WORKERS_LEASE_SECONDS": 1, "PROBE_SECONDS": 1}
    victim = shops.start(**more)
    victim.wait_for("The listener began")
    with fleet.engine.begin() as connection:
        connection.execute(delete(tables.executions))
    victim.kill()
    (other,) = shops.join(**more)
    wait_until(lambda: [row.state for row in fleet.executions()] == ["lost", "succeeded"], "the second attempt")
    lost, again = fleet.executions()
    assert (lost.tick, lost.attempt, again.attempt) == (again.tick, 1, 2)
    other.wait_for("was missing. It is written again: running")
