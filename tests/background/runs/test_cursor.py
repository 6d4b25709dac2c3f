"""A cursor is committed with its slice, and the next attempt at the tick begins with it."""

import asyncio
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, insert, select, update
from support.fleet import HOUR, Fleet, Hourly, db, effect, effects, last_hour, statements, states, wait_until

from background import (
    ClaimLost,
    InvalidCursor,
    Message,
    MessageWorker,
    WorkerContext,
)
from background.database import tables
from background.pruning import PruneHistoryWorker

NOW = last_hour


class Slicing(Hourly):
    """Leaves one effect for each of five slices. At slice `ends_at` it ends as `ending` says."""

    ends_at = 5

    def do_work(self, context: WorkerContext) -> None:
        for number in range(context.cursor or 0, 5):
            context.cursor = number + 1
            if number == self.ends_at:
                self.ending(context)
            effect(context, number)
            context.commit()

    def ending(self, context: WorkerContext) -> None:
        context.stopping.set()
        context.raise_if_stopping()


def slicing(ends_at: int) -> type[Slicing]:
    return type("Slicing", (Slicing,), {"ends_at": ends_at, "name": "slicing"})


def run(fleet: Fleet, worker: type[Hourly], tick: Any = None) -> str | None:
    execution = fleet.manager(worker).tick(worker.name, tick or NOW())
    return execution and execution.state


def end_with_its_instance(fleet: Fleet, name: str) -> None:
    """Give the worker's tick back as another instance does when the holder is gone."""
    manager = fleet.manager(Slicing)
    state = manager.stores.ledger.look(name)
    assert state.running
    assert manager.stores.ledger.end(state.running, "lost", "its instance is gone", state.running.attempt + 1)


def test_the_next_attempt_begins_with_the_last_committed_cursor(fleet: Fleet) -> None:
    assert run(fleet, slicing(2)) == "handed back"
    assert fleet.effects() == ["0", "1"]
    assert run(fleet, slicing(5)) == "succeeded"
    assert fleet.effects() == ["0", "1", "2", "3", "4"]
    assert [row.cursor for row in fleet.executions()] == ["2", "5"]


def test_the_cursor_outlives_attempts_that_committed_none(fleet: Fleet) -> None:
    assert run(fleet, slicing(2)) == "handed back"
    assert run(fleet, slicing(2)) == "handed back"
    assert run(fleet, slicing(2)) == "handed back"
    assert run(fleet, slicing(5)) == "succeeded"
    assert fleet.effects() == ["0", "1", "2", "3", "4"]
    assert [row.cursor for row in fleet.executions()] == ["2", None, None, "5"]


def test_a_new_tick_begins_with_none(fleet: Fleet) -> None:
    assert run(fleet, slicing(5), NOW() - HOUR) == "succeeded"
    assert run(fleet, slicing(5), NOW()) == "succeeded"
    assert fleet.effects() == ["0", "1", "2", "3", "4"] * 2


def test_a_manual_run_that_was_handed_back_has_its_cursor(fleet: Fleet) -> None:
    assert fleet.manager(slicing(3)).trigger("slicing").state == "handed back"
    manager = fleet.manager(slicing(5))
    assert manager.ticks.run_pending(Slicing, fleet.row("slicing").pending_tick).state == "succeeded"
    assert fleet.effects() == ["0", "1", "2", "3", "4"]


def test_a_cursor_costs_one_read_and_no_further_statement_at_a_commit(fleet: Fleet) -> None:
    class Counting(Hourly):
        has_cursor = False

        def do_work(self, context: WorkerContext) -> None:
            for number in range(3):
                effect(context, number)
                context.progress(number)
                if self.has_cursor:
                    context.cursor = (context.cursor or 0) + 1
                context.commit()

    class CountingOn(Counting):
        has_cursor = True

    sent, read = [], []
    for worker in (Counting, CountingOn):
        manager = fleet.manager(worker)
        manager.recovery.look(worker, NOW())
        with statements(type(fleet.engine)) as seen:
            manager.tick(worker.name, NOW())
        sent.append(sum(statement.startswith("UPDATE background_executions") for statement in seen))
        read.append(sum(statement.startswith("SELECT background_executions.cursor") for statement in seen))
    assert (sent, read) == ([4, 4], [0, 1])
    assert fleet.executions("counting_on")[0].cursor == "3"


def test_a_zombie_stores_no_cursor(fleet: Fleet) -> None:
    class Frozen(Slicing):
        def ending(self, context: WorkerContext) -> None:
            end_with_its_instance(fleet, "frozen")
            effect(context, "of the zombie")
            with pytest.raises(ClaimLost):
                context.commit()
            context.session.rollback()
            raise ClaimLost("as its commit said")

    Frozen.ends_at = 3
    assert run(fleet, Frozen) == "lost"
    assert [row.cursor for row in fleet.executions()] == ["3"]

    class Thawed(Slicing):
        name = "frozen"

    assert run(fleet, Thawed) == "succeeded"
    assert fleet.effects() == ["0", "1", "2", "3", "4"]


def test_a_rollback_takes_the_cursor_back(fleet: Fleet) -> None:
    read = []

    class Rolling(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            for cursor in (None, {"after": 7}):
                if cursor:
                    context.cursor = cursor
                    context.commit()
                effect(context, "undone")
                context.cursor = "undone"
                context.session.rollback()
                read.append(context.cursor)

    assert run(fleet, Rolling) == "succeeded"
    assert read == [None, {"after": 7}]
    assert (fleet.effects(), fleet.executions()[0].cursor) == ([], '{"after":7}')


def test_the_rollback_of_a_savepoint_returns_the_cursor_to_its_beginning(fleet: Fleet) -> None:
    class Saving(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            for number in range(4):
                with suppress(ZeroDivisionError), context.session.begin_nested():
                    context.cursor = number
                    with context.session.begin_nested():
                        effect(context, number)
                    assert number % 2 == 0 or 1 / 0
            context.commit()

    assert run(fleet, Saving) == "succeeded"
    assert (fleet.effects(), fleet.executions()[0].cursor) == (["0", "2"], "2")


def test_only_a_commit_of_the_runs_own_session_stores_the_cursor(fleet: Fleet) -> None:
    class Beside(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            context.session.execute(select(effects))
            context.cursor = 1
            with db.session.session_factory() as other:
                other.execute(insert(effects).values(key="other", note="other"))
                other.commit()
            context.session.rollback()
            effect(context, "before")
            context.commit()

    assert run(fleet, Beside) == "succeeded"
    assert fleet.executions()[0].cursor is None


def test_a_failed_run_keeps_its_last_committed_cursor_only(fleet: Fleet) -> None:
    class Failing(Slicing):
        ends_at = 2

        def ending(self, context: WorkerContext) -> None:
            raise ZeroDivisionError

    assert run(fleet, Failing) == "failed"
    assert [row.cursor for row in fleet.executions()] == ["2"]


def test_the_commit_of_success_stores_the_cursor(fleet: Fleet) -> None:
    class Last(Hourly):
        async def do_work(self, context: WorkerContext) -> None:
            await asyncio.sleep(0)
            context.cursor = ["done", 1.5, None]

    assert run(fleet, Last) == "succeeded"
    assert fleet.executions()[0].cursor == '["done",1.5,null]'


def test_a_row_that_a_user_deleted_is_written_again_with_the_cursor(fleet: Fleet) -> None:
    class Deleted(Slicing):
        ends_at = 1

        def ending(self, context: WorkerContext) -> None:
            with fleet.engine.begin() as connection:
                connection.execute(delete(tables.executions))
            effect(context, "1")
            context.cursor = 2
            context.commit()
            context.stopping.set()
            context.raise_if_stopping()

    assert run(fleet, Deleted) == "handed back"
    assert [row.cursor for row in fleet.executions()] == ["2"]

    class Restored(Slicing):
        name = "deleted"

    assert run(fleet, Restored) == "succeeded"
    assert fleet.effects() == ["0", "1", "2", "3", "4"]


def test_the_cursor_outlives_the_workers_row(fleet: Fleet) -> None:
    """Without its row, the worker begins with the lost tick again, by a claim as of a new tick."""
    assert run(fleet, slicing(5), NOW() - HOUR) == "succeeded"
    assert run(fleet, slicing(2)) == "handed back"
    with fleet.engine.begin() as connection:
        connection.execute(
            update(tables.executions).where(tables.executions.c.state == "handed back").values(state="lost")
        )
        connection.execute(delete(tables.workers))
    assert run(fleet, slicing(5)) == "succeeded"
    assert fleet.effects()[5:] == ["0", "1", "2", "3", "4"]


def test_pruning_spares_the_cursor_of_a_tick_that_will_run_again(fleet: Fleet) -> None:
    assert run(fleet, slicing(2)) == "handed back"
    assert run(fleet, Hourly) == "succeeded"
    with fleet.engine.begin() as connection:
        connection.execute(update(tables.executions).values(finished_at=NOW() - timedelta(days=365)))
    pruning = fleet.manager(PruneHistoryWorker)
    assert pruning.trigger(PruneHistoryWorker.name).state == "succeeded"
    assert [row.worker for row in fleet.executions()] == ["slicing", PruneHistoryWorker.name]
    assert run(fleet, slicing(5)) == "succeeded"
    assert fleet.effects()[:5] == ["0", "1", "", "2", "3"]
    with fleet.engine.begin() as connection:
        connection.execute(update(tables.executions).values(finished_at=NOW() - timedelta(days=365)))
    assert pruning.trigger(PruneHistoryWorker.name).state == "succeeded"
    assert [row.worker for row in fleet.executions()] == [PruneHistoryWorker.name]


REFUSED = [
    (float("nan"), "context.cursor is nan, which JSON cannot carry; expected None, a bool, a finite number"),
    ({"at": NOW()}, "context.cursor['at'] is of type datetime, which JSON cannot carry"),
    ({1: 2}, "context.cursor[1] is under a key of type int, which JSON cannot carry"),
    ("a" * 65_536, "context.cursor was given 65,538 bytes of JSON; expected at most 65,536"),
]


@pytest.mark.parametrize(("value", "said"), REFUSED)
def test_a_value_that_json_cannot_carry_or_that_is_too_large_is_refused(fleet: Fleet, value: Any, said: str) -> None:
    class Wrong(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            context.cursor = "right"
            with pytest.raises(InvalidCursor) as refused:
                context.cursor = value
            assert str(refused.value).startswith(said)

    assert run(fleet, Wrong) == "succeeded"
    assert fleet.executions()[0].cursor == '"right"'


def test_a_cursor_holds_any_character(fleet: Fleet) -> None:
    text = "a\0b\u0141\U0001f600"

    class Strange(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            if context.cursor is None:
                context.cursor = text
                context.commit()
                context.stopping.set()
                context.raise_if_stopping()
            assert context.cursor == text

    assert run(fleet, Strange) == "handed back"
    assert run(fleet, Strange) == "succeeded"


def test_a_cursor_that_a_user_broke_fails_the_run_with_a_sentence(fleet: Fleet) -> None:
    assert run(fleet, slicing(2)) == "handed back"
    with fleet.engine.begin() as connection:
        connection.execute(update(tables.executions).values(cursor="after 7"))
    assert run(fleet, slicing(5)) == "failed"
    assert "The cursor of the tick " in fleet.executions()[-1].reason


def test_a_handler_of_messages_has_no_cursor(fleet: Fleet) -> None:
    class Handler(MessageWorker):
        topic = "things"
        max_attempts = 1

        def handle(self, message: Message, context: WorkerContext) -> None:
            with pytest.raises(InvalidCursor):
                context.cursor = 1
            context.cursor  # noqa: B018 - reading raises, too

    manager = fleet.manager(Handler)
    fleet.enqueue("things", 1)
    manager.start()
    wait_until(lambda: states(fleet) == ["dead"], "the refusal")
    assert "expected it in a PeriodicWorker only" in fleet.errors()[0].error
