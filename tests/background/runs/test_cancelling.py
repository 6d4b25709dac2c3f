"""Cancelled runs: they are asked to stop, cannot commit after a while, and their tick is decided."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import delete, update
from support.databases import on_sqlite
from support.fleet import HOUR, PATIENCE, Fleet, Hourly, Note, at_once, db, effect, last_hour, wait_until

from background import BackgroundWorkerManager, ClaimLost, CommitFirst, UnknownWorker, WorkerContext, signals
from background.database import tables
from background.ledger.claim import Claim

NOW = last_hour
BRIEFLY = {"WORKERS_SHUTDOWN_SECONDS": 0.2}


class Cancelled(Hourly):
    """A worker whose runs of the latest tick wait until they are asked to stop."""

    name = "cancelled"

    def do_work(self, context: WorkerContext) -> None:
        effect(context, "slice")
        context.commit()
        if context.tick >= NOW() - HOUR / 2:
            assert context.stopping.wait(PATIENCE)
            effect(context, "rest")
            self.end(context)

    def end(self, context: WorkerContext) -> None:
        context.raise_if_stopping()


class Returning(Cancelled):
    name = "returning"

    def end(self, context: WorkerContext) -> None:
        """Return, although the work is not complete."""


class Failing(Cancelled):
    name = "failing"

    def end(self, context: WorkerContext) -> None:
        raise ZeroDivisionError("by design")


def running(fleet: Fleet, manager: BackgroundWorkerManager, name: str) -> Claim:
    """Return the claim in force, once its run has committed its slice."""
    wait_until(lambda: fleet.effects() == ["slice"], "the first slice")
    state = manager.stores.ledger.look(name)
    assert state is not None
    assert state.running is not None
    return state.running


@pytest.mark.parametrize("worker", [Cancelled, Returning, Failing])
def test_a_cancelled_run_is_asked_to_stop_and_its_tick_is_decided(fleet: Fleet, worker: type[Cancelled]) -> None:
    manager, other = fleet.manager(worker), fleet.manager(worker)
    manager.start()
    running(fleet, manager, worker.name)
    assert other.cancel(worker.name, by="ada@example.com")
    wait_until(lambda: fleet.states() != ["running"], "the end of the run")
    (execution,) = fleet.executions()
    assert (execution.state, execution.cancelled_by) == ("cancelled", "ada@example.com")
    assert execution.started_at <= execution.cancelled_at <= execution.finished_at
    assert ("by design" in (execution.reason or "")) == (worker is Failing)
    assert fleet.effects() == ["slice"]
    assert fleet.row(worker.name).pending_tick is None
    assert other.tick(worker.name, NOW()) is None
    assert not other.cancel(worker.name)


def test_a_run_in_a_command_is_cancelled_too(fleet: Fleet) -> None:
    manager, other = fleet.manager(Cancelled), fleet.manager(Cancelled)
    with ThreadPoolExecutor(1) as beside:
        run = beside.submit(manager.trigger, "cancelled")
        running(fleet, manager, "cancelled")
        assert other.cancel("cancelled")
        execution = run.result(PATIENCE)
    assert execution is not None
    assert execution.state == "cancelled"
    (row,) = fleet.executions()
    assert (row.state, row.reason, row.cancelled_by) == ("cancelled", None, None)


def test_other_runs_of_the_instance_go_on(fleet: Fleet) -> None:
    class Beside(Cancelled):
        name = "beside"

        def do_work(self, context: WorkerContext) -> None:
            assert free.wait(PATIENCE)
            stopped.append(context.stopping.is_set())

    free, stopped = threading.Event(), list[bool]()
    manager = fleet.manager(Cancelled, Beside)
    manager.start()
    running(fleet, manager, "cancelled")
    wait_until(lambda: fleet.states("beside") == ["running"], "the other run")
    assert manager.cancel("cancelled")
    wait_until(lambda: fleet.states("cancelled") == ["cancelled"], "the end of the run")
    free.set()
    wait_until(lambda: fleet.states("beside") == ["succeeded"], "the end of the other run")
    assert stopped == [False]


# -- a run that does not end ----------------------------------------------------------------------


class Hung(Hourly):
    """A worker whose runs of the latest tick hang until `free`, and commit then."""

    name = "hung"
    free = threading.Event()
    refused: list[ClaimLost]

    def do_work(self, context: WorkerContext) -> None:
        effect(context, "slice")
        context.commit()
        if context.tick >= NOW() - HOUR / 2:
            assert self.free.wait(PATIENCE)
            effect(context, "late")
            try:
                context.commit()
            except ClaimLost as error:
                self.refused.append(error)
                raise


def test_a_run_that_does_not_end_can_no_longer_commit_and_is_told_apart(fleet: Fleet) -> None:
    Hung.free, Hung.refused = threading.Event(), []
    manager = fleet.manager(Hung, WORKERS_THREADS=1, **BRIEFLY)
    manager.start()
    running(fleet, manager, "hung")
    assert manager.cancel("hung", by="ada")
    wait_until(lambda: fleet.states() == ["cancelled"], "the end of the claim")
    (execution,) = fleet.executions()
    assert execution.reason == "it did not end within 0.2 s, so its thread may still run"
    assert execution.cancelled_by == "ada"
    assert manager.request("hung")  # another thread took the place of the only one
    wait_until(lambda: fleet.states() == ["cancelled", "running"], "the next run")
    Hung.free.set()
    wait_until(lambda: fleet.states() == ["cancelled", "succeeded"] and Hung.refused, "the end of both runs")
    assert "it was cancelled, and it did not end within 0.2 s" in str(Hung.refused[0])
    assert fleet.effects() == ["slice", "slice", "late"]
    wait_until(lambda: "Its thread ended later" in fleet.executions()[0].reason, "the end of the thread")


# -- races ------------------------------------------------------------------------------------------


def test_a_run_whose_request_comes_before_its_last_commit_does_not_succeed(fleet: Fleet) -> None:
    """The request is in the row, and the instance has not heard of it."""

    class Finishing(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            request(manager, context)
            effect(context)

    manager = fleet.manager(Finishing)
    execution = manager.tick("finishing", NOW())
    assert execution is not None
    assert execution.state == "cancelled"
    assert fleet.effects() == []
    assert manager.tick("finishing", NOW()) is None


def request(manager: BackgroundWorkerManager, context: WorkerContext, by: str | None = None) -> None:
    """Write the request to cancel the run into its row, in another thread, and tell its process nothing."""
    with ThreadPoolExecutor(1) as beside:
        assert beside.submit(manager.stores.controls.cancel, context.claim, by).result()


def test_a_request_after_the_last_commit_comes_too_late(fleet: Fleet) -> None:
    class Finished(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            claims.append(context.claim)
            effect(context)

    claims: list[Any] = []
    manager = fleet.manager(Finished)
    manager.tick("finished", NOW())
    assert not manager.cancel("finished")
    assert not manager.stores.controls.cancel(claims[0], None)
    assert fleet.states() == ["succeeded"]


def test_a_cancelled_run_may_commit_its_slices_until_it_ends(fleet: Fleet) -> None:
    class Slicing(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            request(manager, context)
            effect(context, "slice")
            context.commit()
            effect(context, "rest")

    manager = fleet.manager(Slicing)
    manager.tick("slicing", NOW())
    assert fleet.states() == ["cancelled"]
    assert fleet.effects() == ["slice"]


def test_the_first_of_several_requests_stays(fleet: Fleet) -> None:
    class Popular(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            request(manager, context)
            request(manager, context, by="bob")

    manager = fleet.manager(Popular)
    manager.tick("popular", NOW())
    (row,) = fleet.executions()
    assert (row.state, row.cancelled_by) == ("cancelled", None)


def test_two_users_cancel_a_run_at_the_same_time(fleet: Fleet) -> None:
    class Slow(Cancelled):
        def end(self, context: WorkerContext) -> None:
            context.session.rollback()  # it holds SQLite's write lock no longer
            assert free.wait(PATIENCE)

    free, users = threading.Event(), ("ada", "bob")
    manager, other = fleet.manager(Slow), fleet.manager(Slow)
    manager.start()
    running(fleet, manager, "slow")
    assert at_once(2, lambda number: (manager, other)[number].cancel("slow", by=users[number])) == [True, True]
    free.set()
    wait_until(lambda: fleet.states() == ["cancelled"], "the end of the run")
    assert fleet.executions()[0].cancelled_by in users


@pytest.mark.parametrize("signed_off", [True, False])
def test_the_cancelled_claim_of_a_gone_instance_ends_as_cancelled(fleet: Fleet, signed_off: bool) -> None:
    manager = fleet.manager(Hourly)
    claim = claimed_by_a_ghost(manager)
    assert manager.cancel("hourly", by="ada")
    if signed_off:
        fleet_row = update(tables.instances).where(tables.instances.c.id == "ghost")
        manager.stores.leases.change(fleet_row.values(signed_off_at=tables.instances.c.started_at))
    execution = manager.tick("hourly", NOW() + HOUR / 2)
    assert execution is None  # its tick is decided
    assert fleet.states() == ["cancelled"]
    assert fleet.row("hourly").running is None
    assert fleet.row("hourly").pending_tick is None
    assert claim.token == fleet.executions()[0].token


def claimed_by_a_ghost(manager: BackgroundWorkerManager) -> Claim:
    """Claim the latest tick for an instance that is not alive."""
    state = manager.recovery.look(Hourly)
    claim = manager.stores.ledger.claim("hourly", NOW(), state.schedule_text, ("ghost", "ghost:1"))
    assert isinstance(claim, Claim)
    return claim


def test_a_handed_over_claim_is_not_hit_by_a_late_request(fleet: Fleet) -> None:
    """The request names the claim in force when the user looked."""
    manager = fleet.manager(Hourly)
    old = claimed_by_a_ghost(manager)
    assert manager.stores.ledger.end(old, "handed back", next_attempt=1) == "handed back"
    new = manager.stores.ledger.claim_pending("hourly", NOW(), ("b", "b:1"))
    assert new is not None
    assert not manager.stores.controls.cancel(old, "ada")
    assert manager.stores.ledger.end(new, "failed") == "failed"
    assert [row.cancelled_at for row in fleet.executions()] == [None, None]


def test_a_run_whose_row_was_deleted_by_hand_is_cancelled(fleet: Fleet) -> None:
    manager = fleet.manager(Cancelled)
    manager.start()
    running(fleet, manager, "cancelled")
    with fleet.engine.begin() as connection:
        connection.execute(delete(tables.executions))
    assert manager.cancel("cancelled", by="ada")
    wait_until(lambda: fleet.states() == ["cancelled"], "the end of the run")
    assert fleet.executions()[0].cancelled_by == "ada"
    assert fleet.row("cancelled").pending_tick is None


def test_a_cancelled_execution_without_its_claim_is_not_run_again(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    claimed_by_a_ghost(manager)
    assert manager.cancel("hourly")
    fleet.set("hourly", running=None, claim=None)  # a user ended the claim
    manager.tick("hourly", NOW())
    assert fleet.states() == ["cancelled"]


@on_sqlite
def test_a_run_that_holds_the_write_lock_is_asked_to_stop(fleet: Fleet) -> None:
    class Holding(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            effect(context, "slice")
            context.commit()
            effect(context, "rest")
            assert context.stopping.wait(PATIENCE)
            assert free.wait(PATIENCE)
            context.raise_if_stopping()

    free = threading.Event()
    manager, other = fleet.manager(Holding), fleet.manager(Holding)
    manager.start()
    running(fleet, manager, "holding")
    assert other.cancel("holding", by="ada")
    assert fleet.executions()[0].cancelled_at is None  # the run holds the lock
    free.set()
    wait_until(lambda: fleet.states() == ["cancelled"], "the end of the run")
    assert fleet.executions()[0].cancelled_by == "ada"
    assert fleet.effects() == ["slice"]


# -- the call ---------------------------------------------------------------------------------------


def test_nothing_is_cancelled_if_nothing_runs(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    assert not manager.cancel("hourly")
    with pytest.raises(UnknownWorker):
        manager.cancel("unknown")


@on_sqlite
def test_a_caller_with_open_work_of_its_own_is_refused(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    claimed_by_a_ghost(manager)
    with manager.app.app_context():
        db.session.add(Note(text="open"))
        db.session.flush()
        with pytest.raises(CommitFirst):
            manager.cancel("hourly")


@pytest.mark.parametrize("by", ["Zoë O'Neil", "two\nlines", "x" * 300, "", "\udcff\0"])
def test_any_text_can_be_the_name_of_a_user(fleet: Fleet, by: str) -> None:
    manager = fleet.manager(Cancelled)
    manager.start()
    running(fleet, manager, "cancelled")
    assert manager.cancel("cancelled", by=by)
    wait_until(lambda: fleet.states() == ["cancelled"], "the end of the run")
    shown = fleet.executions()[0].cancelled_by or ""
    assert len(shown) <= 255
    assert shown.isprintable()
    assert bool(shown) == bool(by)


def test_a_receiver_learns_of_a_cancelled_run(fleet: Fleet) -> None:
    manager = fleet.manager(Cancelled)
    heard: list[Any] = []
    hear: Callable[..., None] = lambda app, **details: heard.append(details)  # noqa: E731 - held by this function
    with signals.execution_cancelled.connected_to(hear, sender=manager.app):
        manager.start()
        claim = running(fleet, manager, "cancelled")
        manager.cancel("cancelled")
        wait_until(lambda: heard, "the signal")
    assert heard == [{"claim": claim, "reason": None}]
