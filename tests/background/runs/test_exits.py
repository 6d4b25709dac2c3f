"""Runs that try to end their process. Everything except an exit fails only the run itself."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import event
from sqlalchemy.exc import TimeoutError as PoolTimeout
from support.databases import on_sqlite
from support.fleet import PATIENCE, Fleet, Hourly, db, effect, last_hour, wait_until

from background import WorkerContext


class NoOrdinaryError(BaseException):
    pass


class Unspeakable(Exception):
    """Cannot be pickled, copied, printed or compared."""

    def __init__(self) -> None:
        super().__init__(lambda: None, threading.Lock())

    def __str__(self) -> str:
        raise RuntimeError("not even this")

    __repr__ = __str__

    def __reduce__(self) -> str:
        raise TypeError("cannot be pickled")


def stop_iteration() -> None:
    next(iter(()))


def raises(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


@pytest.mark.promise
@pytest.mark.parametrize(
    "body",
    [
        raises(NoOrdinaryError()),
        raises(GeneratorExit()),
        raises(SystemExit(lambda: None)),
        raises(Unspeakable()),
        raises(ExceptionGroup("two", [ValueError(), Unspeakable()])),
        stop_iteration,
        lambda: (lambda depth: depth(depth))(lambda depth: depth(depth)),
    ],
    ids=["base-exception", "generator-exit", "system-exit", "unspeakable", "group", "stop-iteration", "recursion"],
)
def test_whatever_a_run_raises_it_has_failed_and_the_next_tick_runs(fleet: Fleet, body: Callable[[], None]) -> None:
    class Odd(Hourly):
        period = timedelta(seconds=0.5)
        first = True

        def do_work(self, context: WorkerContext) -> None:
            effect(context)
            if type(self).first:
                type(self).first = False
                body()

    fleet.manager(Odd).start()
    wait_until(lambda: "succeeded" in fleet.states("odd"), "the next run")
    (failed,) = [execution for execution in fleet.executions("odd") if execution.state == "failed"]
    assert failed.reason.startswith(("Traceback (most recent call last):", "  + Exception Group Traceback"))
    assert f"odd:{failed.tick.isoformat()}" not in set(fleet.keys())
    assert set(fleet.states("odd")) <= {"failed", "succeeded", "running", "skipped", "missed"}


def test_a_run_whose_rollback_fails_has_failed_and_does_not_run_for_ever(fleet: Fleet) -> None:
    class Unlucky(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            effect(context)

            @event.listens_for(context.session, "after_rollback")
            def fail(_session: object) -> None:
                raise ZeroDivisionError

            raise ValueError("of its own")

    manager = fleet.manager(Unlucky)
    assert manager.tick("unlucky", last_hour()).state == "failed"
    [execution] = fleet.executions("unlucky")
    assert "ValueError: of its own" in execution.reason
    assert fleet.effects() == []


def test_a_worker_that_cannot_be_pickled_runs(fleet: Fleet) -> None:
    """Check that nothing of the worker is stored or sent. Each process imports its own."""
    lock = threading.Lock()
    closed_over = type(
        "Closure", (Hourly,), {"lock": lock, "do_work": lambda self, context: effect(context, self.lock)}
    )
    closed_over.__qualname__ = "gone.<locals>.Closure"
    fleet.manager(closed_over).start()
    wait_until(lambda: fleet.states("closure") == ["succeeded"], "the run")


def test_a_tick_for_which_no_thread_is_free_is_late_and_not_dropped(fleet: Fleet) -> None:
    go_on, working = threading.Event(), threading.Event()

    class First(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            working.set()
            assert go_on.wait(PATIENCE)
            effect(context, "first")

    class Waiting(Hourly):
        period = timedelta(seconds=1)

        def do_work(self, context: WorkerContext) -> None:
            effect(context, "waiting")

    manager = fleet.manager(First, WORKERS_THREADS=1)
    manager.start()
    assert working.wait(PATIENCE)
    manager.add(Waiting)
    due = datetime.now(UTC)
    wait_until(lambda: datetime.now(UTC) - due > timedelta(seconds=1.2), "a tick")
    assert fleet.states("waiting") == []
    go_on.set()
    wait_until(lambda: "succeeded" in fleet.states("waiting"), "the late tick")
    assert fleet.effects()[:2] == ["first", "waiting"]


@pytest.mark.promise
def test_a_pool_of_connections_that_is_used_up_does_not_starve_the_heartbeat(fleet: Fleet) -> None:
    class Greedy(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            effect(context)
            with pytest.raises(PoolTimeout):
                db.engine.connect()
            began = context.instance.deadline
            wait_until(lambda: context.instance.deadline > began + 2, "more than a lease")

    pool = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1}
    manager = fleet.manager(Greedy, WORKERS_LEASE_SECONDS=1.5, SQLALCHEMY_ENGINE_OPTIONS=pool)
    manager.start()
    wait_until(lambda: fleet.states("greedy") not in ([], ["running"]), "the end")
    assert fleet.states("greedy") == ["succeeded"]
    assert fleet.keys() == [f"greedy:{last_hour().isoformat()}"]


@pytest.mark.promise
@on_sqlite
def test_many_claims_that_wait_for_the_write_lock_of_a_run_do_not_starve_its_heartbeat(fleet: Fleet) -> None:
    working = threading.Event()

    class Holding(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            effect(context)
            working.set()
            began = context.instance.deadline
            wait_until(lambda: context.lost_because or context.instance.deadline > began + 6, "more than a lease")

    manager = fleet.manager(Holding, WORKERS_LEASE_SECONDS=5, WORKERS_THREADS=30)
    manager.start()
    assert working.wait(PATIENCE)
    for number in range(25):
        manager.add(type(f"Waiting{number}", (Hourly,), {}))
    wait_until(lambda: len(fleet.effects()) == 26, "all of them")
    assert fleet.states("holding") == ["succeeded"]
