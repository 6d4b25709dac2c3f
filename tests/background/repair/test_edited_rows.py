"""Rows that contradict each other, as after a crash that lost commits, a restore, or an edit by a user."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flask.testing import FlaskClient
from sqlalchemy import delete, insert, select, text, update
from support.databases import on_postgresql, on_postgresql_later
from support.fleet import HOUR, PATIENCE, Fleet, Hourly, effect, last_hour, wait_until

from background import BackgroundWorkerManager, ClaimLost, Message, MessageWorker, WorkerContext
from background.database import tables
from background.ledger.claim import Claim
from background.ledger.leases import Instance
from background.schedule.periods import Every

GHOST = ("a dead one", "elsewhere:1")


def claimed(manager: BackgroundWorkerManager, tick: datetime, instance: tuple[str, str] = GHOST) -> Claim:
    schedule = manager.recovery.look(Hourly, tick).schedule_text
    claim = manager.stores.ledger.claim("hourly", tick, schedule, instance)
    assert isinstance(claim, Claim)
    return claim


def alive(manager: BackgroundWorkerManager) -> tuple[str, str]:
    """Give an instance that lives for an hour."""
    instance = Instance(HOUR)
    manager.stores.leases.beat(instance)
    return instance.id, instance.name


def execute(fleet: Fleet, *statements: Any) -> None:
    with fleet.engine.begin() as connection:
        for statement in statements:
            connection.execute(statement)


# -- lost commits ----------------------------------------------------------------------------------


@contextmanager
def lost_commits(fleet: Fleet) -> Iterator[None]:
    """Lose the commits of this block to the engine's tables at its end, so that ids repeat."""
    kept = (tables.workers, tables.executions, tables.messages)
    with fleet.engine.connect() as connection:
        before = {table: [dict(row._mapping) for row in connection.execute(select(table))] for table in kept}
    yield
    with fleet.engine.begin() as connection:
        for table in kept:
            connection.execute(delete(table))
            if before[table]:
                connection.execute(insert(table), before[table])
            if fleet.engine.dialect.name == "postgresql" and "id" in table.c:
                greatest = max((row["id"] for row in before[table]), default=0)
                sequence = f"pg_get_serial_sequence('{table.name}', 'id')"
                connection.execute(text(f"SELECT setval({sequence}, {greatest + 1}, false)"))


class Amnesiac(Hourly):
    """Has the database forget the run's claim, which another instance then makes. Ends as `how` says."""

    name = "hourly"
    how: str
    forget: Callable[[WorkerContext], None]

    def do_work(self, context: WorkerContext) -> None:
        effect(context)
        context.session.rollback()  # on SQLite the open transaction would block the other instances
        type(self).forget(context)
        effect(context)
        match self.how:
            case "commit":
                context.session.commit()
            case "fail":
                raise ValueError("no reason")
            case "hand back":
                context.stopping.set()
                context.raise_if_stopping()
            case "swallow":
                with pytest.raises(ClaimLost):
                    context.commit()
                context.session.rollback()
                effect(context)


@pytest.mark.promise
@pytest.mark.parametrize("how", ["commit", "finish", "fail", "hand back", "swallow"])
def test_a_run_whose_token_repeats_after_lost_commits_leaves_the_next_run_alone(fleet: Fleet, how: str) -> None:
    class Forgotten(Amnesiac):
        name = "hourly"

    manager, other = fleet.manager(Forgotten), fleet.manager(Hourly)
    Forgotten.how = how
    manager.recovery.look(Forgotten, last_hour())
    second, repeated = alive(other), []

    def forget(context: WorkerContext) -> None:
        forgetting.__exit__(None, None, None)
        repeated.append(claimed(other, context.tick, second))
        assert (repeated[0].token, repeated[0].execution) == (context.token, context.claim.execution)

    Forgotten.forget = staticmethod(forget)  # type: ignore[assignment]
    forgetting = lost_commits(fleet)
    forgetting.__enter__()
    execution = manager.tick("hourly", last_hour())
    assert execution is not None
    assert execution.state != "succeeded"
    assert fleet.effects() == []
    row, (running, *others) = fleet.row("hourly"), fleet.executions()
    assert (row.running, row.claim) == (repeated[0].token, repeated[0].id)
    assert (running.state, running.claim, running.instance) == ("running", repeated[0].id, second[0])
    assert [(each.token, each.claim) for each in others if each.claim != execution.claim.id] == []
    assert other.stores.ledger.end(repeated[0], "failed", "of its own")


def test_a_tick_whose_claim_the_database_lost_gets_a_row_and_runs_again(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    class Forgotten(Amnesiac):
        name = "hourly"
        how = "finish"

        def do_work(self, context: WorkerContext) -> None:
            if context.token == 1:
                super().do_work(context)
            else:
                effect(context, "again")

    manager = fleet.manager(Forgotten)
    manager.recovery.look(Forgotten, last_hour())
    Forgotten.forget = staticmethod(lambda context: forgetting.__exit__(None, None, None))  # type: ignore[assignment]
    forgetting = lost_commits(fleet)
    forgetting.__enter__()
    assert manager.tick("hourly", last_hour()).state == "lost"
    manager.start()
    wait_until(lambda: fleet.states()[:2] == ["lost", "succeeded"], "the second attempt")
    lost, again = fleet.executions()
    assert (lost.tick, again.tick) == (last_hour(), last_hour())
    assert "database lost its commit" in lost.reason
    assert again.token == lost.token + 1
    assert fleet.effects() == ["again"]


def test_a_batch_that_the_database_lost_acknowledges_nothing_of_the_next_batch(fleet: Fleet) -> None:
    class Notes(MessageWorker):
        topic = "notes"

        def handle(self, message: Message, context: WorkerContext) -> None: ...

    manager = fleet.manager(Notes)
    fleet.enqueue("notes", 1)
    queue, app = manager.stores.queue, manager.app
    with lost_commits(fleet):
        first = queue.claim("notes", "notes", 10, GHOST)
    second = queue.claim("notes", "notes", 10, GHOST)
    assert (first.ids, first.messages[0].token) == (second.ids, second.messages[0].token)
    with app.app_context(), pytest.raises(ClaimLost):
        queue.acknowledge(first, first.ids, first.ids, manager.db.session())
    queue.hand_back(first, first.ids)
    assert queue.fail(first, first.ids, "error", 5, timedelta()) == []
    assert queue.left(first) == []
    assert [message.id for message in queue.left(second)] == second.ids


def test_ending_a_claim_leaves_another_claims_execution_alone(fleet: Fleet) -> None:
    """Give the execution's number and token to another claim, as restoring one table does."""
    manager = fleet.manager(Hourly)
    claim = claimed(manager, last_hour())
    execute(fleet, update(tables.executions).values(claim="another", state="succeeded", reason="of its own"))
    assert manager.stores.ledger.end(claim, "lost", "not its own", 2)
    assert [(row.state, row.reason) for row in fleet.executions()] == [
        ("succeeded", "of its own"),
        ("lost", "not its own"),
    ]


def test_a_lowered_token_continues_above_the_history(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    assert manager.tick("hourly", last_hour()).claim.token == 1
    assert manager.trigger("hourly").claim.token == 2
    fleet.set("hourly", token=0)
    assert manager.trigger("hourly").claim.token == 3
    fleet.set("hourly", token=0, mark=last_hour() - HOUR)
    assert manager.tick("hourly", last_hour()).claim.token == 4


# -- changes by hand -------------------------------------------------------------------------------


@pytest.fixture
def client(fleet: Fleet) -> FlaskClient:
    """Give a browser. Its instance has the hourly worker and has not started."""
    return fleet.app(Hourly).test_client()


def damage_claim(fleet: Fleet, manager: BackgroundWorkerManager) -> None:
    claimed(manager, last_hour())
    execute(fleet, delete(tables.executions))


def damage_by_token(fleet: Fleet, manager: BackgroundWorkerManager) -> None:
    manager.recovery.look(Hourly)
    fleet.set("hourly", running=5, token=5, mark=last_hour())


def damage_execution(fleet: Fleet, manager: BackgroundWorkerManager) -> None:
    claimed(manager, last_hour())
    fleet.set("hourly", running=None)


def damage_by_row(fleet: Fleet, manager: BackgroundWorkerManager) -> None:
    manager.recovery.look(Hourly)
    row = {"worker": "hourly", "tick": last_hour(), "trigger": "schedule", "state": "running"}
    fleet.set("hourly", mark=last_hour())
    execute(fleet, insert(tables.executions).values(row))


def damage_worker(fleet: Fleet, manager: BackgroundWorkerManager) -> None:
    claimed(manager, last_hour())
    execute(fleet, delete(tables.workers))


DAMAGES = [damage_claim, damage_by_token, damage_execution, damage_by_row, damage_worker]
AGAIN = {
    damage_claim: ["lost", "succeeded"],
    damage_by_token: ["lost"],
    damage_execution: ["lost", "succeeded"],
    damage_by_row: ["lost", "succeeded"],
    damage_worker: ["lost", "succeeded"],
}


@pytest.mark.promise
@pytest.mark.parametrize("damage", DAMAGES)
def test_rows_edited_by_a_user_heal_with_a_log_line_and_a_row_and_every_page_works_meanwhile(
    fleet: Fleet, damage: Callable[..., None], client: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    manager: BackgroundWorkerManager = client.application.extensions["background_workers"]
    damage(fleet, manager)
    look(fleet, client)
    if damage is damage_claim:
        assert "is claimed by elsewhere:1, which is gone" in manager.why("hourly", last_hour()).sentence
    manager.start()
    wait_until(lambda: fleet.states() == AGAIN[damage], "the healing")
    first = fleet.executions()[0]
    assert first.tick == last_hour()
    assert first.reason
    assert "hourly: lost the tick" in caplog.text
    assert fleet.row("hourly").running is None
    look(fleet, client)
    assert manager.trigger("hourly").state == "succeeded"
    assert fleet.row("hourly").mark == last_hour()


def test_a_pending_tick_that_a_user_typed_runs(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    manager.recovery.look(Hourly)
    fleet.set("hourly", mark=last_hour(), pending_tick=last_hour(), pending_attempt=None, pending_trigger=None)
    assert manager.tick("hourly", datetime.now(UTC)).state == "succeeded"
    [row] = fleet.executions()
    assert (row.tick, row.attempt, row.trigger) == (last_hour(), 1, "schedule")


@on_postgresql_later
@pytest.mark.parametrize("column", ["mark", "scheduled_at"])
@pytest.mark.parametrize("schedule", ["every 3600s", "cron 0 6 1 1 * UTC"])
def test_a_moment_at_the_end_of_the_calendar_leaves_every_page_readable(
    fleet: Fleet, client: FlaskClient, column: str, schedule: str
) -> None:
    manager: BackgroundWorkerManager = client.application.extensions["background_workers"]
    manager.recovery.look(Hourly)
    fleet.set("hourly", schedule=schedule, **{column: datetime(9999, 12, 31, 23, 59, tzinfo=UTC)})
    look(fleet, client)


def look(fleet: Fleet, client: FlaskClient) -> None:
    """Call every method that reads the workers for people. Each must succeed."""
    for page in ("", "worker/hourly", "timeline", "instances"):
        answer = client.get(f"/workers/{page}")
        assert answer.status_code == 200, (page, answer.text)
    commands = client.application.test_cli_runner()
    for command in (["list"], ["check"], ["why", "hourly"], ["history", "hourly"], ["list", "--json"]):
        result = commands.invoke(args=["workers", *command])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        assert "Traceback" not in result.output
    assert client.get("/metrics").status_code == 200


class Pausing(Hourly):
    """Works until the test lets it go on."""

    name = "hourly"
    catch_up = run_on_first_start = False
    working: threading.Event
    go_on: threading.Event

    def do_work(self, context: WorkerContext) -> None:
        self.working.set()
        assert self.go_on.wait(PATIENCE)
        effect(context)


@contextmanager
def in_mid_run(fleet: Fleet) -> Iterator[BackgroundWorkerManager]:
    """Give an instance whose manual run goes on until the end of the block."""
    Pausing.working, Pausing.go_on = threading.Event(), threading.Event()
    manager = fleet.manager(Pausing)
    manager.start()
    assert manager.request("hourly")
    assert Pausing.working.wait(PATIENCE)
    yield manager
    Pausing.go_on.set()


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "just before its end"])
def test_a_run_whose_execution_is_deleted_goes_on_and_has_a_row_in_the_end(
    fleet: Fleet, seen: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not seen:
        monkeypatch.setattr("background.process.recovery.Recovery._mend", lambda *_: None)
    with in_mid_run(fleet):
        execute(fleet, delete(tables.executions))
        if seen:
            wait_until(lambda: fleet.states() == ["running"], "the row")
    wait_until(lambda: fleet.states() == ["succeeded"], "the end")
    (row,) = fleet.executions()
    assert (row.token, row.attempt) == (1, 1)
    assert row.started_at
    assert row.instance
    assert fleet.effects() == [""]
    assert "was missing. It is written again" in caplog.text


def test_a_run_whose_workers_row_is_deleted_keeps_its_claim_in_the_new_row(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    with in_mid_run(fleet):
        before = fleet.row("hourly")
        execute(fleet, delete(tables.workers))
        wait_until(lambda: is_there(fleet), "the worker's row")
        after = fleet.row("hourly")
        assert "the worker's row was deleted by hand" in caplog.text
        assert (after.token, after.running, after.claim) == (before.token, before.running, before.claim)
    wait_until(lambda: fleet.states() == ["succeeded"], "the end")
    assert fleet.effects() == [""]


def test_a_run_all_of_whose_rows_are_deleted_is_refused_and_run_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_mid_run(fleet):
        execute(fleet, delete(tables.workers), delete(tables.executions))
        wait_until(lambda: is_there(fleet), "the worker's row")
    wait_until(lambda: fleet.states() == ["lost", "succeeded"], "the second attempt")
    assert fleet.effects() == [""]


def test_a_worker_all_of_whose_rows_are_deleted_begins_with_its_next_tick_and_a_line_in_the_log(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    manager = fleet.manager(Hourly)
    assert Hourly.run_on_first_start
    manager.start()
    wait_until(lambda: fleet.states() == ["succeeded"], "the first tick")
    wait_until(lambda: fleet.row("hourly").running is None, "its end")
    execute(fleet, delete(tables.workers), delete(tables.executions))
    wait_until(lambda: is_there(fleet), "the worker's row")
    assert "it has no history" in caplog.text
    assert fleet.row("hourly").mark == last_hour()
    assert "overdue" not in manager.why("hourly").sentence
    assert fleet.effects() == [""]


def is_there(fleet: Fleet) -> bool:
    with fleet.engine.connect() as connection:
        return connection.execute(select(tables.workers)).first() is not None


def test_a_stray_execution_does_not_run_again_after_a_later_claim(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    claimed(manager, last_hour() - HOUR)
    fleet.set("hourly", running=None)
    assert manager.stores.ledger.end(claimed(manager, last_hour()), "failed")
    manager.start()
    wait_until(lambda: "running" not in fleet.states(), "the healing")
    assert fleet.row("hourly").pending_tick is None  # a run of it would have a third execution by now
    assert [(row.state, row.tick) for row in fleet.executions()] == [
        ("lost", last_hour() - HOUR),
        ("failed", last_hour()),
    ]


def test_a_tick_that_was_handed_back_runs_again_even_if_its_workers_row_is_deleted(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    claim = claimed(manager, last_hour())
    assert manager.stores.ledger.end(claim, "handed back", next_attempt=1)
    execute(fleet, delete(tables.workers))
    manager.start()
    wait_until(lambda: fleet.states() == ["handed back", "succeeded"], "the second run")
    assert fleet.row("hourly").mark == last_hour()


@on_postgresql
def test_a_row_that_another_instance_makes_first_does_not_count_as_deleted(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = fleet.manager(Hourly), fleet.manager(Hourly)
    claimed(first, last_hour(), alive(first))
    row = {name: value for name, value in fleet.row("hourly")._mapping.items() if name != "running"}
    execute(fleet, delete(tables.workers))
    with fleet.engine.begin() as connection:
        connection.execute(insert(tables.workers).values(row))
        register = threading.Thread(target=second.stores.controls.register, args=({"hourly": Every(HOUR)},))
        register.start()
        wait_until(fleet.is_blocked, "the second instance's wait for the row")
    register.join(PATIENCE)
    assert fleet.row("hourly").running is None
    assert "deleted by hand" not in caplog.text
