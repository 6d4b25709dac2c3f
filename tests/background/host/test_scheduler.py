"""The scheduler's calls: at their time, each once, and all calls of one moment together."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from background.host.scheduler import Scheduler
from tests.support.processes import PATIENCE

HOUR = timedelta(hours=1)


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    scheduler = Scheduler(threads=3)
    scheduler.start()
    yield scheduler
    scheduler.stop()


class Calls:
    """Notes calls, until there are as many as expected."""

    def __init__(self, expected: int) -> None:
        self.made: list[str] = []
        self._expected, self._all = expected, threading.Event()

    def note(self, what: str) -> None:
        self.made.append(what)
        if len(self.made) == self._expected:
            self._all.set()

    def wait(self) -> list[str]:
        assert self._all.wait(PATIENCE), f"only {self.made}"
        return sorted(self.made)


def test_all_calls_of_one_moment_are_one_job_and_each_is_made_once(scheduler: Scheduler) -> None:
    calls, soon = Calls(4), datetime.now(UTC) + timedelta(seconds=0.5)
    for name in ("a", "b", "c"):
        scheduler.at(soon, name, calls.note, name)
    scheduler.at(soon + timedelta(seconds=0.1), "last", calls.note, "last")
    assert len(scheduler._scheduler.get_jobs()) == 2
    assert calls.wait() == ["a", "b", "c", "last"]
    assert calls.made[-1] == "last"


def test_a_later_call_with_the_same_key_replaces_the_call_alone(scheduler: Scheduler) -> None:
    calls, soon = Calls(2), datetime.now(UTC) + timedelta(seconds=0.5)
    scheduler.at(soon, "a", calls.note, "first")
    scheduler.at(soon, "b", calls.note, "b")
    scheduler.at(soon + timedelta(seconds=0.1), "a", calls.note, "second")
    assert calls.wait() == ["b", "second"]


def test_forgetting_the_last_call_of_a_moment_leaves_no_job(scheduler: Scheduler) -> None:
    later = datetime.now(UTC) + HOUR
    for name in ("a", "b"):
        scheduler.at(later, name, print)
    scheduler.forget("a")
    assert len(scheduler._scheduler.get_jobs()) == 1
    scheduler.at(later + HOUR, "b", print)
    scheduler.forget("b")
    scheduler.forget("b")
    assert not scheduler._scheduler.get_jobs()


def test_an_error_of_one_call_stops_no_other_call_of_its_moment(scheduler: Scheduler) -> None:
    calls, soon = Calls(5), datetime.now(UTC) + timedelta(seconds=0.3)
    for number in range(5):
        scheduler.at(soon, f"fails {number}", lambda: 1 / 0)
        scheduler.at(soon, f"note {number}", calls.note, str(number))
    assert calls.wait() == ["0", "1", "2", "3", "4"]
