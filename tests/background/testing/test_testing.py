"""The helpers that `background.testing` gives to the tests of an application's own workers."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from flask import Flask
from sqlalchemy import select
from support.databases import close, on_sqlite
from support.fleet import Hourly, db, effect, effects, last_hour, make_app

from background import (
    InvalidCursor,
    InvalidWorker,
    MessageWorker,
    RunStopped,
    UnknownTopic,
    WorkerContext,
    current_workers,
)
from background.testing import (
    Clock,
    TickNotRun,
    assert_enqueued,
    assert_not_enqueued,
    drain,
    run_worker,
    running,
    worker_context,
)
from background.testing import messages as testing_messages

IN_2030 = datetime(2030, 5, 1, 12, 30, tzinfo=UTC)


class Failing(Hourly):
    def do_work(self, context: WorkerContext) -> None:
        effect(context)
        raise LookupError("no such book")


class Stopping(Hourly):
    def do_work(self, context: WorkerContext) -> None:
        context.stopping.set()
        context.raise_if_stopping()


class NoteWorker(MessageWorker):
    topic = "notes"
    max_attempts = 2
    backoff = timedelta(minutes=1)

    def handle(self, message, context: WorkerContext) -> None:  # type: ignore[no-untyped-def]
        if message.payload == "bad":
            raise LookupError("a bad note")
        effect(context, message.payload)
        if message.payload == "first":
            current_workers.enqueue("notes", "second")


def notes(app: Flask) -> list[str]:
    with app.app_context():
        return list(db.session.scalars(select(effects.c.note).order_by(effects.c.id)))


def enqueue(app: Flask, *payloads: object, delay: timedelta | None = None) -> None:
    with app.app_context():
        current_workers.enqueue_many("notes", payloads, delay=delay)
        db.session.commit()


# -- one tick --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [IN_2030, datetime(1999, 12, 31, 23, 59, tzinfo=UTC)])
def test_a_tick_of_any_year_is_run(app: Flask, at: datetime) -> None:
    execution = run_worker(app, Hourly, at=at)
    assert (execution.state, execution.claim.tick) == ("succeeded", at.replace(minute=0))
    assert notes(app) == [""]


def test_without_a_moment_the_latest_tick_is_run(app: Flask) -> None:
    assert run_worker(app, Hourly).claim.tick == last_hour()


def test_a_worker_fails_in_the_test_with_its_own_error(app: Flask) -> None:
    with pytest.raises(LookupError, match="no such book"):
        run_worker(app, Failing)
    assert notes(app) == []


def test_a_run_that_stops_is_handed_back(app: Flask) -> None:
    assert run_worker(app, Stopping).state == "handed back"


class Counting(Hourly):
    def do_work(self, context: WorkerContext) -> None:
        for number in range(context.cursor or 0, 4):
            effect(context, number)
            context.cursor = number + 1


def test_a_run_begins_with_the_cursor_that_the_test_gives(app: Flask) -> None:
    run_worker(app, Counting, at=IN_2030, cursor=2)
    assert notes(app) == ["2", "3"]
    run_worker(app, Counting, at=IN_2030 + timedelta(hours=5), cursor=3)
    assert notes(app) == ["2", "3", "3"]
    with pytest.raises(InvalidCursor, match="cursor is of type set, which JSON cannot carry"):
        run_worker(app, Counting, at=IN_2030 + timedelta(hours=9), cursor={1})


def test_work_alone_begins_with_a_cursor_and_shows_the_next(app: Flask) -> None:
    with app.app_context():
        context = worker_context(cursor=3)
        Counting().do_work(context)
        assert context.cursor == 4
        assert worker_context().cursor is None


def test_a_tick_that_does_not_run_raises_an_error_with_the_reason(app: Flask) -> None:
    run_worker(app, Hourly, at=IN_2030)
    with pytest.raises(TickNotRun, match=r"Hourly did not run\. .*2030-05-01.*succeeded"):
        run_worker(app, Hourly, at=IN_2030)
    app.extensions["background_workers"].pause("hourly")
    with pytest.raises(TickNotRun, match="paused"):
        run_worker(app, Hourly, at=IN_2030 + timedelta(hours=1))


def test_a_disabled_worker_says_so(app: Flask) -> None:
    class Disabled(Hourly):
        enabled = False

    with pytest.raises(TickNotRun, match=r"Disabled did not run: it is disabled \(enabled = False\)"):
        run_worker(app, Disabled)


@on_sqlite
def test_an_application_without_workers_is_refused(database_url: str) -> None:
    with pytest.raises(RuntimeError, match=r"'plain' has no background workers; expected BackgroundWorkerManager"):
        run_worker(Flask("plain"), Hourly)


# -- the clock -------------------------------------------------------------------------------------


def test_a_clock_moves_only_when_it_is_moved(app: Flask) -> None:
    manager = app.extensions["background_workers"]
    with Clock(IN_2030) as clock:
        assert manager.history.clock() == IN_2030
        clock.move(timedelta(days=1))
        assert manager.history.clock() == IN_2030 + timedelta(days=1)
        assert run_worker(app, Hourly).claim.tick == datetime(2030, 5, 2, 12, tzinfo=UTC)
        clock.set(IN_2030 + timedelta(days=7))
        assert run_worker(app, Hourly).claim.tick == datetime(2030, 5, 8, 12, tzinfo=UTC)
    assert manager.history.clock() < IN_2030


def test_the_inner_of_two_clocks_counts(app: Flask) -> None:
    manager = app.extensions["background_workers"]
    with Clock():
        with Clock(IN_2030):
            assert manager.history.clock() == IN_2030
        assert manager.history.clock() < IN_2030


@pytest.mark.parametrize("at", [datetime(2030, 5, 1), "2030-05-01", IN_2030.date()])  # noqa: DTZ001
def test_a_clock_refuses_a_moment_without_a_zone(at: object) -> None:
    with pytest.raises(ValueError, match="expected an aware datetime"):
        Clock(at)  # type: ignore[arg-type]


@pytest.mark.parametrize("at", [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)])
def test_a_clock_refuses_an_end_of_the_calendar(at: datetime) -> None:
    with pytest.raises(ValueError, match="expected a year from 2 to 9998"):
        Clock(at)


def test_other_threads_read_the_database_while_clocks_begin_and_end(app: Flask) -> None:
    manager, ended = app.extensions["background_workers"], threading.Event()

    def read() -> int:
        number = 0
        while not ended.is_set():
            assert manager.history.clock() <= IN_2030
            number += 1
        return number

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        for _ in range(3_000):
            with Clock(IN_2030):
                pass
        ended.set()
        assert all(reader.result() > 0 for reader in readers)


def test_a_clock_is_moved_by_a_timedelta_only() -> None:
    with pytest.raises(TypeError, match=r"moved by 5; expected a timedelta: write timedelta\(hours=1\)"):
        Clock().move(5)  # type: ignore[arg-type]


@on_sqlite
def test_a_name_instead_of_a_worker_is_refused_in_one_sentence(app: Flask) -> None:
    with pytest.raises(InvalidWorker, match="'hourly' is not a worker class; expected a subclass of PeriodicWorker"):
        run_worker(app, "hourly")  # type: ignore[arg-type]


# -- messages --------------------------------------------------------------------------------------


@pytest.fixture
def noting(database_url: str) -> Iterator[Flask]:
    app = make_app(database_url, NoteWorker)
    yield app
    close(app)


def test_messages_are_handled_together_with_messages_that_their_handlers_enqueue(noting: Flask) -> None:
    enqueue(noting, "first", "third")
    drained = drain(noting)
    assert (drained.done, drained.waiting, drained.dead, drained.errors) == (3, 0, 0, ())
    assert sorted(notes(noting)) == ["first", "second", "third"]


def test_a_message_that_fails_waits_and_dies_as_the_clock_moves(noting: Flask) -> None:
    with Clock() as clock:
        enqueue(noting, "bad", "good")
        drained = drain(noting, "notes")
        assert (drained.done, drained.waiting, drained.dead) == (1, 1, 0)
        assert [error.splitlines()[-1] for error in drained.errors] == ["LookupError: a bad note"]
        assert drain(noting).waiting == 0  # it is not due
        clock.move(timedelta(minutes=2))
        assert drain(noting).dead == 1


class EndlessWorker(MessageWorker):
    topic = "endless"

    def handle(self, message, context: WorkerContext) -> None:  # type: ignore[no-untyped-def]
        current_workers.enqueue("endless", message.payload + 1)


def test_a_handler_that_enqueues_without_end_is_an_error(noting: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing_messages, "_MOST_MORE", 20)
    noting.extensions["background_workers"].add(EndlessWorker)
    with noting.app_context():
        current_workers.enqueue_many("endless", [0] * 30)
        db.session.commit()
    with pytest.raises(RuntimeError, match=r"has handled \d+ messages, although 30 waited .* enqueues another message"):
        drain(noting)


def test_a_waiting_message_is_found_by_its_payload(noting: Flask) -> None:
    enqueue(noting, {"book": 1}, delay=timedelta(hours=1))
    assert_enqueued(noting, "notes")
    assert_enqueued(noting, "notes", {"book": 1})
    assert_not_enqueued(noting, "notes", {"book": 2})
    with pytest.raises(
        AssertionError, match=r"No message waits in 'notes' with the payload \{'book': 2\}.*\{'book': 1\}"
    ):
        assert_enqueued(noting, "notes", {"book": 2})
    with pytest.raises(AssertionError, match=r"expected none with any payload: \{'book': 1\}"):
        assert_not_enqueued(noting, "notes")


def test_an_uncommitted_message_does_not_count_as_enqueued(noting: Flask) -> None:
    with noting.app_context():
        current_workers.enqueue("notes", "perhaps")
        db.session.rollback()
    assert_not_enqueued(noting, "notes")
    with pytest.raises(AssertionError, match="Waiting there: no message"):
        assert_enqueued(noting, "notes", "perhaps")


def test_an_unknown_topic_is_refused(noting: Flask) -> None:
    for call in (drain, assert_enqueued, assert_not_enqueued):
        with pytest.raises(UnknownTopic, match="Did you mean 'notes'"):
            call(noting, "note")


# -- a context, and a running instance -------------------------------------------------------------


def test_a_unit_test_calls_do_work_with_a_context_of_its_own(app: Flask) -> None:
    with app.app_context():
        context = worker_context("hourly", tick=IN_2030)
        Hourly().do_work(context)
        assert context.idempotency_key == "hourly:2030-05-01T12:30:00+00:00"
        context.session.rollback()
        Hourly().do_work(context)
        context.progress(1, 2)
        context.commit()
        context.stopping.set()
        with pytest.raises(RunStopped):
            context.raise_if_stopping()
    assert notes(app) == [""]


@on_sqlite
def test_a_context_outside_an_application_is_refused(database_url: str) -> None:
    with pytest.raises(RuntimeError, match=r"outside an app context; expected one.*with app\.app_context\(\)"):
        worker_context()


def test_an_instance_runs_for_the_length_of_a_block(app: Flask) -> None:
    manager = app.extensions["background_workers"]
    manager.add(Hourly)
    with running(app) as started:
        assert started is manager
        assert [each.is_alive for each in manager.instance_history.seen()] == [True]
    assert [each.is_alive for each in manager.instance_history.seen()] == [False]


def test_a_clock_that_is_entered_again_leaves_the_clock_between_in_force(app: Flask) -> None:
    manager = app.extensions["background_workers"]
    outer, inner = Clock(IN_2030), Clock(IN_2030 + timedelta(days=1))
    with outer, inner:
        with outer:
            pass
        assert manager.history.clock() == inner.now
