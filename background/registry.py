"""The workers of one application, and the checks of their attributes."""

import re
from collections.abc import Iterable
from datetime import datetime, timedelta

from .database.clock import LONGEST_BACKOFF
from .declarations import check_constructor, check_method, refuse_misplaced, refuse_misspelled
from .errors import DuplicateWorker, InvalidWorker, UnknownTopic, UnknownWorker
from .ledger.claim import WorkerState
from .schedule.parsing import make_schedule
from .schedule.periods import LONGEST, Schedule
from .settings import address
from .worker import AnyWorker, MessageWorker, PeriodicWorker


class Registry:
    """The registered workers: periodic workers by name, message workers by topic."""

    def __init__(self) -> None:
        self.workers: dict[str, type[PeriodicWorker]] = {}
        self.topics: dict[str, type[MessageWorker]] = {}

    @property
    def names(self) -> set[str]:
        """The names of all workers, periodic workers and message workers."""
        return {*self.workers, *(worker.name for worker in self.topics.values())}

    def topic_of(self, name: str) -> str | None:
        """Return the topic of the message worker `name`. None for any other name."""
        return next((topic for topic, worker in self.topics.items() if worker.name == name), None)

    def add(self, worker: AnyWorker) -> None:
        """Check the class and add it. Raises InvalidWorker, InvalidSchedule or DuplicateWorker."""
        if isinstance(worker, type) and issubclass(worker, MessageWorker):
            topic = declared_topic(worker)
            _refuse_second(worker, "topic", topic, self.topics.get(topic))
            _refuse_second(worker, "name", worker.name, self._named(worker.name))
            self.topics[topic] = worker
        else:
            declared_schedule(worker)
            _refuse_second(worker, "name", worker.name, self._named(worker.name))
            self.workers[worker.name] = worker

    def remove(self, name: str) -> None:
        """Remove the worker. Raises UnknownWorker."""
        if topic := self.topic_of(name):
            del self.topics[topic]
        else:
            self.known(name)
            del self.workers[name]

    def known(self, name: str) -> type[PeriodicWorker]:
        """Return the periodic worker `name`. Raises UnknownWorker."""
        try:
            return self.workers[name]
        except (KeyError, TypeError):
            raise UnknownWorker(name, self.names, self.topic_of(name)) from None

    def refuse_unknown_topic(self, topic: str) -> None:
        """Raise UnknownTopic if no worker handles the topic."""
        if not isinstance(topic, str) or topic not in self.topics:
            raise UnknownTopic(topic, self.topics)

    def _named(self, name: str) -> AnyWorker | None:
        topic = self.topic_of(name)
        return self.topics[topic] if topic else self.workers.get(name)


def _refuse_second(worker: AnyWorker, attribute: str, value: str, first: AnyWorker | None) -> None:
    if first is not None:
        called = "named" if attribute == "name" else f"of the {attribute}"
        raise DuplicateWorker(
            f"There is a worker {called} {value!r} already ({_path(first)}), "
            f"so {_path(worker)} cannot be added: give one of them another `{attribute}`, or add it once."
        )


def _path(worker: AnyWorker) -> str:
    return f"{worker.__module__}.{worker.__qualname__}"


def schedule_in_force(worker: type[PeriodicWorker] | None, state: WorkerState | None) -> Schedule:
    """Return the schedule in the worker's row. Without a row, return the schedule that the class declares.

    The caller passes at least one of both. Raises InvalidSchedule if this release cannot read the schedule in the row,
    as a newer release may have written it.
    """
    if state is not None:
        return state.schedule
    assert worker is not None  # noqa: S101 - the contract of this function
    return checked_schedule(worker)


def checked_schedule(cls: type[PeriodicWorker]) -> Schedule:
    """Return the schedule of a class whose attributes `declared_schedule` has checked, at once."""
    return make_schedule(cls.name, cls.period, cls.cron, cls.timezone)


def declared_schedule(cls: type[PeriodicWorker]) -> Schedule:
    """Check all attributes of the class, and return its schedule. Raises InvalidWorker or InvalidSchedule."""
    if not (isinstance(cls, type) and issubclass(cls, PeriodicWorker)):
        raise InvalidWorker(
            f"{cls!r} is not a worker class; expected a subclass of PeriodicWorker or MessageWorker: "
            "write workers.add(MyWorker), without parentheses behind the class."
        )
    refuse_misspelled(cls, PeriodicWorker)
    refuse_misplaced(cls, PeriodicWorker, _OF_MESSAGES, "period or cron, max_attempts, on_lost, on_failed and timeout")
    _check_class(cls, "do_work(self, context)", cls.do_work is PeriodicWorker.do_work)
    check_method(cls, "do_work", "context")
    schedule = checked_schedule(cls)
    _check_attributes(
        cls,
        ("max_attempts", *_count(cls.max_attempts, MOST_ATTEMPTS)),
        ("on_lost", "'retry' or 'skip'", cls.on_lost in ("retry", "skip")),
        ("on_failed", "'retry' or 'skip'", cls.on_failed in ("retry", "skip")),
        ("backoff", "a timedelta from 0 to 1 hour", _duration(cls.backoff)[1] and cls.backoff <= LONGEST_BACKOFF),
        ("timeout", "a timedelta above 0 and at most 366 days, or None", _is_timeout(cls.timeout)),
        ("jitter", *_duration(cls.jitter)),
        ("enabled", "True or False", isinstance(cls.enabled, bool)),
        ("catch_up", "True or False", isinstance(cls.catch_up, bool)),
        ("run_on_first_start", "True or False", isinstance(cls.run_on_first_start, bool)),
        ("ping_url", "http:// or https:// and a host, '' or None", _is_address(cls.ping_url)),
    )
    has_backoff = cls.backoff != PeriodicWorker.backoff
    _check_attributes(cls, ("backoff", "on_failed = 'retry' beside it", cls.on_failed == "retry" or not has_backoff))
    if cls.period is not None:
        _check_attributes(cls, ("jitter", f"at most its period, {cls.period}", cls.jitter <= cls.period))
    return schedule


def declared_topic(cls: type[MessageWorker]) -> str:
    """Check all attributes of the class, and return its topic. Raises InvalidWorker."""
    refuse_misspelled(cls, MessageWorker)
    handlers = [name for name in ("handle", "handle_many") if getattr(cls, name) is not getattr(MessageWorker, name)]
    _check_class(cls, "either handle(self, message, context) or handle_many(self, messages, context)", not handlers)
    for name in handlers:
        check_method(cls, name, "message" if name == "handle" else "messages", "context")
    if len(handlers) == 2:
        raise InvalidWorker(f"{cls.__name__} has both handle and handle_many; expected one of them: remove the other.")
    refuse_misplaced(cls, MessageWorker, _OF_TICKS, "topic, batch_size, max_attempts, backoff and concurrency")
    _check_attributes(
        cls,
        ("topic", _NAME, _is_name(cls.topic)),
        ("batch_size", *_count(cls.batch_size, MOST_AT_ONCE)),
        ("max_attempts", *_count(cls.max_attempts, MOST_ATTEMPTS)),
        ("backoff", *_duration(cls.backoff)),
        ("concurrency", *_count(cls.concurrency, MOST_CONCURRENCY)),
    )
    return cls.topic


MOST_ATTEMPTS, MOST_AT_ONCE, MOST_CONCURRENCY = 1_000_000, 10_000, 1_000
_OF_TICKS = {
    "period",
    "cron",
    "timeout",
    "on_lost",
    "on_failed",
    "catch_up",
    "run_on_first_start",
    "jitter",
    "enabled",
    "ping_url",
}
_OF_MESSAGES = {"topic", "concurrency", "handle", "handle_many"}
_NAME = "1 to 100 letters, digits, '_', '-' or '.'"


def _check_class(cls: AnyWorker, method: str, is_missing: bool) -> None:
    if is_missing or getattr(cls, "__abstractmethods__", None):
        raise InvalidWorker(f"{cls.__name__} is abstract; expected a class that can run: give it {method}.")
    if not _is_name(cls.name):
        raise InvalidWorker(f"{cls.__name__}.name is {cls.name!r}; expected {_NAME}: rename it.")
    check_constructor(cls)


def _check_attributes(cls: AnyWorker, *checked: tuple[str, str, bool]) -> None:
    for attribute, expected, is_right in checked:
        if not is_right:
            value = getattr(cls, attribute)
            raise InvalidWorker(
                f"Worker {cls.name!r} has {attribute} = {value!r}; expected {expected}: change it in {cls.__name__}."
            )


def begins(workers: Iterable[type[PeriodicWorker]]) -> dict[str, datetime | None]:
    """Return, by name, None for each worker that may begin with a past tick on a new database."""
    return {worker.name: None for worker in workers if worker.run_on_first_start}


def _is_name(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", value) is not None


def _count(value: object, most: int) -> tuple[str, bool]:
    """Return the expectation of a count, and whether `value` meets it."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
    return f"a whole number from 1 to {most}", is_count


def _duration(value: object) -> tuple[str, bool]:
    """Return the expectation of a pause, and whether `value` meets it."""
    return "a timedelta of at least 0", isinstance(value, timedelta) and value >= timedelta()


def _is_address(value: object) -> bool:
    """Return whether `value` is an address to ping, an empty text or None."""
    try:
        return value in (None, "") or address(value) == value
    except ValueError:
        return False


def _is_timeout(value: object) -> bool:
    return value is None or (isinstance(value, timedelta) and timedelta() < value <= LONGEST)
