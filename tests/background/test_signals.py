"""The signals of the engine: one for each event, sent after the event is committed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from blinker import NamedSignal
from flask import Flask, current_app
from sqlalchemy import select
from support.fleet import Fleet, Hourly, Note, db, effect, last_hour, wait_until

from background import Message, MessageWorker, WorkerContext, signals
from background.ledger.leases import Instance
from background.runs.fence import current_run

SIGNALS = (signals.execution_started, *signals.of_state.values(), signals.message_buried)


class Heard:
    """The received signals, by name, and their details."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    @contextmanager
    def listening(self) -> Iterator[None]:
        receivers = {each: self._receiver(each) for each in SIGNALS}
        for each, receiver in receivers.items():
            each.connect(receiver, weak=False)
        try:
            yield
        finally:
            for each, receiver in receivers.items():
                each.disconnect(receiver)

    def _receiver(self, signal: NamedSignal) -> Any:
        def receive(sender: Flask, **details: Any) -> None:
            assert sender is current_app._get_current_object()  # type: ignore[attr-defined]
            assert current_run.get() is None
            self.calls.append((signal.name, details))

        return receive


@pytest.fixture
def heard() -> Iterator[Heard]:
    heard = Heard()
    with heard.listening():
        yield heard


class Failing(Hourly):
    def do_work(self, context: WorkerContext) -> None:
        raise ValueError("out of paper")


class TooSlow(Hourly):
    timeout = timedelta(milliseconds=200)

    def do_work(self, context: WorkerContext) -> None:
        context.stopping.wait(60)
        context.raise_if_stopping()


class Stopped(Hourly):
    def do_work(self, context: WorkerContext) -> None:
        context.stopping.set()
        context.raise_if_stopping()


@pytest.mark.parametrize(
    ("worker", "name", "state"),
    [
        (Hourly, "hourly", "succeeded"),
        (Failing, "failing", "failed"),
        (TooSlow, "too_slow", "timed out"),
        (Stopped, "stopped", "handed back"),
    ],
)
def test_signals_report_the_beginning_and_the_end_of_a_run(
    fleet: Fleet, heard: Heard, worker: type[Hourly], name: str, state: str
) -> None:
    execution = fleet.manager(worker).tick(name, datetime.now(UTC))
    assert execution is not None
    wait_until(lambda: len(heard.names) >= 2, "the telling")  # of a time-out, by the thread that recorded it
    assert heard.names == ["execution started", f"execution {state}"]
    assert [details["claim"] for _, details in heard.calls] == [execution.claim] * 2


def test_a_failure_comes_with_its_error(fleet: Fleet, heard: Heard) -> None:
    fleet.manager(Failing).tick("failing", datetime.now(UTC))
    error = heard.calls[-1][1]["error"]
    assert isinstance(error, ValueError)
    assert error.__traceback__ is not None


@pytest.mark.promise
def test_the_instance_that_finds_an_instance_dead_signals_its_lost_run(fleet: Fleet, heard: Heard) -> None:
    manager = fleet.manager(Hourly)
    ghost = Instance(timedelta(seconds=-1))
    manager.stores.leases.beat(ghost)
    state = manager.recovery.look(Hourly)
    claim = manager.stores.ledger.claim("hourly", last_hour(), state.schedule_text, (ghost.id, ghost.name))
    assert claim is not None
    manager.tick("hourly", datetime.now(UTC))
    assert heard.names == ["execution lost", "execution started", "execution succeeded"]
    assert heard.calls[0][1] == {"claim": claim, "reason": f"{ghost.name} stopped renewing its lease"}


class Broken(MessageWorker):
    topic = "broken"
    max_attempts = 1

    def handle(self, message: Message, context: WorkerContext) -> None:
        raise ValueError("no such parcel")


def test_a_buried_message_is_signalled_with_its_error(fleet: Fleet, heard: Heard) -> None:
    manager = fleet.manager(Broken)
    manager.start()
    [number] = fleet.enqueue("broken", {"parcel": 7})
    wait_until(lambda: heard.calls, "the signal")
    [(name, details)] = heard.calls
    error = details.pop("error")
    assert (name, details) == ("message buried", {"message": number, "topic": "broken"})
    assert error.endswith("ValueError: no such parcel\n")


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
def test_a_receiver_that_fails_harms_neither_the_run_nor_the_other_receivers(
    fleet: Fleet, heard: Heard, caplog: pytest.LogCaptureFixture, kind: type[BaseException]
) -> None:
    def fail(_sender: Flask, **_details: Any) -> None:
        raise kind("the pager is broken")

    with signals.execution_succeeded.connected_to(fail), signals.execution_started.connected_to(fail):
        execution = fleet.manager(Hourly).tick("hourly", datetime.now(UTC))
    assert execution is not None
    assert execution.state == "succeeded"
    assert heard.names == ["execution started", "execution succeeded"]
    assert caplog.text.count(f"{kind.__name__}: the pager is broken") == 2


@pytest.mark.promise
def test_a_receiver_that_lasts_longer_than_the_lease_does_not_lose_its_run(fleet: Fleet) -> None:
    began: list[str] = []

    class Counted(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            began.append(context.idempotency_key)

    def dawdle(_sender: Flask, **_details: Any) -> None:
        threading.Event().wait(2.5)

    with signals.execution_started.connected_to(dawdle):
        fleet.manager(Counted, WORKERS_LEASE_SECONDS=1.5).start()
        wait_until(lambda: fleet.states() == ["succeeded"], "the end of the run")
    assert len(began) == 1


def test_a_receiver_has_a_session_of_its_own_which_no_claim_fences(fleet: Fleet) -> None:
    class Leaving(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            effect(context)
            raise ValueError("and it is rolled back")

    def write_down(_sender: Flask, error: Exception, **_details: Any) -> None:
        db.session.add(Note(text=str(error)))
        db.session.commit()

    with signals.execution_failed.connected_to(write_down):
        fleet.manager(Leaving).tick("leaving", datetime.now(UTC))
    with fleet.engine.connect() as connection:
        assert connection.scalars(select(Note.text)).all() == ["and it is rolled back"]
    assert fleet.effects() == []
