"""The two base classes of a user's workers, and the checks of their attributes."""

import random
import re
from collections.abc import Awaitable, Sequence
from datetime import timedelta
from typing import ClassVar, Literal

from .context import WorkerContext
from .database.clock import LONGEST_BACKOFF, SPREAD
from .messages.message import Message


class PeriodicWorker:
    """A job that the fleet runs once per tick.

    Give it `period`, a timedelta: its ticks are the whole multiples since the Unix epoch. Or give it `cron` (five
    fields) with `timezone` (an IANA name, default UTC). Write `do_work`, which may be `async`.
    """

    name: ClassVar[str] = ""
    """The worker's identity in the fleet. Default: the class name in snake_case."""
    period: ClassVar[timedelta | None] = None
    cron: ClassVar[str | None] = None
    timezone: ClassVar[str | None] = None
    enabled: ClassVar[bool] = True
    """False: the worker is registered and shown, but no tick starts it."""
    catch_up: ClassVar[bool] = True
    """True: a start runs the latest tick, if no instance ran it. False: a start waits for the next tick."""
    run_on_first_start: ClassVar[bool] = False
    """True: a worker that is new to the database begins with its latest tick. False: with its next tick."""
    max_attempts: ClassVar[int] = 3
    """The attempts at a tick whose instances die, or lose the database. An attempt that was handed back does not count.

    With `on_failed = "retry"`, also the attempts if runs fail.
    """
    on_lost: ClassVar[Literal["retry", "skip"]] = "retry"
    """If an instance dies, "retry" runs its tick again. "skip" is for work that must not be repeated."""
    on_failed: ClassVar[Literal["retry", "skip"]] = "skip"
    """If a run fails, "skip" waits for the next tick. "retry" runs the tick again until the next tick is due."""
    backoff: ClassVar[timedelta] = timedelta(minutes=1)
    """The pause after the first failure. Each attempt doubles it, up to an hour. It is spread by a quarter."""
    timeout: ClassVar[timedelta | None] = None
    """A run that takes longer is marked `timed out`, and may no longer commit. None: no limit."""
    jitter: ClassVar[timedelta] = timedelta()
    """Spreads the wake-ups of the instances over this time, at most a period. The ticks do not move."""
    ping_url: ClassVar[str | None] = None
    """The dead-man's switch that gets pings of each run. None: the setting PING_URL decides. "": no pings."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = snake_case(cls.__name__)

    def do_work(self, context: WorkerContext) -> Awaitable[None] | None:
        """Do the work of `context.tick`. The engine commits `context.session` when this returns."""
        raise NotImplementedError


class MessageWorker:
    """Handles the messages of one `topic`. The instance that claims a message first handles it, once.

    Give it `topic`, and write `handle`, or `handle_many` for a whole batch. Both may be `async`. One transaction has
    the session's effects and the acknowledgement of the batch. If a message fails, the engine rolls the batch back and
    handles its messages one by one. So one bad message neither blocks nor repeats the good messages. A handler that
    raises `Bury("why")` has its message buried without another attempt. A handler that raises `Later(5)` gets its
    message again in 5 minutes, and this attempt does not count.
    """

    name: ClassVar[str] = ""
    """The worker's name in log and pages. Default: the class name in snake_case."""
    topic: ClassVar[str] = ""
    """The topic. One worker handles a topic, and all instances share its messages."""
    batch_size: ClassVar[int] = 100
    """The most messages that one claim takes, and one transaction commits."""
    max_attempts: ClassVar[int] = 5
    """The attempts before a message goes to the dead letters. An attempt that was handed back does not count."""
    backoff: ClassVar[timedelta] = timedelta(seconds=1)
    """The pause before the second attempt. Each attempt doubles it, up to an hour. It is spread by a quarter."""
    concurrency: ClassVar[int] = 1
    """The batches that an instance handles at a time, each on a thread of its own."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = snake_case(cls.__name__)

    def handle(self, message: "Message", context: WorkerContext) -> Awaitable[None] | None:
        """Handle one message. `context.attempt`, `token` and `idempotency_key` belong to this message."""
        raise NotImplementedError

    def handle_many(self, messages: "Sequence[Message]", context: WorkerContext) -> Awaitable[None] | None:
        """Handle a batch, in its order. A worker that has this method does not need `handle`."""
        raise NotImplementedError


AnyWorker = type[PeriodicWorker] | type[MessageWorker]


def attempt_after(cls: type[PeriodicWorker], attempt: int, has_failed: bool = False) -> int | None:
    """Return the number of the attempt that follows a lost (or failed) `attempt`. None if no attempt follows."""
    wanted = cls.on_failed if has_failed else cls.on_lost
    return attempt + 1 if wanted == "retry" and attempt < cls.max_attempts else None


def pause_after(cls: AnyWorker, attempt: int) -> timedelta:
    """Return the pause after a failed `attempt`: it doubles, and is spread so that work does not come back together."""
    seconds = min(cls.backoff.total_seconds() * 2.0 ** min(attempt - 1, 100), LONGEST_BACKOFF.total_seconds())
    return timedelta(seconds=seconds * random.uniform(1 - SPREAD, 1 + SPREAD))  # noqa: S311 - no secret


def snake_case(name: str) -> str:
    """Convert PassiveUserCheckerWorker to passive_user_checker_worker, HTTPPing2Worker to http_ping2_worker."""
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
