"""The executions of a worker by tick, and the gaps between them."""

from datetime import UTC, datetime, timedelta
from typing import Any

from background.dashboard.ticks import Attempts, Gap, by_tick
from background.history.records import Record
from background.schedule.periods import Every

NOON, HOUR = datetime(2026, 1, 20, 12, tzinfo=UTC), timedelta(hours=1)
HOURLY = Every(HOUR)


def row(hour: float, **more: Any) -> Record:
    tick = NOON + hour * HOUR
    ran = {"worker": "w", "tick": tick, "trigger": "schedule", "state": "succeeded", "started_at": tick, "clock": NOON}
    return Record(**dict.fromkeys(Record._fields) | {"id": 1, "attempt": 1, "is_gone": False} | ran | more)


def seen(
    *records: Record, since: datetime = NOON - 99 * HOUR, until: datetime = NOON + HOUR / 2, schedule: Any = HOURLY
) -> list[Any]:
    """Return the number of attempts at each tick, and the first and last hour of each gap."""
    found: list[Any] = []
    for each in by_tick(records, schedule, since, until):
        if isinstance(each, Gap):
            found.append(((each.first - NOON) / HOUR, (each.last - NOON) / HOUR))
        else:
            assert isinstance(each, Attempts)
            found.append(len(each.records))
    return found


def test_attempts_at_one_tick_are_together_and_a_manual_run_is_apart() -> None:
    assert seen(row(0), row(0, attempt=1), row(-1), row(-1, trigger="manual")) == [2, 1, 1]


def test_ticks_without_a_row_are_a_gap() -> None:
    assert seen(row(0), row(-1), row(-4), row(-6)) == [1, 1, (-3, -2), 1, (-5, -5), 1]


def test_ticks_that_are_due_after_the_newest_row_are_a_gap() -> None:
    assert seen(row(-3)) == [(-2, 0), 1]
    assert seen(row(-3), until=NOON) == [(-2, -1), 1]
    assert seen(row(0), until=NOON) == [1]


def test_a_row_of_several_ticks_covers_them_and_manual_runs_cover_none() -> None:
    assert seen(row(0), row(-4, through=NOON - HOUR)) == [1, 1]
    assert seen(row(0), row(-1.5, trigger="manual"), row(-3)) == [1, 1, (-2, -1), 1]


def test_ticks_before_the_schedule_in_force_are_no_gap() -> None:
    assert seen(row(0), row(-5), row(-9), since=NOON - 2 * HOUR) == [1, (-1, -1), 1, 1]
    assert seen(row(0), row(-5), schedule=None) == [1, 1]
