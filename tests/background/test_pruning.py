"""History is deleted after a time. Marks are not."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import pytest
from flask import Flask
from sqlalchemy import insert, select, update
from support.databases import close
from support.fleet import PATIENCE, Fleet, db, make_app

from background import BackgroundWorkerManager, MessageWorker, PeriodicWorker, PruneHistoryWorker
from background import pruning as engine_pruning
from background.database import connections
from background.database.dialects.write_lock import waiting
from background.database.tables import executions, message_errors, messages, tallies, workers
from background.pruning import SLICE

TICK = datetime(2026, 3, 1, tzinfo=UTC)


class DailyWorker(PeriodicWorker):
    period = timedelta(days=1)
    run_on_first_start = True

    def do_work(self, context):
        pass


@pytest.fixture
def app(database_url: str) -> Iterator[Flask]:
    app = make_app(database_url, PruneHistoryWorker)
    yield app
    close(app)


def record(app: Flask, count: int, finished_at: datetime | None) -> None:
    row = {"worker": "daily_worker", "tick": TICK, "trigger": "schedule", "state": "skipped"}
    with app.app_context():
        db.session.execute(insert(executions), [row | {"finished_at": finished_at}] * count)
        db.session.commit()


def left(app: Flask) -> list[datetime | None]:
    with app.app_context():
        of_daily = executions.c.worker == "daily_worker"
        return list(db.session.scalars(select(executions.c.finished_at).where(of_daily).order_by(executions.c.id)))


def test_executions_are_deleted_once_they_ended_longer_ago_than_the_history_days(app):
    limit = TICK - timedelta(days=14)
    record(app, SLICE + 1, limit - timedelta(seconds=1))
    record(app, 1, None)
    record(app, 1, limit - timedelta(seconds=1))
    record(app, 1, limit)
    assert app.extensions["background_workers"].tick("prune_history_worker", TICK).state == "succeeded"
    assert left(app) == [None, limit]


def test_pruning_the_history_admits_no_old_tick_again(app):
    manager = app.extensions["background_workers"]
    manager.add(DailyWorker)
    assert manager.tick("daily_worker", TICK - timedelta(days=30)).state == "succeeded"
    with app.app_context():
        db.session.execute(executions.update().values(finished_at=TICK - timedelta(days=30)))
        db.session.commit()
    manager.tick("prune_history_worker", TICK)
    assert left(app) == []
    assert manager.tick("daily_worker", TICK - timedelta(days=30)) is None
    with app.app_context():
        mark = db.session.scalar(select(workers.c.mark).where(workers.c.name == "daily_worker"))
    assert mark == TICK - timedelta(days=30)


# -- messages ------------------------------------------------------------------------------------


class Letters(MessageWorker):
    topic = "letters"

    def handle(self, message, context):
        pass


def ended(fleet: Fleet, payload: str, state: str, days: float, key: str | None = None) -> None:
    """Insert a message that ended this many days before the tick, and had an error before."""
    (number,) = fleet.enqueue("letters", payload, key=key)
    at = TICK - timedelta(days=days)
    with fleet.engine.begin() as connection:
        this = messages.c.id == number
        finished_at = at if state not in ("waiting", "running") else None
        connection.execute(update(messages).where(this).values(state=state, enqueued_at=at, finished_at=finished_at))
        error = {"message": number, "attempt": 1, "at": at, "error": "Oops"}
        connection.execute(insert(message_errors).values(error))


def prune(manager: BackgroundWorkerManager) -> str | None:
    manager.add(PruneHistoryWorker)
    execution = manager.tick("prune_history_worker", TICK)
    return execution and execution.state


def kept(fleet: Fleet) -> list[str]:
    """Return the payloads that are left. Each has its error, and no other error is left."""
    found = fleet.messages()
    assert [error.message for error in fleet.errors()] == [row.id for row in found]
    return [row.payload.strip('"') for row in found]


def test_messages_are_deleted_with_their_errors_once_they_are_history_and_dead_letters_never(fleet: Fleet) -> None:
    manager = fleet.manager(Letters)
    for state in ("waiting", "running", "done", "dead", "discarded"):
        ended(fleet, f"old {state}", state, 14.01)
        ended(fleet, f"new {state}", state, 14)
    assert prune(manager) == "succeeded"
    assert kept(fleet) == [
        *("old waiting", "new waiting", "old running", "new running"),
        *("new done", "old dead", "new dead", "new discarded"),
    ]


@pytest.mark.parametrize(("history", "keys"), [(7, 30), (30, 7)])
def test_a_message_with_a_key_is_kept_as_long_as_its_key_or_its_history(fleet: Fleet, history: int, keys: int) -> None:
    manager = fleet.manager(Letters, WORKERS_HISTORY_DAYS=history, MESSAGES_KEY_DAYS=keys)
    ended(fleet, "without, new", "done", history)
    ended(fleet, "without, old", "done", history + 1)
    ended(fleet, "with, new", "discarded", 30, key="a")
    ended(fleet, "with, old", "done", 31, key="b")
    assert fleet.enqueue("letters", "again", key="b") == [None]
    prune(manager)
    assert kept(fleet) == ["without, new", "with, new"]
    assert fleet.enqueue("letters", "again", key="a") == [None]
    assert fleet.enqueue("letters", "again", key="b") != [None]


def test_messages_are_pruned_in_slices_that_are_committed_and_a_stop_is_heard_between_them(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_pruning, "SLICE", 2)
    manager = fleet.manager(Letters)
    for number in range(5):
        ended(fleet, f"done {number}", "done", 20 - number)
        ended(fleet, f"dead {number}", "dead", 20 - number)
    commits = 0

    class Stopped(PruneHistoryWorker):
        name = "prune_history_worker"

        def do_work(self, context):
            commit = context.commit

            def count_and_commit():
                nonlocal commits
                commits += 1
                commit()
                if commits == 3:  # one for the executions
                    context.stopping.set()

            context.commit = count_and_commit
            super().do_work(context)

    manager.add(Stopped)
    assert manager.tick("prune_history_worker", TICK).state == "handed back"
    assert [each for each in kept(fleet) if "done" in each] == ["done 2", "done 3", "done 4"]
    manager.remove("prune_history_worker")
    assert prune(manager) == "succeeded"
    assert kept(fleet) == [f"dead {number}" for number in range(5)]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_short_slice_is_committed_and_a_connection_that_waits_for_the_write_lock_goes_first(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_pruning, "_MOST_ON_SQLITE", 2)
    monkeypatch.setattr(connections, "_LONGEST_TURN_SECONDS", PATIENCE)
    manager = fleet.manager(Letters)
    for number in range(6):
        ended(fleet, f"done {number}", "done", 20 - number)
    steps: list[str] = []
    waiter = ExitStack()
    waiter.enter_context(waiting(os.path.dirname(fleet.engine.url.database)))

    class Noted(PruneHistoryWorker):
        name = "prune_history_worker"

        def do_work(self, context):
            commit, wait = context.commit, context.stopping.wait

            def note_and_commit():
                steps.append("commit")
                commit()

            def note_and_wait(seconds):
                steps.append("rest")
                if steps.count("rest") == 3:
                    waiter.close()  # the connection has the lock
                return wait(seconds)

            context.commit, context.stopping.wait = note_and_commit, note_and_wait
            super().do_work(context)

    manager.add(Noted)
    with waiter:
        assert manager.tick("prune_history_worker", TICK).state == "succeeded"
    of_executions, of_messages = ["commit", "rest", "rest", "rest"], ["commit", "rest"] * 3
    assert steps[:-2] == of_executions + of_messages  # two commits of the tallies follow
    assert kept(fleet) == []


# -- the counts for the charts -------------------------------------------------------------------


def test_counts_are_deleted_as_old_as_the_history_and_counts_of_minutes_after_three_hours(app):
    ages = {300: [timedelta(hours=2), timedelta(hours=4)], 3600: [timedelta(days=13), timedelta(days=15)]}
    ahead = [{"seconds": 300, "start": TICK + timedelta(days=2)}]
    rows = [{"seconds": seconds, "start": TICK - age} for seconds, each in ages.items() for age in each]
    with app.app_context():
        same = {"kind": "worker", "name": "daily_worker", "counts": "{}"}
        db.session.execute(insert(tallies), [row | same for row in rows + ahead])
        db.session.commit()
        app.extensions["background_workers"].tick("prune_history_worker", TICK)
        left = db.session.execute(select(tallies.c.seconds, tallies.c.start)).all()
    assert sorted(left) == [(300, TICK - timedelta(hours=2)), (3600, TICK - timedelta(days=13))]
