"""A run: its effects and its success are one transaction, and without its claim it cannot commit."""

import logging
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import svcs
from flask import current_app
from sqlalchemy import Connection, create_engine, event, insert, select, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.pool import NullPool
from support.databases import on_postgresql
from support.fleet import HOUR, PATIENCE, Fleet, Hourly, Note, db, effect, effects, last_hour, states, stop, wait_until
from support.fork_server import Nursery
from support.processes import environment

from background import BackgroundWorkerManager, ClaimLost, Message, MessageWorker, WorkerContext, current_workers
from background.database.clock import steady
from background.ledger.leases import Instance
from background.registry import declared_schedule

NOW = last_hour


# -- one transaction -------------------------------------------------------------------------------


@pytest.mark.promise
def test_a_run_killed_between_its_last_effect_and_the_commit_leaves_neither_and_runs_again_after_the_lease(
    fleet: Fleet, nursery: Nursery
) -> None:
    with nursery.forked(fleet.command("stuck_at_the_end", NOW().isoformat()), environment()) as process:
        process.wait_for("working")
        process.kill()
    wait_until(lambda: fleet.states() == ["running"] and fleet.effects() == [], "the rollback")

    class StuckAtTheEnd(Hourly):
        """A release that corrected the worker."""

    manager = fleet.manager(StuckAtTheEnd)
    manager.start()
    wait_until(lambda: fleet.states() == ["lost", "succeeded"], "the second attempt")
    lost, won = fleet.executions()
    assert lost.reason == f"{lost.instance_name} stopped renewing its lease"
    assert (won.tick, won.attempt) == (lost.tick, 2)
    assert won.token > lost.token
    assert fleet.keys() == [f"stuck_at_the_end:{lost.tick.isoformat()}"]


def test_a_failing_run_keeps_nothing_is_logged_once_and_its_next_tick_runs(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            effect(context)
            if context.tick < NOW():
                raise ZeroDivisionError("by design")

    manager = fleet.manager(Failing)
    assert manager.tick("failing", NOW() - HOUR).state == "failed"
    assert fleet.effects() == []
    (execution,) = fleet.executions()
    assert execution.state == "failed"
    assert execution.reason.startswith("Traceback (most recent call last):")
    assert execution.reason.endswith("ZeroDivisionError: by design\n")
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.exc_info is not None
    assert record.name == "background.failing"
    assert manager.tick("failing", NOW()).state == "succeeded"
    assert len(fleet.effects()) == 1


def test_a_system_exit_in_a_run_is_a_failure_of_the_run_alone(fleet: Fleet) -> None:
    class Leaving(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            effect(context)
            raise SystemExit(3)

    assert fleet.manager(Leaving).tick("leaving", NOW()).state == "failed"
    assert fleet.effects() == []


def test_an_interrupt_raised_by_a_run_is_a_failure_and_does_not_run_again_for_ever(fleet: Fleet) -> None:
    class Interrupting(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            raise KeyboardInterrupt

    manager = fleet.manager(Interrupting)
    with ThreadPoolExecutor(1) as pool:  # a Ctrl-C reaches the main thread alone
        assert pool.submit(manager.tick, "interrupting", NOW()).result().state == "failed"
    assert manager.stores.ledger.look("interrupting").pending_tick is None


def test_an_error_whose_text_a_database_cannot_hold_is_a_failed_run(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """Quote, for example, the name of a file, which can be any bytes."""
    caplog.set_level(logging.CRITICAL, "background.quoting")  # a report of pytest-xdist cannot either

    class Quoting(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            raise FileNotFoundError("no file \udcff\0.txt")

    assert fleet.manager(Quoting).tick("quoting", NOW()).state == "failed"
    assert r"no file \udcff\x00.txt" in fleet.executions()[0].reason


def test_a_worker_whose_constructor_fails_is_a_failed_run(fleet: Fleet) -> None:
    class Unmakable(Hourly):
        def __init__(self) -> None:
            raise OSError("no such mailbox")

    assert fleet.manager(Unmakable).tick("unmakable", NOW()).state == "failed"
    assert "OSError: no such mailbox" in fleet.executions()[0].reason


def test_an_async_run_has_the_session_and_is_awaited(fleet: Fleet) -> None:
    import asyncio

    class Patient(Hourly):
        async def do_work(self, context: WorkerContext) -> None:
            effect(context, "before")
            await asyncio.sleep(0)
            effect(context, current_app.name)

    assert fleet.manager(Patient).tick("patient", NOW()).state == "succeeded"
    assert fleet.effects() == ["before", "host"]


def test_an_async_run_is_awaited_beside_the_event_loop_of_its_caller(fleet: Fleet) -> None:
    import asyncio

    class Async(Hourly):
        async def do_work(self, context: WorkerContext) -> None:
            effect(context)
            await asyncio.sleep(0)
            context.commit()
            effect(context, "after the commit")

    manager = fleet.manager(Async)

    async def view() -> str:
        return manager.tick("async", NOW()).state

    assert asyncio.run(view()) == "succeeded"
    assert fleet.effects() == ["", "after the commit"]


def test_a_cancelled_async_run_has_failed_and_does_not_run_again_for_ever(fleet: Fleet) -> None:
    import asyncio

    class Cancelled(Hourly):
        async def do_work(self, context: WorkerContext) -> None:
            raise asyncio.CancelledError

    manager = fleet.manager(Cancelled)
    assert manager.tick("cancelled", NOW()).state == "failed"
    assert fleet.row("cancelled").pending_tick is None


def test_a_run_that_swallows_a_failed_flush_has_failed(fleet: Fleet) -> None:
    class Careless(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            effect(context)
            context.session.add(Note(text="Broken", number=-1))
            try:
                context.session.flush()
            except IntegrityError:
                return

    assert fleet.manager(Careless).tick("careless", NOW()).state == "failed"
    assert fleet.effects() == []


def test_a_run_that_swallows_an_integrity_error_is_committed_completely_or_not_at_all(fleet: Fleet) -> None:
    """PostgreSQL aborts the transaction, SQLite the statement alone."""

    class Careless(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            context.session.execute(insert(effects).values(key="a", note="first", unique=1))
            try:
                context.session.execute(insert(effects).values(key="b", note="second", unique=1))
            except IntegrityError:
                return

    state = fleet.manager(Careless).tick("careless", NOW()).state
    assert (state, fleet.effects()) == (
        ("succeeded", ["first"]) if fleet.engine.dialect.name == "sqlite" else ("failed", [])
    )


@pytest.mark.parametrize("before", ["", "-- a comment\n", "/* a comment */ "])
def test_a_write_that_begins_with_a_cte_is_part_of_the_run(fleet: Fleet, before: str) -> None:
    class Counting(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            context.session.execute(
                text(f"{before}WITH a AS (SELECT 'cte' AS key) INSERT INTO effects (key, note) SELECT key, '' FROM a")
            )
            raise ZeroDivisionError

    assert fleet.manager(Counting).tick("counting", NOW()).state == "failed"
    assert fleet.effects() == []


def test_a_savepoint_of_a_run_is_not_a_commit_of_its_own(fleet: Fleet) -> None:
    class Nesting(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            with context.session.begin_nested():
                effect(context)
            raise ZeroDivisionError

    assert fleet.manager(Nesting).tick("nesting", NOW()).state == "failed"
    assert fleet.effects() == []


def test_a_savepoint_can_be_rolled_back_and_the_rest_is_kept(fleet: Fleet) -> None:
    class Nesting(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            effect(context, "kept")
            try:
                with context.session.begin_nested():
                    effect(context, "dropped")
                    raise ZeroDivisionError
            except ZeroDivisionError:
                effect(context, "kept too")

    assert fleet.manager(Nesting).tick("nesting", NOW()).state == "succeeded"
    assert fleet.effects() == ["kept", "kept too"]


@on_postgresql
def test_a_savepoint_does_not_hold_the_workers_row_until_the_run_ends(fleet: Fleet) -> None:
    class Nesting(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            with context.session.begin_nested():
                effect(context)
            with fleet.engine.begin() as connection:
                connection.execute(text("SET lock_timeout = '100ms'"))
                connection.execute(text("UPDATE background_workers SET paused_at = NULL"))

    assert fleet.manager(Nesting).tick("nesting", NOW()).state == "succeeded"


def test_a_run_commits_in_slices_with_its_progress(fleet: Fleet) -> None:
    seen = []

    class Slicing(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            for done in (1, 2):
                effect(context, done)
                context.progress(done, 3)
                context.commit()
                (execution,) = fleet.executions()
                seen.append((fleet.effects(), execution.state, execution.progress_done, execution.progress_total))
            context.progress(3, 3)

    assert fleet.manager(Slicing).tick("slicing", NOW()).state == "succeeded"
    assert seen == [(["1"], "running", 1, 3), (["1", "2"], "running", 2, 3)]
    assert fleet.executions()[0].progress_done == 3


def test_committed_slices_survive_a_later_failure(fleet: Fleet) -> None:
    class Slicing(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            effect(context, "a slice")
            context.commit()
            effect(context, "the rest")
            raise ZeroDivisionError

    assert fleet.manager(Slicing).tick("slicing", NOW()).state == "failed"
    assert fleet.effects() == ["a slice"]


@on_postgresql
def test_a_run_whose_connection_breaks_has_failed_and_the_next_tick_runs(fleet: Fleet) -> None:
    class Unplugged(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            effect(context)
            if context.tick < NOW():
                own = context.session.scalar(text("SELECT pg_backend_pid()"))
                with fleet.engine.begin() as connection:
                    connection.execute(text("SELECT pg_terminate_backend(:own)"), {"own": own})
                raise ZeroDivisionError

    manager = fleet.manager(Unplugged)
    assert manager.tick("unplugged", NOW() - HOUR).state == "failed"
    assert manager.tick("unplugged", NOW()).state == "succeeded"
    assert len(fleet.effects()) == 1


@pytest.mark.promise
@on_postgresql
def test_a_run_whose_database_goes_away_is_run_again_as_the_next_attempt(fleet: Fleet) -> None:
    class Unplugged(Hourly):
        max_attempts = 2

        def do_work(self, context: WorkerContext) -> None:
            effect(context)
            own = context.session.scalar(text("SELECT pg_backend_pid()"))
            with fleet.engine.begin() as connection:
                connection.execute(text("SELECT pg_terminate_backend(:own)"), {"own": own})
            try:
                context.session.execute(text("SELECT 1"))
            except OperationalError as error:
                raise RuntimeError("no answer") from error

    manager = fleet.manager(Unplugged)
    assert manager.tick("unplugged", NOW()).state == "lost"
    assert fleet.row("unplugged").pending_tick == NOW()
    assert manager.tick("unplugged", NOW()).state == "lost"
    assert (fleet.states(), fleet.row("unplugged").pending_tick) == (["lost", "lost"], None)
    assert "its database connection broke" in fleet.executions()[0].reason
    assert fleet.effects() == []


@pytest.mark.promise
@on_postgresql
def test_a_run_that_cannot_connect_again_is_run_again_as_the_next_attempt(fleet: Fleet) -> None:
    class Refused(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            if context.attempt == 1:
                nowhere = fleet.engine.url.update_query_dict({"host": "/nowhere"})
                create_engine(nowhere, poolclass=NullPool).connect()
            effect(context)

    manager = fleet.manager(Refused)
    assert manager.tick("refused", NOW()).state == "lost"
    assert manager.tick("refused", NOW()).state == "succeeded"


# -- the context of a run ---------------------------------------------------------------------------


def test_the_proxy_is_the_current_apps_manager(fleet: Fleet) -> None:
    seen = []

    class Looking(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            seen.append((current_workers._get_current_object(), set(current_workers.workers)))

    manager = fleet.manager(Looking)
    manager.tick("looking", NOW())
    assert seen == [(manager, {"looking"})]
    with pytest.raises(RuntimeError, match="application context"):
        _ = current_workers.workers


def test_a_run_resolves_services_and_a_test_overrides_them(fleet: Fleet) -> None:
    found = []

    class Library:
        pass

    class Asking(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            found.append(context.services.get(Library))

    app = fleet.app(Asking)
    svcs.flask.register_factory(app, Library, Library)
    manager: BackgroundWorkerManager = app.extensions["background_workers"]
    manager.trigger("asking")
    assert isinstance(found[0], Library)
    stand_in = Library()
    svcs.flask.register_value(app, Library, stand_in)
    manager.trigger("asking")
    assert found[1] is stand_in


def test_the_services_of_a_run_are_closed_after_it(fleet: Fleet) -> None:
    story = []

    class MessageHistory:
        pass

    def open_mailbox() -> Iterator[MessageHistory]:
        story.append("opened")
        yield MessageHistory()
        story.append("closed")

    class Mailing(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            context.services.get(MessageHistory)
            story.append("worked")

    app = fleet.app(Mailing)
    svcs.flask.register_factory(app, MessageHistory, open_mailbox)
    app.extensions["background_workers"].trigger("mailing")
    assert story == ["opened", "worked", "closed"]


def test_every_run_has_a_fresh_session(fleet: Fleet) -> None:
    sessions = []

    class Collecting(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            assert context.session is db.session()
            assert not context.session.identity_map
            sessions.append(context.session)

    app = fleet.app(Collecting)
    with app.app_context():
        outer = db.session()
        for _ in range(2):
            app.extensions["background_workers"].trigger("collecting")
    assert len({id(session) for session in [*sessions, outer]}) == 3


def test_a_run_knows_its_tick_attempt_token_and_key(fleet: Fleet) -> None:
    seen = []

    class Knowing(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            seen.append(
                (
                    context.worker,
                    context.tick,
                    context.attempt,
                    context.token,
                    context.idempotency_key,
                )
            )

    fleet.manager(Knowing).tick("knowing", NOW())
    assert seen == [("knowing", NOW(), 1, 1, f"knowing:{NOW().isoformat()}")]


# -- the fence -------------------------------------------------------------------------------------


class Robbed(Hourly):
    """Loses its claim in mid-run, as a frozen process does, and then continues as `how` says."""

    fleet: Fleet
    how: str

    def do_work(self, context: WorkerContext) -> None:
        self.fleet.take_over("robbed")
        effect(context)
        if self.how == "commit":
            context.session.commit()
        elif self.how == "nested":
            context.session.rollback()
            with current_app.app_context():
                db.session.execute(insert(effects).values(key="nested", note=""))
                db.session.commit()
        elif self.how == "swallow":
            with pytest.raises(ClaimLost):
                context.commit()
            context.session.rollback()
            effect(context)


@pytest.mark.parametrize("how", ["commit", "nested", "finish", "swallow"])
def test_once_the_token_moved_on_no_commit_of_the_run_passes(
    fleet: Fleet, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    Robbed.fleet, Robbed.how = fleet, how
    assert fleet.manager(Robbed).tick("robbed", NOW()).state == "lost"
    assert fleet.effects() == []
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.levelno == logging.WARNING
    assert "Lost the tick" in record.getMessage()
    assert fleet.row("robbed").running == 2  # the commit of the new holder


@pytest.mark.parametrize("kind", ["tick", "message"])
def test_a_run_can_commit_in_the_database_of_another_application(
    fleet: Fleet, kind: str, tmp_path: Path, template_sqlite: Path
) -> None:
    """Check that the claim is not looked for in that database."""
    other = Fleet(f"sqlite:///{shutil.copyfile(template_sqlite, tmp_path / 'other.sqlite')}")

    def work(context: WorkerContext) -> None:
        effect(context, "here")
        with other.apps[0].app_context():
            db.session.execute(insert(effects).values(key=context.idempotency_key, note="there"))
            db.session.commit()

    class Across(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            work(context)

    class Letters(MessageWorker):
        topic = "letters"

        def handle(self, message: Message, context: WorkerContext) -> None:
            work(context)

    manager = fleet.manager(Across, Letters)
    if kind == "tick":
        assert manager.tick("across", NOW()).state == "succeeded"
    else:
        fleet.enqueue("letters", 1)
        fleet.manager(Letters).start()
        wait_until(lambda: states(fleet) == ["done"], "the handling")
    assert (fleet.effects(), other.effects()) == (["here"], ["there"])
    stop(*fleet.apps, *other.apps)


def test_after_the_deadline_the_commit_is_refused_without_a_query(fleet: Fleet) -> None:
    class Late(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            effect(context)
            context.instance.deadline = steady()
            with pytest.raises(ClaimLost, match="could not renew the lease in time"):
                context.commit()
            assert context.stopping
            raise OSError("and then everything else went wrong, too")

    no_heartbeat = {"WORKERS_HEARTBEAT_SECONDS": 60, "WORKERS_LEASE_SECONDS": 200}  # a heartbeat would renew the lease
    assert fleet.manager(Late, **no_heartbeat).tick("late", NOW()).state == "lost"
    assert fleet.effects() == []


def test_a_run_that_wraps_claim_lost_in_its_own_error_is_lost_and_not_failed(fleet: Fleet) -> None:
    class Wrapping(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            fleet.take_over("wrapping")
            try:
                context.commit()
            except ClaimLost as lost:
                raise ValueError("could not save") from lost

    assert fleet.manager(Wrapping).tick("wrapping", NOW()).state == "lost"


@pytest.mark.promise
@pytest.mark.parametrize("way_out", ["commit", "raise_if_stopping", "return", "error"])
def test_a_timed_out_run_cannot_commit_and_the_next_tick_runs(fleet: Fleet, way_out: str) -> None:
    class Hanging(Hourly):
        timeout = timedelta(seconds=0.1)

        def do_work(self, context: WorkerContext) -> None:
            if context.tick == NOW():
                effect(context, "the next tick")
                return
            assert context.stopping.wait(PATIENCE)
            effect(context)
            if way_out == "error":
                raise ZeroDivisionError
            if way_out != "return":
                getattr(context, way_out)()

    manager = fleet.manager(Hanging)
    assert manager.tick("hanging", NOW() - HOUR).state == "timed out"
    (execution,) = fleet.executions()
    assert (execution.state, execution.reason) == ("timed out", "ran longer than its timeout of 0:00:00.100000")
    assert fleet.row("hanging").pending_tick is None
    Hanging.timeout = None
    assert manager.tick("hanging", NOW()).state == "succeeded"
    assert fleet.effects() == ["the next tick"]


def test_a_stopped_run_runs_again_with_the_same_attempt_and_key(fleet: Fleet) -> None:
    working = threading.Event()

    class Stoppable(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            effect(context, context.attempt)
            if not working.is_set():
                context.commit()
                effect(context, "not kept")
                context.session.flush()
                working.set()
                assert context.stopping.wait(PATIENCE)
                context.raise_if_stopping()

    first, second = fleet.manager(Stoppable), fleet.manager(Stoppable)
    first.start()
    assert working.wait(PATIENCE)
    first.stop()
    assert fleet.states() == ["handed back"]
    second.start()
    wait_until(lambda: fleet.states() == ["handed back", "succeeded"], "the second run")
    assert fleet.effects() == ["1", "1"]
    assert len(set(fleet.keys())) == 1


@pytest.mark.promise
def test_a_run_that_does_not_stop_in_time_is_handed_back_and_cannot_commit(fleet: Fleet) -> None:
    working, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    class Stubborn(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            if working.is_set():
                effect(context, "again")
                return
            working.set()
            assert go_on.wait(PATIENCE)
            effect(context, "the zombie")
            try:
                context.commit()
            finally:
                ended.set()

    first, second = fleet.manager(Stubborn), fleet.manager(Stubborn)
    first.start()
    assert working.wait(PATIENCE)
    first.stop(timeout=0.1)
    second.start()
    wait_until(lambda: fleet.states() == ["handed back", "succeeded"], "the second run")
    go_on.set()
    assert ended.wait(PATIENCE)
    assert fleet.effects() == ["again"]
    assert fleet.executions()[1].attempt == 1


# -- taking over -----------------------------------------------------------------------------------


def claimed_by_a_ghost(manager: BackgroundWorkerManager, name: str, ghost: str = "ghost") -> None:
    """Begin the tick (or its next attempt) as an instance that is unknown or gone."""
    manager.stores.controls.register({name: declared_schedule(manager.workers[name])})
    pending = manager.stores.ledger.look(name).pending_tick
    if pending:
        assert manager.stores.ledger.claim_pending(name, pending, (ghost, "elsewhere:1"))
    else:
        assert manager.stores.ledger.claim(name, NOW() - HOUR, "every 3600s", (ghost, "elsewhere:1"))


def test_the_tick_of_a_dead_instance_runs_again_under_the_same_key(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    claimed_by_a_ghost(manager, "hourly")
    assert manager.tick("hourly", NOW()).state == "succeeded"
    lost, again, newest = fleet.executions()
    assert (lost.state, lost.attempt, lost.reason) == (
        "lost",
        1,
        "elsewhere:1 is not known to the fleet: its row was deleted",
    )
    assert (again.state, again.attempt, again.tick) == ("succeeded", 2, lost.tick)
    assert (newest.state, newest.attempt, newest.tick) == ("succeeded", 1, NOW())
    assert fleet.keys()[0] == f"hourly:{lost.tick.isoformat()}"


@pytest.mark.promise
def test_a_tick_whose_instances_keep_dying_is_given_up_after_max_attempts(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    for _ in range(3):
        claimed_by_a_ghost(manager, "hourly")
        assert manager.recovery.recover([manager.stores.ledger.look("hourly")])
    assert [(execution.state, execution.attempt) for execution in fleet.executions()] == [
        ("lost", 1),
        ("lost", 2),
        ("lost", 3),
    ]
    assert fleet.row("hourly").pending_tick is None
    assert manager.tick("hourly", NOW()).state == "succeeded"
    assert len(fleet.effects()) == 1


def test_a_lost_tick_is_not_repeated_if_the_worker_says_skip(fleet: Fleet) -> None:
    class Once(Hourly):
        on_lost = "skip"

    manager = fleet.manager(Once)
    claimed_by_a_ghost(manager, "once")
    assert manager.tick("once", NOW()).state == "succeeded"
    assert fleet.states() == ["lost", "succeeded"]


def test_a_worker_unknown_to_this_release_is_left_alone(fleet: Fleet) -> None:
    class Newer(Hourly):
        pass

    newer, older = fleet.manager(Newer), fleet.manager(Hourly)
    claimed_by_a_ghost(newer, "newer")
    assert not older.recovery.recover(list(older.stores.ledger.states().values()))
    assert fleet.states("newer") == ["running"]


def test_a_schedule_that_this_release_cannot_read_stops_no_other_worker(fleet: Fleet) -> None:
    class Newer(Hourly):
        pass

    fleet.manager(Newer).pause("newer")
    fleet.set("newer", schedule="every full moon")
    older = fleet.manager(Hourly, Newer)
    older.start()
    wait_until(lambda: fleet.states("hourly") == ["succeeded"], "the run")
    instance = older.presence.instance
    renewed = instance.deadline
    wait_until(lambda: instance.deadline > renewed, "the next heartbeat")


@pytest.mark.promise
@pytest.mark.parametrize("when", ["at its start", "later"])
def test_a_worker_whose_schedule_was_unreadable_for_a_while_runs_again(
    fleet: Fleet, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Changing(Hourly):
        period = timedelta(seconds=0.3)

    manager = fleet.manager(Changing)
    manager.recovery.look(Changing)
    if when == "later":
        manager.start()
        wait_until(lambda: "succeeded" in fleet.states(), "the first run")
    fleet.set("changing", schedule="every full moon")
    manager.start()
    wait_until(lambda: "'every full moon' cannot be used" in caplog.text, "the word about it")
    threading.Event().wait(0.4)  # the awaited tick passes in this time
    fleet.set("changing", schedule="every 0.5s", scheduled_at=datetime.now(UTC))
    ran = fleet.states().count("succeeded")
    wait_until(lambda: fleet.states().count("succeeded") >= ran + 2, "runs by a schedule that it can read")
    assert "Traceback" not in caplog.text


@pytest.mark.promise
def test_runs_of_an_instance_that_signed_off_are_handed_back(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    ghost = Instance(timedelta(seconds=10))
    manager.stores.leases.beat(ghost)
    claimed_by_a_ghost(manager, "hourly", ghost.id)
    assert manager.tick("hourly", NOW()) is None  # the ghost is alive, so the tick overlaps
    manager.stores.leases.sign_off(ghost)
    assert manager.tick("hourly", NOW()) is None  # this tick is skipped, but the older tick runs
    assert [(execution.state, execution.attempt) for execution in fleet.executions()] == [
        ("handed back", 1),
        ("skipped", None),
        ("succeeded", 1),
    ]
    assert "signed off before the run ended" in str(fleet.executions()[0].reason)  # the work may have been done in part


@pytest.mark.promise
def test_a_run_that_holds_the_write_lock_longer_than_the_lease_keeps_its_claim(fleet: Fleet) -> None:
    """Check this also while another claim must be recovered, which is a write."""

    class Holding(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            effect(context)
            context.session.flush()
            ghost.lease = timedelta()
            manager.stores.leases.beat(ghost)
            threading.Event().wait(2.5)

    class Orphaned(Hourly):
        catch_up = False
        run_on_first_start = False

    manager, ghost = fleet.manager(Holding, Orphaned, WORKERS_LEASE_SECONDS=1.5), Instance(HOUR)
    manager.stores.leases.beat(ghost)
    claimed_by_a_ghost(manager, "orphaned", ghost.id)
    manager.start()
    wait_until(lambda: fleet.states("holding") not in ([], ["running"]), "the long run")
    assert fleet.states("holding") == ["succeeded"]
    wait_until(lambda: fleet.states("orphaned") == ["lost", "succeeded"], "the taking over")


@pytest.mark.promise
def test_a_claim_whose_reply_was_lost_still_runs(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly, WORKERS_LEASE_SECONDS=1.5)
    manager.stores.controls.register({"hourly": declared_schedule(Hourly)})

    lost = []

    @event.listens_for(manager.stores.main.engine, "after_cursor_execute")
    def commit_and_hang_up(connection: Connection, cursor: object, statement: str, *_: object) -> None:
        if "INSERT INTO background_executions" in statement and not lost:
            lost.append(statement)
            cursor.fetchall()  # type: ignore[attr-defined]
            connection.connection.dbapi_connection.commit()
            raise OperationalError("COMMIT", {}, OSError("the line is dead"))

    manager.start()
    wait_until(lambda: fleet.states() == ["handed back", "succeeded"], "the run")
    assert [execution.attempt for execution in fleet.executions()] == [1, 1]
    assert fleet.effects() == [""]


@pytest.mark.promise
def test_an_instance_that_comes_back_after_its_lease_begins_as_a_new_instance(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    manager.start()
    wait_until(lambda: fleet.states() == ["succeeded"], "the run")
    first = manager.presence.instance

    def another_life() -> bool:
        first.deadline = steady()  # at every poll, because a heartbeat that had begun renews the lease
        return manager.presence.instance is not first and manager.presence.instance.is_alive

    wait_until(another_life, "the new life")
    with manager.stores.leases.engine.connect() as connection:
        assert connection.scalar(select(text("count(*) FROM background_instances"))) >= 2
