"""Handlers that misbehave. The other messages of their batch are handled exactly once all the same."""

import asyncio
import logging
import os
import resource
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from datetime import timedelta
from itertools import pairwise
from typing import Any, ClassVar

import pytest
from flask import current_app, g
from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError, OperationalError
from support.databases import on_postgresql, on_sqlite
from support.fleet import HOUR, PATIENCE, Fleet, Hourly, db, effect, start_and_look, states, wait_until

from background import (
    BackgroundWorkerManager,
    Bury,
    InvalidMessage,
    Later,
    Message,
    MessageWorker,
    WorkerContext,
    current_workers,
)
from background.database import tables
from background.database.clock import now
from background.database.dialects.write_lock import waiting
from background.ledger.leases import Instance

MINUTE = 60


class Notes(MessageWorker):
    """Leaves one effect per message."""

    topic = "notes"
    max_attempts = 2
    backoff = timedelta(milliseconds=20)

    def handle(self, message: Message, context: WorkerContext) -> Any:
        effect(context, message.payload)


def is_over(fleet: Fleet) -> bool:
    return not {"waiting", "running"} & set(states(fleet))


# -- raising ---------------------------------------------------------------------------------------


class Unspeakable(Exception):
    """An error whose text cannot be read, and that cannot be pickled."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __reduce__(self) -> Any:
        raise TypeError("no pickle")


RAISED: dict[str, BaseException] = {
    "SystemExit: 3": SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt(),
    "GeneratorExit": GeneratorExit(),
    "CancelledError": asyncio.CancelledError(),
    "StopIteration: 7": StopIteration(7),
    "MemoryError": MemoryError(),
    "Unspeakable: <exception str() failed>": Unspeakable(lambda: None),
    r"ValueError: \x00 and \udc80": ValueError("\0 and \udc80"),
    "ExceptionGroup: several (2 sub-exceptions)": ExceptionGroup("several", [ValueError(1), KeyError(2)]),
    "RecursionError: " + "x" * 1_900: RecursionError("x" * 1_900 + "y" * 100_000),  # the rest is cut
}


@pytest.mark.parametrize(
    ("database_url", "is_async"), [("sqlite", True), ("postgresql", False)], indirect=["database_url"]
)
def test_whatever_a_handler_raises_buries_its_own_message_only(
    fleet: Fleet, is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "background.raising")  # pytest-xdist cannot pass half a character on

    class Raising(Notes):
        def handle(self, message: Message, context: WorkerContext) -> Any:
            effect(context, message.payload[:90])
            return self._later(message) if is_async else self._now(message)

        def _now(self, message: Message) -> None:
            if message.payload in RAISED:
                raise RAISED[message.payload]

        async def _later(self, message: Message) -> None:
            await asyncio.sleep(0)
            self._now(message)

    raised = {name: error for name, error in RAISED.items() if not (is_async and name.startswith("StopIteration"))}
    fleet.manager(Raising)
    payloads = [each for name in raised for each in (name, f"after {name[:80]}")]
    fleet.enqueue("notes", *payloads)
    fleet.apps[-1].extensions["background_workers"].start()
    wait_until(lambda: is_over(fleet), "the end")
    assert fleet.effects() == [f"after {name[:80]}" for name in raised]
    rows = fleet.messages()
    assert states(fleet) == ["dead", "done"] * len(raised)
    errors = [(row.message, row.attempt) for row in fleet.errors()]
    assert sorted(errors) == [(row.id, attempt) for row in rows[::2] for attempt in (1, 2)]
    for row in fleet.errors():
        [name] = [name for name, message in zip(raised, rows[::2], strict=True) if message.id == row.message]
        assert name in row.error
    fleet.enqueue("notes", "the next")
    wait_until(lambda: is_over(fleet), "the next")
    assert fleet.effects()[-1] == "the next"


def test_if_a_whole_batch_fails_its_good_messages_are_handled_one_by_one(fleet: Fleet) -> None:
    class Many(MessageWorker):
        topic = "notes"
        batch_size, max_attempts, backoff = 10, 2, timedelta()
        sizes: list[int] = []

        def handle_many(self, messages: Sequence[Message], context: WorkerContext) -> None:
            self.sizes.append(len(messages))
            for message in messages:
                effect(context, message.payload)
            if any(message.payload in (3, 17) for message in messages):
                raise ValueError("3 and 17 are bad")

    manager = fleet.manager(Many)
    fleet.enqueue("notes", *range(30))
    manager.start()
    wait_until(lambda: is_over(fleet), "the end")
    assert fleet.effects() == [str(each) for each in range(30) if each not in (3, 17)]
    assert {row.attempt for row in fleet.messages() if row.state == "done"} == {1}
    assert [row.attempt for row in fleet.errors()] == [1, 2] * 2
    assert sorted(Many.sizes) == [1] * 22 + [10] * 3


def test_with_one_attempt_the_first_failure_buries_a_message(fleet: Fleet) -> None:
    class Once(Notes):
        max_attempts = 1

        def handle(self, message: Message, context: WorkerContext) -> None:
            effect(context, message.payload)
            assert message.payload != "bad"

    manager = fleet.manager(Once)
    fleet.enqueue("notes", "one", "bad", "three", delay=0)
    manager.start()
    wait_until(lambda: is_over(fleet), "the end")
    assert states(fleet) == ["done", "dead", "done"]
    assert fleet.effects() == ["one", "three"]
    assert [row.attempt for row in fleet.errors()] == [1]


@pytest.mark.parametrize("size", [1, 100])
def test_a_handler_buries_its_message_for_a_reason_without_another_attempt(
    fleet: Fleet, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    class Burying(Notes):
        batch_size, max_attempts = size, 5

        def handle(self, message: Message, context: WorkerContext) -> None:
            effect(context, message.payload)
            if message.payload == "bad":
                raise Bury("there is no such book\n(a second line)") from LookupError("book 17")

    manager = fleet.manager(Burying)
    fleet.enqueue("notes", "one", "bad", "three")
    manager.start()
    wait_until(lambda: is_over(fleet), "the end")
    assert states(fleet) == ["done", "dead", "done"]
    assert fleet.effects() == ["one", "three"]
    assert [(row.attempt, row.error) for row in fleet.errors()] == [(1, "there is no such book")]
    line = f"Buried the message notes:{fleet.messages()[1].id}: there is no such book"
    wait_until(lambda: line in caplog.messages, "the line about the burial")  # the log says so after the commit
    assert [record.levelname for record in caplog.records if record.getMessage() == line] == ["WARNING"]
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("is_async", [False, True])
def test_a_batch_handler_that_buries_is_called_again_for_each_message(fleet: Fleet, is_async: bool) -> None:
    class Burying(MessageWorker):
        topic = "notes"
        backoff = timedelta()

        def handle_many(self, messages: Sequence[Message], context: WorkerContext) -> Any:
            return self._later(messages, context) if is_async else self._now(messages, context)

        async def _later(self, messages: Sequence[Message], context: WorkerContext) -> None:
            self._now(messages, context)

        def _now(self, messages: Sequence[Message], context: WorkerContext) -> None:
            for message in messages:
                effect(context, message.payload)
            if bad := {message.payload for message in messages} & {3, 17}:
                raise Bury(bad)

    manager = fleet.manager(Burying)
    fleet.enqueue("notes", *range(30))
    manager.start()
    wait_until(lambda: is_over(fleet), "the end")
    assert fleet.effects() == [str(each) for each in range(30) if each not in (3, 17)]
    assert [(row.attempt, row.error) for row in fleet.errors()] == [(1, "{3}"), (1, "{17}")]


def test_a_buried_message_can_be_retried(fleet: Fleet) -> None:
    class Burying(Notes):
        is_mended = False

        def handle(self, message: Message, context: WorkerContext) -> None:
            if not Burying.is_mended:
                raise Bury("")
            effect(context, message.payload)

    manager = fleet.manager(Burying)
    [number] = fleet.enqueue("notes", "one")
    manager.start()
    wait_until(lambda: states(fleet) == ["dead"], "the burial")
    assert [row.error for row in fleet.errors()] == ["Bury"]
    Burying.is_mended = True
    manager.messages.retry([number])
    wait_until(lambda: states(fleet) == ["done"], "the retry")
    assert fleet.effects() == ["one"]


@pytest.mark.parametrize("size", [1, 100])
def test_a_handler_gets_its_message_again_later_and_no_attempt_counts(
    fleet: Fleet, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    caplog.set_level(logging.INFO, "background")

    class Postponing(Notes):
        batch_size, max_attempts = size, 2
        heard: ClassVar[list[int]] = []

        def handle(self, message: Message, context: WorkerContext) -> None:
            effect(context, message.payload)
            if message.payload == "early" and len(self.heard) < 3:
                self.heard.append(context.attempt)
                raise Later(timedelta(milliseconds=30), "the bank is closed\n(a second line)") from LookupError("bank")

    manager = fleet.manager(Postponing)
    fleet.enqueue("notes", "one", "early", "three")
    manager.start()
    wait_until(lambda: is_over(fleet), "the end")
    assert states(fleet) == ["done"] * 3
    assert sorted(fleet.effects()) == ["early", "one", "three"]
    assert Postponing.heard[-1] == 1
    early, failures = manager.messages.letter(fleet.messages()[1].id)
    assert (early.attempt, failures) == (1, [])
    assert early.postponed in (2, 3)  # a batch calls the handler once more
    assert early.postponed_because == "the bank is closed"
    line = f"Postponed the message notes:{early.id} by 0:00:00.030000: the bank is closed"
    assert [record.levelname for record in caplog.records if record.getMessage() == line] == ["INFO"] * early.postponed
    assert "Traceback" not in caplog.text


def test_a_batch_handler_that_postpones_is_called_again_for_each_message(fleet: Fleet) -> None:
    class Postponing(MessageWorker):
        topic = "notes"

        def handle_many(self, messages: Sequence[Message], context: WorkerContext) -> None:
            for message in messages:
                effect(context, message.payload)
            if {message.payload for message in messages} & {3, 17}:
                raise Later(5)

    manager = fleet.manager(Postponing)
    fleet.enqueue("notes", *range(30))
    manager.start()
    wait_until(lambda: states(fleet).count("done") == 28, "the other messages")
    wait_until(lambda: "running" not in states(fleet), "the end of the batch")
    assert fleet.effects() == [str(each) for each in range(30) if each not in (3, 17)]
    letters = manager.messages.letters("notes", "waiting")
    assert [(each.value, each.attempt, each.postponed, each.postponed_because) for each in letters] == [
        (17, 0, 1, None),
        (3, 0, 1, None),
    ]
    minutes = [(each.due_at - each.claimed_at) / timedelta(minutes=1) for each in letters if each.claimed_at]
    assert minutes == pytest.approx([5, 5], abs=0.5)
    [notes] = manager.messages.figures()
    assert (notes.postponed, notes.retrying, notes.delayed) == (2, 0, 2)


def test_a_message_that_another_instance_took_over_is_not_postponed(fleet: Fleet) -> None:
    queue = fleet.manager(Notes).stores.queue
    fleet.enqueue("notes", "one")
    ours = queue.claim("notes", "notes", 1, ("us", "here:1"))
    assert ours
    queue.take_back("us", {"notes": 5}, error=None)
    theirs = queue.claim("notes", "notes", 1, ("them", "there:1"))
    assert theirs
    assert queue.postpone(ours, ours.ids, timedelta(minutes=5), "early") == 0
    [row] = fleet.messages()
    assert (row.state, row.batch, row.attempt, row.postponed) == ("running", theirs.id, 1, None)


@pytest.mark.parametrize("minutes", [0, -1, timedelta(), None, "5", float("nan"), True, timedelta(days=40_000)])
def test_a_delay_that_is_no_delay_is_refused(minutes: Any) -> None:
    with pytest.raises(InvalidMessage, match="expected a"):
        Later(minutes)


# -- the handler's session -----------------------------------------------------------------


def close_it(context: WorkerContext) -> None:
    effect(context, "closed away")
    context.session.close()


def roll_back_at_the_end(context: WorkerContext) -> None:
    effect(context, "daring")
    context.session.rollback()


def commit_and_fail(context: WorkerContext) -> None:
    context.commit()
    if context.attempt == 1:
        raise ValueError("after its commit")


def commit_twice(context: WorkerContext) -> None:
    context.commit()
    context.session.commit()


def open_a_context(context: WorkerContext) -> None:
    with current_app.app_context():  # type: ignore[attr-defined]
        db.session.commit()


def leave_a_savepoint_open(context: WorkerContext) -> None:
    context.session.begin_nested()


def roll_a_savepoint_back(context: WorkerContext) -> None:
    savepoint = context.session.begin_nested()
    effect(context, "in the savepoint")
    savepoint.rollback()


def swallow_a_failed_flush(context: WorkerContext) -> None:
    from support.fleet import effects

    for _ in range(2):
        with suppress(IntegrityError):
            context.session.execute(insert(effects).values(key="", note="twice", unique=1))


def swallow_it_and_roll_back(context: WorkerContext) -> None:
    swallow_a_failed_flush(context)
    context.session.rollback()


def cut_its_connection(context: WorkerContext) -> None:
    if context.attempt == 1:
        context.session.connection().connection.driver_connection.close()  # type: ignore[union-attr]


def give_its_connection_up(context: WorkerContext) -> None:
    if context.attempt == 1:
        context.session.connection().invalidate()


def enqueue_and_roll_back(context: WorkerContext) -> None:
    current_workers.enqueue("notes", "never there")
    context.session.rollback()


DEEDS = [
    close_it,
    roll_back_at_the_end,
    commit_and_fail,
    commit_twice,
    open_a_context,
    leave_a_savepoint_open,
    roll_a_savepoint_back,
    swallow_a_failed_flush,
    swallow_it_and_roll_back,
    cut_its_connection,
    give_its_connection_up,
    enqueue_and_roll_back,
]


@pytest.mark.promise
@pytest.mark.parametrize("deed", DEEDS)
def test_whatever_a_handler_does_to_its_session_its_neighbours_are_handled_once(
    fleet: Fleet, deed: Callable[[WorkerContext], None]
) -> None:
    class Daring(Notes):
        def handle(self, message: Message, context: WorkerContext) -> None:
            if message.payload == "daring":
                deed(context)
            else:
                effect(context, message.payload)

    manager = fleet.manager(Daring, WORKERS_LEASE_SECONDS=10)
    fleet.enqueue("notes", "daring", "one", "two", "daring", "daring", "three", "daring")
    manager.start()
    wait_until(lambda: is_over(fleet), "the end")
    neighbours = [note for note in fleet.effects() if note in ("one", "two", "three")]
    assert neighbours == ["one", "two", "three"]
    assert not {"in the savepoint", "closed away", "never there", "daring"} & set(fleet.effects())
    rows = {row.id: row for row in fleet.messages()}
    assert {row.state for row in rows.values() if row.payload != '"daring"'} == {"done"}
    assert not [row for row in fleet.errors() if rows[row.message].payload != '"daring"']
    assert len(rows) == 7


@pytest.mark.promise
@on_postgresql
def test_effects_in_a_handlers_own_context_are_committed_separately_and_its_neighbours_once(fleet: Fleet) -> None:
    class Apart(Notes):
        def handle(self, message: Message, context: WorkerContext) -> None:
            if message.payload == "apart":
                with current_app.app_context():  # type: ignore[attr-defined]
                    effect(context, "in its own")
                    db.session.commit()
            effect(context, message.payload)

    manager = fleet.manager(Apart)
    fleet.enqueue("notes", "one", "apart", "two")
    manager.start()
    wait_until(lambda: is_over(fleet), "the end")
    assert [note for note in fleet.effects() if note != "in its own"] == ["one", "apart", "two"]
    assert states(fleet) == ["done"] * 3


# -- enqueueing in a handler -------------------------------------------------------------------------


@pytest.mark.promise
def test_messages_that_a_handler_enqueues_exist_once_its_message_is_done_and_never_twice(fleet: Fleet) -> None:
    class Chain(Notes):
        """Each message enqueues the next message. Every third fails at its first attempt, after the enqueue."""

        def handle(self, message: Message, context: WorkerContext) -> None:
            effect(context, message.payload)
            chain, number = message.payload
            if number < 9:
                current_workers.enqueue("notes", [chain, number + 1])
            if number % 3 == 0 and message.attempt == 1:
                raise ValueError("after it enqueued the next")

    manager = fleet.manager(Chain)
    fleet.enqueue("notes", *([chain, 0] for chain in range(5)))
    manager.start()
    wait_until(lambda: len(states(fleet)) == 50 and is_over(fleet), "the chains' ends")
    assert sorted(fleet.effects()) == sorted(str([chain, number]) for chain in range(5) for number in range(10))
    assert states(fleet) == ["done"] * 50


def test_messages_that_a_periodic_worker_enqueues_are_fenced_with_its_run(fleet: Fleet) -> None:
    began, go_on = threading.Event(), threading.Event()

    class Sender(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            current_workers.enqueue("notes", context.token)
            context.session.flush()
            if context.token == 1:
                context.session.rollback()  # so that other processes can write on SQLite
                began.set()
                assert go_on.wait(PATIENCE)
                current_workers.enqueue("notes", "the zombie's")

    manager = fleet.manager(Sender, Notes)
    manager.start()
    assert began.wait(PATIENCE)
    fleet.take_over("sender")
    go_on.set()
    wait_until(lambda: not manager.runs._contexts, "the end of the run")
    assert fleet.messages() == []


# -- taken over ------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [["one", "two", "three"], ["two"]])
def test_a_batch_that_lost_a_message_commits_nothing_and_every_message_is_handled_once(
    fleet: Fleet, caplog: pytest.LogCaptureFixture, taken: list[str]
) -> None:
    """Have a living instance, which trusts its claim, lose a message in the database only."""
    began, go_on = threading.Event(), threading.Event()

    class Slow(Notes):
        def handle(self, message: Message, context: WorkerContext) -> None:
            if message.attempt == 1:
                began.set()
                assert go_on.wait(PATIENCE)
            effect(context, message.payload)

    manager = fleet.manager(Slow)
    fleet.enqueue("notes", "one", "two", "three")
    manager.start()
    assert began.wait(PATIENCE)
    theirs = tables.messages.c.payload.in_([f'"{each}"' for each in taken])
    with fleet.engine.begin() as connection:  # without a row the instance counts as dead
        connection.execute(update(tables.messages).where(theirs).values(batch="other", instance="other"))
    go_on.set()
    wait_until(lambda: is_over(fleet), "the end")
    assert f"no longer holds {len(taken)} of its 3 messages" in caplog.text
    assert sorted(fleet.effects()) == ["one", "three", "two"]
    assert [row.attempt for row in fleet.messages()] == [2, 2, 2]
    reasons = {row.error for row in fleet.errors()}
    assert "its instance is not known to the fleet: its row was deleted" in reasons


# -- the handler's batches ------------------------------------------------------------------------------


def test_a_big_payload_and_any_character_arrive_unchanged(fleet: Fleet) -> None:
    given: list[Any] = []

    class Reader(Notes):
        def handle(self, message: Message, context: WorkerContext) -> None:
            given.append(message.payload)
            effect(context)

    payloads = [
        "x" * 250 * 1024,
        {"ü" * 1000: ["\0", "\x1f", "\u2028", "\U0001f4da", "%s :x $1 ?", "'\"\\"]},
        "",
        {},
        0,
    ]
    manager = fleet.manager(Reader)
    with fleet.apps[-1].app_context():
        manager.enqueue_many("notes", payloads)
        for payload in payloads:
            manager.enqueue("notes", payload)
        db.session.commit()
    manager.start()
    wait_until(lambda: is_over(fleet), "the end")
    assert given == payloads * 2


def test_an_instance_handles_as_many_batches_at_a_time_as_its_concurrency(fleet: Fleet) -> None:
    together = threading.Barrier(4)

    class Four(Notes):
        batch_size, concurrency = 1, 4

        def handle(self, message: Message, context: WorkerContext) -> None:
            together.wait(PATIENCE)
            effect(context, message.payload)

    manager = fleet.manager(Four)
    fleet.enqueue("notes", *range(12))
    manager.start()
    wait_until(lambda: is_over(fleet), "the end")
    assert sorted(map(int, fleet.effects())) == list(range(12))
    assert fleet.errors() == []


def test_an_added_worker_handles_waiting_messages_and_a_removed_worker_handles_no_more(
    fleet: Fleet,
) -> None:
    removed = threading.Event()

    class Removing(Notes):
        batch_size = 1

        def handle(self, message: Message, context: WorkerContext) -> None:
            effect(context, f"{message.payload}, removing")
            if message.payload == 2:
                manager.remove("removing")
                removed.set()

    fleet.manager(Notes)
    fleet.enqueue("notes", *range(6))
    manager = fleet.manager()
    manager.start()
    wait_until(lambda: manager.presence.instance, "the start")
    manager.add(Removing)
    assert removed.wait(PATIENCE)
    wait_until(lambda: len(fleet.effects()) == 3, "the third")
    manager.add(Notes)
    wait_until(lambda: is_over(fleet), "the end")
    assert fleet.effects() == ["0, removing", "1, removing", "2, removing", "3", "4", "5"]


@pytest.mark.promise
@on_sqlite
@pytest.mark.parametrize(
    ("is_awaited", "seconds"), [pytest.param(True, 0.09, id="awaited"), pytest.param(False, 0.001, id="not awaited")]
)
def test_a_backlog_frees_the_write_lock_after_each_batch_and_longer_while_a_connection_waits(
    fleet: Fleet, is_awaited: bool, seconds: float
) -> None:
    class Holding(Notes):
        batch_size = 1

        def handle(self, message: Message, context: WorkerContext) -> None:
            effect(context, message.payload)
            time.sleep(0.1)

    manager = fleet.manager(Holding)
    fleet.enqueue("notes", *range(4))
    with waiting(os.path.dirname(fleet.engine.url.database)) if is_awaited else nullcontext():
        manager.start()
        wait_until(lambda: is_over(fleet), "the end")
    rests = [following.claimed_at - one.finished_at for one, following in pairwise(fleet.messages())]
    assert min(rests) >= timedelta(seconds=seconds)


@pytest.mark.promise
def test_endless_messages_starve_neither_ticks_nor_other_topics_on_one_thread(fleet: Fleet) -> None:
    handled: list[Any] = []
    is_enough = threading.Event()

    class Endless(MessageWorker):
        topic = "endless"
        batch_size = 1

        def handle(self, message: Message, context: WorkerContext) -> None:
            handled.append(message.payload)
            if not is_enough.is_set():
                current_workers.enqueue("endless", message.payload)

    manager = fleet.manager(Endless, Notes, Hourly, WORKERS_THREADS=1)
    for number in range(3):
        fleet.enqueue("endless", number)
    manager.start()
    try:
        wait_until(lambda: len(handled) > 10, "the first of many")
        fleet.enqueue("notes", "a note")
        wait_until(lambda: set(fleet.effects()) == {"", "a note"}, "the tick and the note")
    finally:
        is_enough.set()
    assert len(handled) > 10


def test_an_error_at_the_end_of_the_context_costs_no_neighbour_an_attempt(fleet: Fleet) -> None:
    class Failing(Notes):
        def handle(self, message: Message, context: WorkerContext) -> None:
            g.ends_badly = True
            effect(context, message.payload)
            if message.payload == 1:
                raise ValueError("its own error")

    manager = fleet.manager(Failing, WORKERS_LEASE_SECONDS=20)

    @manager.app.teardown_appcontext
    def end(_error: BaseException | None) -> None:
        if g.get("ends_badly"):
            raise OSError("the end of the context")

    fleet.enqueue("notes", 0, 1, 2)
    manager.start()
    wait_until(lambda: is_over(fleet), "the end")
    assert fleet.effects() == ["0", "2"]
    assert [(row.state, row.attempt) for row in fleet.messages()] == [("done", 1), ("dead", 2), ("done", 1)]
    assert all("its own error" in row.error for row in fleet.errors())


# -- claims without a handler --------------------------------------------------------------------


@pytest.mark.promise
def test_a_claim_whose_reply_was_lost_is_handled_once_after_a_lease(fleet: Fleet) -> None:
    fleet.manager(Notes)
    fleet.enqueue("notes", "lost on its way")
    manager = fleet.manager()
    manager.start()
    wait_until(lambda: manager.presence.instance, "the start")
    instance = manager.presence.instance
    assert manager.stores.queue.claim("notes", "notes", 1, (instance.id, instance.name))
    manager.add(Notes)
    wait_until(lambda: is_over(fleet), "the end")
    assert fleet.effects() == ["lost on its way"]
    assert [(row.state, row.attempt) for row in fleet.messages()] == [("done", 2)]


@pytest.mark.promise
@on_sqlite
def test_an_instance_that_waited_for_the_write_lock_does_not_recover_a_batch_that_outlives_the_lease(
    fleet: Fleet,
) -> None:
    """Have a heartbeat look while each batch is handled. The second batch was claimed in between."""

    class Slow(Notes):
        batch_size = 1

        def handle(self, message: Message, context: WorkerContext) -> None:
            effect(context, message.payload)
            time.sleep(message.payload)
            if message.payload > 1:
                context.commit()
                time.sleep(0.3)  # the waiting process tries the lock ten times a second
                effect(context, "the rest")

    manager = fleet.manager(Slow, WORKERS_LEASE_SECONDS=1.5)
    fleet.enqueue("notes", 0.6, 2.2)
    manager.start()
    wait_until(lambda: is_over(fleet), "the end")
    assert fleet.effects() == ["0.6", "2.2", "the rest"]
    assert [row.attempt for row in fleet.messages()] == [1, 1]


@pytest.mark.promise
def test_messages_of_a_gone_instance_with_a_topic_unknown_to_this_release_cause_no_further_reads(
    fleet: Fleet,
) -> None:
    class Former(Notes):
        topic = "former"

    former = fleet.manager(Former)
    fleet.enqueue("former", 1)
    gone = former.presence.sign_on()
    assert former.stores.queue.claim("former", "former", 1, (gone.id, gone.name))
    former.presence.sign_off(gone)
    manager = fleet.manager(Notes)
    manager.start()
    wait_until(lambda: manager.presence.instance, "the start")
    manager.supervisor.message_recovery.look()
    assert not manager.supervisor.message_recovery._freeing
    assert states(fleet) == ["running"]


Quiet = Callable[..., BackgroundWorkerManager]


@pytest.fixture
def quiet(fleet: Fleet) -> Quiet:
    """Start an instance that has looked for messages, and has no heartbeat to come."""

    def start(*workers: type[MessageWorker]) -> BackgroundWorkerManager:
        manager = fleet.manager(*workers, WORKERS_HEARTBEAT_SECONDS=MINUTE, WORKERS_LEASE_SECONDS=5 * MINUTE)
        start_and_look(manager)
        wait_until(lambda: not manager.supervisor.consumers._active["notes"], "the looks")
        return manager

    return start


class OnlyOnce(Notes):
    max_attempts = 1


def test_a_lease_that_ends_just_after_an_outage_counts_no_attempt(fleet: Fleet, quiet: Quiet) -> None:
    peer = Instance(HOUR)
    manager = fleet.manager(OnlyOnce)
    manager.stores.leases.renew(peer)
    fleet.enqueue("notes", "a")
    assert manager.stores.queue.claim("only_once", "notes", 1, (peer.id, peer.name))
    supervisor = quiet(OnlyOnce).supervisor
    supervisor._beat_failed(OperationalError("SELECT 1", {}, Exception("server closed the connection unexpectedly")))
    supervisor._beat()
    ended = update(tables.instances).where(tables.instances.c.id == peer.id).values(expires_at=now())
    manager.stores.leases.change(ended)
    supervisor.message_recovery.look()
    wait_until(lambda: is_over(fleet), "the message's end")
    assert [(row.state, row.attempt) for row in fleet.messages()] == [("done", 1)]


# -- waking up -------------------------------------------------------------------------------------


def test_a_message_for_tomorrow_does_not_delay_a_message_for_now(fleet: Fleet, quiet: Quiet) -> None:
    manager = quiet(Notes)
    with manager.app.app_context():
        manager.enqueue("notes", "now")
        manager.enqueue("notes", "tomorrow", delay=timedelta(days=1))
        db.session.commit()
    wait_until(lambda: fleet.effects() == ["now"], "the handling")


@pytest.mark.promise
@on_sqlite
def test_a_consumer_that_found_nothing_waits_a_little_and_looks_once_for_several_notifications(
    fleet: Fleet, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("background.process.consumers._YIELDED_SECONDS", (10 * MINUTE, 10 * MINUTE))
    manager = quiet(Notes)
    monkeypatch.setattr(manager.supervisor.listener, "_due", lambda topics: [])  # no other notification may come
    consumers, scheduler = manager.supervisor.consumers, manager.supervisor.scheduler
    wait_until(lambda: "notes" in consumers._yielding, "a look that finds nothing")
    for _ in range(3):
        consumers.hear("notes")
    assert [key for _, calls in scheduler._moments.values() for key in calls].count("heard:notes") == 1
    with manager.app.app_context():
        manager.enqueue("notes", "its own")
        db.session.commit()
    wait_until(lambda: "notes" not in consumers._yielding, "the handling")
    scheduler.forget("heard:notes")
    with manager.app.app_context():
        monkeypatch.setattr(consumers, "wake_after", lambda topic, pause: None)  # as if another process had enqueued it
        manager.enqueue("notes", "another's")
        db.session.commit()
    consumers.hear("notes")
    wait_until(lambda: fleet.effects() == ["its own", "another's"], "the handling at once")


@pytest.mark.promise
def test_many_delayed_messages_set_no_timers_in_this_process(fleet: Fleet, quiet: Quiet) -> None:
    manager = quiet(Notes)
    scheduler = manager.supervisor.scheduler
    before = len(scheduler._planned)
    with manager.app.app_context():
        for number in range(100):
            manager.enqueue("notes", number, delay=HOUR + timedelta(minutes=number))
        db.session.commit()
    wait_until(lambda: len(scheduler._planned) <= before, "at most a look at them")


@pytest.mark.promise
@on_sqlite
def test_later_delayed_messages_do_not_hold_up_a_delayed_message(fleet: Fleet, quiet: Quiet) -> None:
    manager = quiet(Notes)

    def is_one_handled_after_another_was_enqueued() -> bool:
        with manager.app.app_context():
            manager.enqueue("notes", "again", delay=1)
            db.session.commit()
        return bool(fleet.effects())

    wait_until(is_one_handled_after_another_was_enqueued, "the first")


@pytest.mark.promise
def test_a_message_due_a_little_earlier_does_not_take_the_timer_of_another_message(fleet: Fleet, quiet: Quiet) -> None:
    manager = quiet(Notes)
    with manager.app.app_context():
        for delay in (0.549, 0.46):
            manager.enqueue("notes", delay, delay=delay)
        db.session.commit()
    wait_until(lambda: is_over(fleet), "the handling of both")


@pytest.mark.promise
def test_a_rolled_back_savepoint_holds_up_no_earlier_message(fleet: Fleet, quiet: Quiet) -> None:
    manager = quiet(Notes)
    with manager.app.app_context():
        manager.enqueue("notes", "kept")
        savepoint = db.session.begin_nested()
        manager.enqueue("notes", "rolled back")
        savepoint.rollback()
        db.session.commit()
    wait_until(lambda: fleet.effects() == ["kept"], "the handling")


@pytest.mark.promise
def test_a_worker_that_is_added_after_the_start_is_notified_of_messages_too(fleet: Fleet, quiet: Quiet) -> None:
    manager = quiet()
    manager.add(Notes)
    with manager.app.app_context():
        manager.enqueue("notes", "own")
        db.session.commit()
    wait_until(lambda: fleet.effects() == ["own"], "the handling")


@pytest.mark.promise
@on_postgresql
def test_a_worker_that_is_added_after_the_start_is_notified_of_other_processes_messages(
    fleet: Fleet, quiet: Quiet
) -> None:
    manager = quiet()
    manager.add(Notes)
    fleet.manager(Notes)
    for number in range(3):
        fleet.enqueue("notes", number)
        wait_until(lambda: is_over(fleet), "the handling")


@pytest.mark.promise
@on_postgresql
def test_a_process_with_many_open_files_is_notified_of_other_processes_messages(
    fleet: Fleet, quiet: Quiet, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "background.database.notifications")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4_096, hard), hard))
    with ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1_100):
            opened.enter_context(open(os.devnull))
        manager = quiet(Notes)
        fleet.manager(Notes)
        fleet.enqueue("notes", "heard")
        wait_until(lambda: is_over(fleet), "the handling")
        manager.stop()
    assert "Cannot listen" not in caplog.text


@pytest.mark.promise
@on_postgresql
def test_a_process_signs_off_even_if_its_listener_is_notified_during_the_stop(fleet: Fleet, quiet: Quiet) -> None:
    manager = quiet(Notes)
    listener = manager.supervisor.listener
    listener._stopped.set()
    fleet.manager(Notes)
    fleet.enqueue("notes", "heard")
    listener._thread.join(PATIENCE)
    manager.stop()
    with fleet.engine.connect() as connection:
        assert connection.scalars(select(tables.instances.c.signed_off_at)).one() is not None
