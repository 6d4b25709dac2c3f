"""Counters of each worker. The deciding transaction writes the count, so it exists if and only if its row does."""

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import delete, select
from support.fleet import Fleet, Hourly, last_hour

from background import WorkerContext
from background.database import tables

DAY = timedelta(days=1)


def counts(fleet: Fleet, kind: str = "state") -> dict[str, int]:
    with fleet.engine.connect() as connection:
        query = select(tables.totals.c.label, tables.totals.c["count"].label("number")).where(
            tables.totals.c.kind == kind
        )
        return {row.label: row.number for row in connection.execute(query)}


class Moody(Hourly):
    def do_work(self, context: WorkerContext) -> None:
        if context.tick.hour % 2:
            raise ValueError("not at odd hours")


def test_each_execution_is_counted_by_its_outcome_and_its_duration(fleet: Fleet) -> None:
    manager = fleet.manager(Moody)
    for hours in range(5, 1, -1):  # longer ago than the last bucket, whenever this test runs
        manager.recovery.look(Moody)
        fleet.set("moody", mark=last_hour() - timedelta(hours=hours), scheduled_at=last_hour() - DAY)
        manager.tick("moody", last_hour() - timedelta(hours=hours - 1))
    states = fleet.states()
    assert sorted(states) == ["failed", "failed", "succeeded", "succeeded"]
    assert counts(fleet) == {"failed": 2, "succeeded": 2}
    assert sum(counts(fleet, "duration").values()) == sum(counts(fleet, "lateness").values()) == 4
    assert set(counts(fleet, "lateness")) == {"inf"}


def test_a_manual_run_has_no_delay(fleet: Fleet) -> None:
    fleet.manager(Hourly).trigger("hourly")
    assert counts(fleet) == {"succeeded": 1}
    assert counts(fleet, "lateness") == {}


def test_each_skipped_tick_is_counted_and_a_gap_of_missed_ticks_once(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    manager.pause("hourly")
    for hours in (5, 4):
        fleet.set("hourly", mark=last_hour() - timedelta(hours=hours), scheduled_at=last_hour() - DAY)
        manager.tick("hourly", last_hour() - timedelta(hours=hours - 1))
    manager.resume("hourly")
    manager.tick("hourly", datetime.now(UTC))
    assert fleet.states() == ["skipped", "missed", "succeeded"]
    assert counts(fleet) == {"skipped": 2, "missed": 1, "succeeded": 1}


def test_counts_survive_pruning(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    manager.trigger("hourly")
    with fleet.engine.begin() as connection:
        connection.execute(delete(tables.executions))
    manager.trigger("hourly")
    assert counts(fleet) == {"succeeded": 2}


def test_an_outcome_that_could_not_be_committed_is_not_counted(fleet: Fleet) -> None:
    class Overtaken(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            fleet.take_over("overtaken")

    fleet.manager(Overtaken).tick("overtaken", datetime.now(UTC))
    assert counts(fleet) == {}


def test_the_sums_show_the_total_durations(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    for _ in range(2):
        manager.trigger("hourly")
    took = [row.finished_at - row.started_at for row in fleet.executions()]
    with fleet.engine.connect() as connection:
        query = select(tables.totals.c.seconds, tables.totals.c.latest_at).where(tables.totals.c.kind == "duration")
        rows: list[Any] = list(connection.execute(query))
    assert abs(sum(row.seconds for row in rows) - sum(took, timedelta()).total_seconds()) < 1e-6
    assert max(row.latest_at for row in rows) == fleet.executions()[-1].finished_at
