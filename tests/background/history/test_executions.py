"""The executions as people read them: in pages, beside each other, and their errors in groups."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, insert
from support.fleet import Fleet, Hourly, statements

from background.database import tables
from background.history.executions import History
from background.history.records import ErrorGroup, grouped

NOON = datetime(2026, 1, 20, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


class Counting(Hourly):
    """Counts."""


@pytest.fixture
def history(fleet: Fleet) -> History:
    return fleet.manager(Counting).history


def add(fleet: Fleet, *rows: dict[str, Any]) -> None:
    usual = {"worker": "counting", "trigger": "schedule", "state": "succeeded", "attempt": 1, "reason": None}
    with fleet.engine.begin() as connection:
        ended = [{"started_at": row["tick"], "finished_at": row["tick"] + HOUR / 2} for row in rows]
        connection.execute(insert(tables.executions), [usual | end | row for end, row in zip(ended, rows, strict=True)])


def failure(text: str) -> str:
    return f'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    g()\n{text}\n'


def test_errors_are_grouped_by_their_last_line_with_their_first_and_last_moment(fleet: Fleet, history: History) -> None:
    add(
        fleet,
        {"tick": NOON - 5 * HOUR, "state": "lost", "reason": "its instance is gone"},
        {"tick": NOON - 4 * HOUR, "state": "failed", "reason": failure("OSError: no\nand more")},
        {"tick": NOON - 3 * HOUR, "state": "failed", "reason": failure("ValueError: a")},
        {"tick": NOON - 2 * HOUR, "state": "failed", "reason": failure("OSError: no")},
        {"tick": NOON - 1 * HOUR, "state": "timed out"},
        {"tick": NOON, "worker": "another", "state": "failed", "reason": failure("OSError: no")},
    )
    with statements(Engine) as seen:
        first, *single = history.errors("counting")
    assert len(seen) == 1
    newest = next(record.id for record in history.executions("counting") if record.last_line == "OSError: no")
    assert first == ErrorGroup("OSError: no", 2, NOON - 3.5 * HOUR, NOON - 1.5 * HOUR, newest)
    assert [(group.line, group.count) for group in single] == [("ValueError: a", 1), ("timed out", 1)]


def test_only_the_newest_executions_and_errors_are_read(
    fleet: Fleet, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(fleet, *({"tick": NOON + n * HOUR, "state": "failed", "reason": f"OSError: {n}"} for n in range(9)))
    monkeypatch.setattr("background.history.executions.ERRORS_IN", 4)
    assert [group.line for group in history.errors("counting")] == [f"OSError: {n}" for n in (5, 6, 7, 8)]
    monkeypatch.setattr("background.history.executions.MOST_ERRORS", 2)
    assert [group.line for group in history.errors("counting")] == [f"OSError: {n}" for n in (7, 8)]


def test_the_most_frequent_error_is_first() -> None:
    errors = [("b", NOON, 1), ("a", NOON, 2), ("b", NOON - HOUR, 3), ("c", NOON, 4)]
    assert [(each.line, each.count) for each in grouped(errors)] == [("b", 2), ("a", 1), ("c", 1)]


def test_the_attempts_at_one_tick_stay_on_one_page(fleet: Fleet, history: History) -> None:
    add(fleet, *({"tick": NOON + n // 3 * HOUR, "attempt": n % 3 + 1} for n in range(9)))
    seen, place = [], None
    while True:
        records, place = history.page("counting", 4, before=place)
        seen.append([(record.tick - NOON) // HOUR for record in records])
        if place is None:
            break
    assert seen == [[2] * 3, [1] * 3, [0] * 3]
    assert [len(history.page("counting", 2, before=(NOON + HOUR, 99))[0])] == [2]


def test_an_execution_knows_its_neighbours_and_the_other_attempts_at_its_tick(fleet: Fleet, history: History) -> None:
    manual = {"tick": NOON, "trigger": "manual"}
    add(fleet, {"tick": NOON - HOUR}, {"tick": NOON}, {"tick": NOON, "attempt": 2}, manual, {"tick": NOON + HOUR})
    add(fleet, {"tick": NOON, "worker": "another"})
    records = history.executions("counting")
    ids = [record.id for record in records]
    assert [history.neighbours(record) for record in records] == list(zip([*ids[1:], None], [None, *ids], strict=False))
    assert [[each.id for each in history.attempts(record)] for record in records[1:4]] == [[ids[1]], *[ids[3:1:-1]] * 2]
