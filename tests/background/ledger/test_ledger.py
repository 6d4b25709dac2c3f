"""The ledger: claims, marks, and an answer for every tick that did not run."""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection, delete, event, text, update
from sqlalchemy.exc import DatabaseError, OperationalError
from support.databases import on_postgresql, on_sqlite
from support.fleet import (
    HOUR,
    PATIENCE,
    Fleet,
    Hourly,
    Shared,
    at_once,
    effect,
    in_threads,
    last_hour,
    statements,
    wait_until,
)
from support.fork_server import Nursery
from support.processes import environment

from background import BackgroundWorkerManager, WorkerContext
from background.database import tables
from background.ledger.claim import BLOCKED, DECIDED
from background.registry import declared_schedule

MINUTE = timedelta(minutes=1)


@pytest.mark.promise
def test_one_of_eight_processes_at_the_same_instant_runs_the_tick(
    fleet: Fleet, nursery: Nursery, tmp_path: Path
) -> None:
    herd, errors = fleet.command("shared", last_hour().isoformat(), 8), tmp_path / "errors"
    code, said = nursery.run(herd, environment(), errors)
    assert code == 0, errors.read_text()
    assert sorted(said.split()) == ["None"] * 7 + ["succeeded"]
    assert fleet.states() == ["succeeded"]
    assert len(fleet.effects()) == 1


def test_a_tick_below_the_mark_is_refused_even_if_its_history_is_pruned(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    assert manager.tick("hourly", last_hour()).state == "succeeded"
    with fleet.engine.begin() as connection:
        connection.execute(delete(tables.executions))
    assert manager.tick("hourly", last_hour()) is None
    assert manager.tick("hourly", last_hour() - HOUR) is None
    assert fleet.executions() == []


def test_a_claim_that_comes_after_the_tick_ran_is_refused_even_if_it_looked_before(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    schedule = manager.recovery.look(Hourly).schedule_text
    assert manager.tick("hourly", last_hour()).state == "succeeded"
    assert manager.stores.ledger.claim("hourly", last_hour(), schedule, ("late", "elsewhere:1")) is DECIDED


def test_a_future_tick_does_not_run_early(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    assert manager.tick("hourly", datetime.now(UTC) + 2 * HOUR) is None
    assert manager.stores.ledger.claim("hourly", last_hour() + HOUR, "every 3600s", ("id", "name")) is BLOCKED
    assert fleet.row("hourly").mark is None
    assert fleet.executions() == []


def test_a_tick_just_ahead_is_claimed_once_the_databases_clock_reaches_it(fleet: Fleet) -> None:
    class Quick(Hourly):
        period = timedelta(seconds=0.5)

    manager = fleet.manager(Quick)
    manager.stores.controls.register({"quick": declared_schedule(Quick)})
    clock = manager.stores.ledger.look("quick").clock
    at = declared_schedule(Quick).next(clock + timedelta(seconds=0.2))
    assert manager.tick("quick", at).claim.tick == at
    execution = fleet.executions()[-1]
    assert execution.tick == at
    assert execution.started_at >= at


def test_an_instance_that_comes_after_the_winner_does_one_read(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    manager.tick("hourly", last_hour())
    with statements(manager.stores.main.engine) as seen, statements(fleet.engine) as shared:
        assert manager.tick("hourly", last_hour()) is None
    assert len(seen) == 1
    assert seen[0].startswith("SELECT")
    assert shared == []


def test_the_busy_states_are_those_with_a_run_a_pending_tick_or_a_stray_execution(fleet: Fleet) -> None:
    names = ("idle", "runs", "must_run", "strays")
    manager = fleet.manager(*(type(name, (Hourly,), {"name": name}) for name in names))
    for name in names:
        manager.tick(name, last_hour())
    fleet.set("must_run", pending_tick=last_hour(), pending_attempt=2, pending_trigger="schedule")
    manager.stores.ledger.claim_manual("runs", last_hour(), ("an id", "an instance"))
    with fleet.engine.begin() as connection:
        strays = update(tables.executions).where(tables.executions.c.worker == "strays")
        connection.execute(strays.values(state="running", finished_at=None))
    every, busy = manager.stores.ledger.states(), manager.stores.ledger.busy_states()
    assert set(every) == set(names)
    assert set(busy) == {"runs", "must_run", "strays"}
    assert all(replace(busy[name], clock=every[name].clock) == every[name] for name in busy)


def test_one_read_finds_the_workers_whose_tick_is_decided(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly, Shared)
    manager.tick("hourly", last_hour())
    with statements(manager.stores.main.engine) as seen:
        assert manager.stores.ledger.decided(last_hour()) == {"hourly"}
        assert manager.stores.ledger.decided(last_hour() + HOUR) == set()
    assert len(seen) == 2


def test_a_manual_run_at_the_tick_does_not_replace_the_tick(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    assert manager.trigger("hourly").state == "succeeded"
    assert fleet.row("hourly").mark is None
    assert manager.tick("hourly", last_hour()).state == "succeeded"
    assert [execution.trigger for execution in fleet.executions()] == ["manual", "schedule"]


def test_a_tick_during_a_manual_run_runs_after_it(fleet: Fleet) -> None:
    working, go_on = threading.Event(), threading.Event()

    class Slow(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            working.set()
            assert go_on.wait(PATIENCE)

    manager = fleet.manager(Slow)
    manual = threading.Thread(target=manager.trigger, args=("slow",))
    manual.start()
    assert working.wait(PATIENCE)
    assert manager.tick("slow", last_hour()) is None
    assert fleet.row("slow").mark is None
    go_on.set()
    manual.join(PATIENCE)
    assert manager.tick("slow", last_hour()).state == "succeeded"
    assert [(execution.trigger, execution.state) for execution in fleet.executions()] == [
        ("manual", "succeeded"),
        ("schedule", "succeeded"),
    ]


def test_one_of_two_simultaneous_manual_runs_runs(fleet: Fleet) -> None:
    go_on = threading.Event()

    class Slow(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            assert go_on.wait(PATIENCE)
            effect(context)

    first, second = fleet.manager(Slow), fleet.manager(Slow)

    def trigger_and_release(manager: object) -> object:
        execution = manager.trigger("slow")  # type: ignore[attr-defined]
        if execution is None:
            go_on.set()
        return execution

    results = in_threads(lambda: trigger_and_release(first), lambda: trigger_and_release(second))
    assert sorted(result.state if result else "" for result in results) == ["", "succeeded"]
    assert len(fleet.effects()) == 1


def test_manual_runs_have_idempotency_keys_of_their_own(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    manager.tick("hourly", last_hour())
    manager.trigger("hourly")
    manager.trigger("hourly")
    scheduled, first, second = fleet.keys()
    assert scheduled == f"hourly:{last_hour().isoformat()}"
    assert first.startswith("hourly:manual:")
    assert second.startswith("hourly:manual:")
    assert first != second


def test_the_ticks_of_a_pause_are_one_skipped_row_that_is_extended(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    assert manager.pause("hourly")
    assert not manager.pause("hourly")
    for hours in (2, 1, 0):
        assert manager.tick("hourly", last_hour() - hours * HOUR) is None
    (execution,) = fleet.executions()
    assert execution.state == "skipped"
    assert execution.reason.startswith("paused since ")
    assert (execution.tick, execution.through) == (last_hour() - 2 * HOUR, last_hour())
    assert manager.resume("hourly")
    assert not manager.resume("hourly")
    assert manager.tick("hourly", last_hour()) is None  # a skipped tick does not run later
    assert fleet.effects() == []


def test_two_pauses_are_two_skipped_rows(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    for hours in (2, 1):
        manager.pause("hourly")
        fleet.set("hourly", paused_at=last_hour() - hours * HOUR - MINUTE)
        manager.tick("hourly", last_hour() - hours * HOUR)
        manager.resume("hourly")
    assert fleet.states() == ["skipped", "skipped"]
    assert manager.tick("hourly", last_hour()).state == "succeeded"


def test_a_paused_worker_can_be_run_manually(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    manager.pause("hourly")
    assert manager.trigger("hourly").state == "succeeded"


def test_a_tick_during_the_previous_run_is_skipped_and_says_so(fleet: Fleet) -> None:
    working, go_on = threading.Event(), threading.Event()

    class Slow(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            working.set()
            assert go_on.wait(PATIENCE)

    manager, other = fleet.manager(Slow), fleet.manager(Slow)
    before = last_hour() - HOUR
    run = threading.Thread(target=manager.tick, args=("slow", before))
    run.start()
    assert working.wait(PATIENCE)
    assert other.tick("slow", last_hour()) is None
    go_on.set()
    run.join(PATIENCE)
    ran, skipped = fleet.executions()
    assert ran.state == "succeeded"
    assert (skipped.state, skipped.tick) == ("skipped", last_hour())
    assert skipped.reason == f"still running the tick {before.isoformat()} on {ran.instance_name}"
    assert manager.tick("slow", last_hour()) is None


def test_thirty_days_of_downtime_are_one_run_and_one_missed_row(fleet: Fleet) -> None:
    class Minutely(Hourly):
        period = MINUTE

    manager = fleet.manager(Minutely)
    long_ago = last_hour() - timedelta(days=30)
    assert manager.tick("minutely", long_ago).state == "succeeded"
    fleet.set("minutely", scheduled_at=long_ago - HOUR)
    assert manager.tick("minutely", last_hour()).state == "succeeded"
    _, missed, ran = fleet.executions()
    assert (missed.state, missed.tick, missed.through) == ("missed", long_ago + MINUTE, last_hour() - MINUTE)
    assert (ran.state, ran.tick) == ("succeeded", last_hour())
    assert len(fleet.effects()) == 2


def test_a_tick_that_is_skipped_after_a_gap_leaves_a_missed_row_for_the_gap(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    manager.tick("hourly", last_hour())
    fleet.set("hourly", mark=last_hour() - 5 * HOUR, scheduled_at=last_hour() - 9 * HOUR)
    manager.pause("hourly")
    assert manager.tick("hourly", last_hour()) is None
    _, missed, skipped = fleet.executions("hourly")
    assert (missed.state, missed.tick, missed.through) == ("missed", last_hour() - 4 * HOUR, last_hour() - HOUR)
    assert (skipped.state, skipped.tick) == ("skipped", last_hour())


def test_consecutive_ticks_miss_nothing(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    for hours in (2, 1, 0):
        assert manager.tick("hourly", last_hour() - hours * HOUR).state == "succeeded"
    assert fleet.states() == ["succeeded"] * 3


def test_ticks_before_a_worker_was_known_do_not_count_as_missed(fleet: Fleet) -> None:
    fleet.manager(Hourly).tick("hourly", last_hour())
    assert fleet.states() == ["succeeded"]


def test_ticks_before_a_schedule_was_in_force_do_not_count_as_missed(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    assert manager.tick("hourly", last_hour() - 10 * HOUR).state == "succeeded"
    manager.reschedule("hourly", period=MINUTE)
    fleet.set("hourly", scheduled_at=last_hour() - 3 * MINUTE)
    assert manager.tick("hourly", last_hour()).state == "succeeded"
    _, missed, _ = fleet.executions()
    assert (missed.tick, missed.through) == (last_hour() - 2 * MINUTE, last_hour() - MINUTE)


def test_a_tick_of_a_schedule_that_was_replaced_earlier_does_not_run(fleet: Fleet) -> None:
    """Claim as an instance that has not seen the new schedule yet."""
    manager, other = fleet.manager(Hourly), fleet.manager(Hourly)
    manager.tick("hourly", last_hour() - 3 * HOUR)
    known = manager.recovery.look(Hourly).schedule_text
    other.reschedule("hourly", cron="30 * * * *")
    fleet.set("hourly", scheduled_at=last_hour() - 2 * HOUR)
    assert manager.ticks.run(Hourly, last_hour(), known) is None
    assert len(fleet.effects()) == 1
    assert fleet.row("hourly").mark == last_hour() - 3 * HOUR


@pytest.mark.parametrize(
    "change",
    [
        lambda manager: manager.pause("hourly"),
        lambda manager: manager.reschedule("hourly", period=2 * HOUR),
        lambda manager: manager.stores.ledger.claim_manual("hourly", last_hour(), ("other", "elsewhere:2")),
        lambda manager: manager.request("hourly"),
    ],
    ids=["paused", "rescheduled", "run by hand", "requested"],
)
def test_a_claim_is_refused_if_the_row_changed_since_it_looked(
    fleet: Fleet, change: Callable[[BackgroundWorkerManager], object]
) -> None:
    manager = fleet.manager(Hourly)
    schedule = manager.recovery.look(Hourly).schedule_text
    assert change(manager)
    before = fleet.row("hourly")
    assert manager.stores.ledger.claim("hourly", last_hour(), schedule, ("late", "elsewhere:1")) is BLOCKED
    assert fleet.row("hourly") == before


def test_no_instance_reruns_a_tick_that_was_paused_or_claimed_since_it_looked(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    ledger, schedule, ghost = (
        manager.stores.ledger,
        manager.recovery.look(Hourly).schedule_text,
        ("ghost", "elsewhere:1"),
    )
    tick = last_hour()
    assert ledger.end(ledger.claim("hourly", tick, schedule, ghost), "lost", next_attempt=2)
    assert manager.pause("hourly")
    assert ledger.claim_pending("hourly", tick, ghost) is None
    assert manager.resume("hourly")
    assert ledger.claim_pending("hourly", tick, ghost).attempt == 2
    assert ledger.claim_pending("hourly", tick, ghost) is None
    assert ledger.claim_manual("hourly", tick, ghost) is None
    assert not ledger.request("hourly")


def test_no_newer_tick_is_claimed_while_an_older_tick_waits_for_its_next_attempt(fleet: Fleet) -> None:
    """Claim as an instance that read the row before the older tick was lost."""
    manager = fleet.manager(Hourly)
    schedule, ghost = manager.recovery.look(Hourly).schedule_text, ("ghost", "elsewhere:1")
    claim = manager.stores.ledger.claim("hourly", last_hour() - HOUR, schedule, ghost)
    assert manager.stores.ledger.end(claim, "lost", next_attempt=2)
    assert manager.stores.ledger.claim("hourly", last_hour(), schedule, ghost) is BLOCKED
    assert manager.stores.ledger.claim_manual("hourly", last_hour(), ghost) is None
    assert manager.tick("hourly", last_hour()).state == "succeeded"
    ran = [(execution.state, execution.tick) for execution in fleet.executions()[1:]]
    assert ran == [("succeeded", last_hour() - HOUR), ("succeeded", last_hour())]


@on_postgresql
def test_a_claim_that_waits_for_the_winners_row_loses_in_the_same_statement(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    schedule = manager.recovery.look(Hourly).schedule_text
    with ThreadPoolExecutor(1) as beside, statements(manager.stores.main.engine) as seen:
        with fleet.engine.begin() as winner:
            winner.execute(update(tables.workers).values(mark=last_hour(), token=1, running=1))
            lost = beside.submit(manager.ticks.run, Hourly, last_hour(), schedule)
            wait_until(fleet.is_blocked, "the second one's claim")
        assert lost.result(PATIENCE) is None
    assert len([each for each in seen if "background_workers" in each]) == 1
    assert (fleet.row("hourly").token, fleet.executions()) == (1, [])


@contextmanager
def writing(fleet: Fleet) -> Iterator[Connection]:
    """Hold SQLite's single write lock, as another process would."""
    with fleet.engine.begin() as connection:
        connection.execute(update(tables.workers).values(token=tables.workers.c.token))
        yield connection


@on_sqlite
def test_a_claim_that_waits_for_the_write_lock_loses_after_one_read(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("background.database.dialects.sqlite._MOMENT_SECONDS", PATIENCE)
    manager = fleet.manager(Hourly)
    schedule = manager.recovery.look(Hourly).schedule_text
    with ThreadPoolExecutor(1) as beside, statements(manager.stores.main.engine) as seen:
        with writing(fleet) as winner:
            lost = beside.submit(manager.ticks.run, Hourly, last_hour(), schedule)
            time.sleep(0.3)  # until the other threads reach their first statement
            assert seen == []
            winner.execute(update(tables.workers).values(mark=last_hour()))
        assert lost.result(PATIENCE) is None
    assert [each.split()[0] for each in seen] == ["SELECT"]


@pytest.mark.promise
@on_sqlite
def test_a_claim_that_comes_too_late_does_not_wait_for_a_run_that_keeps_the_write_lock(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    schedule = manager.recovery.look(Hourly).schedule_text
    fleet.set("hourly", mark=last_hour())
    with writing(fleet), statements(manager.stores.main.engine) as seen:
        assert manager.ticks.run(Hourly, last_hour(), schedule) is None
    assert [each.split()[0] for each in seen] == ["SELECT"]
    assert patience_of_pooled(manager) == 30_000


@on_sqlite
def test_a_tick_that_is_still_open_is_claimed_after_the_write_lock_is_free(
    fleet: Fleet,
) -> None:
    manager = fleet.manager(Hourly)
    schedule = manager.recovery.look(Hourly).schedule_text
    for mark, claimed in ((last_hour(), False), (last_hour() - HOUR, True)):
        fleet.set("hourly", mark=None)
        with ThreadPoolExecutor(1) as beside, statements(manager.stores.main.engine) as seen:
            with writing(fleet) as first:
                second = beside.submit(manager.stores.ledger.claim, "hourly", last_hour(), schedule, ("id", "name"))
                wait_until(lambda: len(seen) == 2, "the claim's wait")
                first.execute(update(tables.workers).values(mark=mark))
            assert bool(second.result(PATIENCE)) is claimed


def patience_of_pooled(manager: BackgroundWorkerManager) -> object:
    """Return how many milliseconds the claiming connection waits for a lock in other statements."""
    with manager.stores.main.engine.connect() as connection:
        return connection.exec_driver_sql("PRAGMA busy_timeout").scalar()


@on_sqlite
def test_a_claim_on_a_briefly_unreadable_file_fails_and_succeeds_afterwards(
    fleet: Fleet,
) -> None:
    manager = fleet.manager(Hourly)
    schedule, path = manager.recovery.look(Hourly).schedule_text, Path(str(fleet.engine.url.database))
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        write = "UPDATE background_workers SET token = token + 1"  # the next reader must read the file again
        other.execute(write)
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        page = path.read_bytes()[:4096]
        overwrite(path, bytes(4096))
        with pytest.raises(DatabaseError, match="not a database"):
            manager.stores.ledger.claim("hourly", last_hour(), schedule, ("id", "name"))
        overwrite(path, page)
        other.execute(write)
    assert patience_of_pooled(manager) == 30_000
    assert manager.stores.ledger.claim("hourly", last_hour(), schedule, ("id", "name"))


def overwrite(path: Path, page: bytes) -> None:
    with path.open("r+b") as file:
        file.write(page)


def test_a_winner_claims_with_one_request_on_postgresql_and_one_read_and_two_writes_on_sqlite(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    schedule = manager.recovery.look(Hourly).schedule_text
    with statements(manager.stores.main.engine) as seen:
        assert manager.stores.ledger.claim("hourly", last_hour(), schedule, ("id", "name"))
    is_sqlite = manager.stores.main.engine.dialect.name == "sqlite"
    assert [each.split()[0] for each in seen] == (["SELECT", "UPDATE", "INSERT"] if is_sqlite else ["SELECT"])
    assert "INSERT INTO background_executions" in seen[-1]


@pytest.mark.promise
@on_postgresql
def test_no_statement_that_decides_on_a_run_takes_longer_than_a_lease(fleet: Fleet) -> None:
    store = fleet.manager(WORKERS_LEASE_SECONDS=0.5).stores.main
    with pytest.raises(OperationalError, match="statement timeout"), store.begin() as connection:
        connection.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": PATIENCE})


@on_postgresql
@pytest.mark.parametrize(
    "spoil",
    [
        "DEALLOCATE ALL",
        "ALTER TABLE background_executions ALTER COLUMN trigger TYPE varchar(20)",
    ],
)
def test_a_claim_is_planned_once_and_again_after_a_migration_or_without_its_plan(fleet: Fleet, spoil: str) -> None:
    manager = fleet.manager(Hourly)
    ledger, schedule = manager.stores.ledger, manager.recovery.look(Hourly).schedule_text

    def claim() -> list[str]:
        fleet.set("hourly", mark=None, running=None, claim=None)
        with statements(manager.stores.main.engine) as seen:
            assert ledger.claim("hourly", last_hour(), schedule, ("id", "name"))
        return ["PREPARE" if "PREPARE" in each else "EXECUTE" if "EXECUTE" in each else "plain" for each in seen]

    assert [claim() for _ in range(3)] == [["PREPARE"], ["EXECUTE"], ["EXECUTE"]]
    with manager.stores.main.single.begin() as connection:
        connection.execute(text(spoil))
    assert claim() == ["EXECUTE", "plain"]
    assert [claim() for _ in range(2)] == [["PREPARE"], ["EXECUTE"]]


@on_postgresql
def test_a_claim_succeeds_after_a_migration_where_the_server_isolates_strictly(fleet: Fleet) -> None:
    strict = fleet.engine.url.update_query_dict({"options": "-c default_transaction_isolation=serializable"})
    with closing(Fleet(strict.render_as_string(hide_password=False))) as isolated:
        manager = isolated.manager(Hourly)
        ledger, schedule = manager.stores.ledger, manager.recovery.look(Hourly).schedule_text

        def claim() -> object:
            fleet.set("hourly", mark=None, running=None, claim=None)
            return ledger.claim("hourly", last_hour(), schedule, ("id", "name"))

        assert all(claim() for _ in range(2))
        with manager.stores.main.single.begin() as connection:
            connection.execute(text("ALTER TABLE background_executions ALTER COLUMN trigger TYPE varchar(20)"))
        assert claim()


def test_a_tick_whose_obstacle_disappears_while_it_is_being_skipped_runs(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    manager.pause("hourly")

    @event.listens_for(manager.stores.main.engine, "before_cursor_execute")
    def resume_just_before(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("UPDATE background_workers SET mark") and fleet.row("hourly").paused_at:
            fleet.set("hourly", paused_at=None)

    assert manager.tick("hourly", last_hour()).state == "succeeded"
    assert fleet.states() == ["succeeded"]


@pytest.mark.parametrize("at", [datetime(2026, 1, 1), "2026-01-01", None])  # noqa: DTZ001
def test_a_tick_without_a_time_zone_is_refused_with_a_sentence(fleet: Fleet, at: object) -> None:
    from background import InvalidSchedule

    with pytest.raises(InvalidSchedule, match=r"expected an aware datetime: write datetime\.now"):
        fleet.manager(Shared).tick("shared", at)  # type: ignore[arg-type]


def test_an_unknown_name_is_refused_with_the_closest_name(fleet: Fleet) -> None:
    from background import UnknownWorker

    manager = fleet.manager(Shared)
    for call in (manager.trigger, manager.pause, manager.resume, manager.reschedule, manager.remove):
        with pytest.raises(UnknownWorker, match=r"There is no worker named 'share'. Did you mean 'shared'\?"):
            call("share")


@pytest.mark.promise
@on_postgresql
@pytest.mark.parametrize("table", ["background_workers", "background_executions"])
def test_no_claim_waits_longer_for_a_table_than_for_a_row(fleet: Fleet, table: str) -> None:
    """Lock the table, as making an index does."""
    manager = fleet.manager(Hourly)
    schedule = manager.recovery.look(Hourly).schedule_text
    with fleet.engine.begin() as connection:
        connection.execute(text(f"LOCK TABLE {table} IN SHARE MODE"))
        with pytest.raises(OperationalError, match="lock timeout"):
            manager.stores.ledger.claim("hourly", last_hour(), schedule, ("id", "name"))
    assert manager.stores.ledger.claim("hourly", last_hour(), schedule, ("id", "name"))
    with manager.stores.main.engine.connect() as connection:
        assert connection.scalar(text("SHOW lock_timeout")) == "0"


@on_postgresql
@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_one_of_several_simultaneous_claims_wins_also_with_stricter_isolation(fleet: Fleet, level: str) -> None:
    database = fleet.engine.url.database
    with fleet.engine.begin() as connection:
        connection.execute(text(f"ALTER DATABASE \"{database}\" SET default_transaction_isolation = '{level}'"))
    fleet.engine.dispose()
    ledgers = [fleet.manager(Hourly).stores.ledger for _ in range(8)]
    fleet.manager(Hourly).recovery.look(Hourly)
    claims = at_once(8, lambda number: ledgers[number].claim("hourly", last_hour(), "every 3600s", ("id", "name")))
    assert len([claim for claim in claims if claim]) == 1
    assert claims.count(DECIDED) == 7


@on_postgresql
def test_a_claim_that_comes_a_little_early_waits_inside_its_own_request(fleet: Fleet) -> None:
    class Quick(Hourly):
        period = timedelta(seconds=0.5)

    manager = fleet.manager(Quick)
    schedule, clock = declared_schedule(Quick), manager.recovery.look(Quick).clock
    tick = schedule.next(clock)
    fleet.set("quick", mark=schedule.previous(clock))
    threading.Event().wait((tick - datetime.now(UTC)).total_seconds() - 0.05)
    with statements(manager.stores.main.engine) as seen:
        claim = manager.stores.ledger.claim("quick", tick, str(schedule), ("id", "name"))
    assert claim
    assert len(seen) == 1
    [execution] = fleet.executions()
    assert execution.started_at >= tick
