"""What a user subclasses."""

import re
from collections.abc import Awaitable
from datetime import timedelta
from typing import ClassVar, Literal

from .context import WorkerContext
from .errors import InvalidWorker
from .schedule import Schedule, make_schedule


class PeriodicWorker:
    """A job that the fleet runs once per tick.

    Give it `period` (a timedelta; its ticks are the whole multiples since the Unix epoch) or `cron` (five
    fields) with `timezone` (an IANA name, default UTC), and write `do_work`, which may be `async`.
    """

    name: ClassVar[str] = ""
    """The worker's identity in the fleet; the class name in snake_case if not given."""
    period: ClassVar[timedelta | None] = None
    cron: ClassVar[str | None] = None
    timezone: ClassVar[str | None] = None
    enabled: ClassVar[bool] = True
    """False: registered and shown, but never started by a tick."""
    catch_up: ClassVar[bool] = True
    """Whether a start runs the latest tick, if nobody did; False waits for the next one."""
    max_attempts: ClassVar[int] = 3
    """How often a tick is tried whose instance died, or lost the database; one that was handed back does not count."""
    on_lost: ClassVar[Literal["retry", "skip"]] = "retry"
    """What becomes of a tick whose instance died: "skip" for work that must not be repeated."""
    timeout: ClassVar[timedelta | None] = None
    """After which a run is marked `timed out` and may no longer commit; None: never."""
    jitter: ClassVar[timedelta] = timedelta()
    """Spreads the wake-ups of the instances over this long; the ticks stay where they are."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = _snake_case(cls.__name__)

    def do_work(self, context: WorkerContext) -> Awaitable[None] | None:
        """Do the work of `context.tick`. What `context.session` holds is committed when this returns."""
        raise NotImplementedError


def declared_schedule(cls: type[PeriodicWorker]) -> Schedule:
    """The schedule that the class declares, after checking everything else it declares; one sentence if wrong."""
    if not (isinstance(cls, type) and issubclass(cls, PeriodicWorker)):
        raise InvalidWorker(
            f"{cls!r} is not a worker class; expected a subclass of PeriodicWorker: write workers.add(MyWorker), "
            "without parentheses behind the class."
        )
    if cls.do_work is PeriodicWorker.do_work or getattr(cls, "__abstractmethods__", None):
        raise InvalidWorker(
            f"{cls.__name__} is abstract; expected a class that can run: give it do_work(self, context)."
        )
    if not isinstance(cls.name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", cls.name):
        raise InvalidWorker(
            f"{cls.__name__}.name is {cls.name!r}; expected 1 to 100 letters, digits, '_', '-' or '.': rename it."
        )
    schedule = make_schedule(cls.name, cls.period, cls.cron, cls.timezone)
    for attribute, expected, is_right in (
        ("max_attempts", "a whole number of at least 1", _is_count(cls.max_attempts)),
        ("on_lost", "'retry' or 'skip'", cls.on_lost in ("retry", "skip")),
        (
            "timeout",
            "a timedelta above 0, or None",
            cls.timeout is None or _is_duration(cls.timeout, least=1),
        ),
        ("jitter", "a timedelta of at least 0", _is_duration(cls.jitter, least=0)),
        ("enabled", "True or False", isinstance(cls.enabled, bool)),
        ("catch_up", "True or False", isinstance(cls.catch_up, bool)),
    ):
        if not is_right:
            value = getattr(cls, attribute)
            raise InvalidWorker(
                f"Worker {cls.name!r} has {attribute} = {value!r}; expected {expected}: change it in {cls.__name__}."
            )
    return schedule


def attempt_after(cls: type[PeriodicWorker], attempt: int) -> int | None:
    """The number of the try that follows one that was lost; None if none follows."""
    return attempt + 1 if cls.on_lost == "retry" and attempt < cls.max_attempts else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_duration(value: object, least: int) -> bool:
    return isinstance(value, timedelta) and value >= timedelta(microseconds=least)


def _snake_case(name: str) -> str:
    """PassiveUserCheckerWorker -> passive_user_checker_worker, HTTPPing2Worker -> http_ping2_worker."""
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
