"""The two base classes of a user's workers, and the checks of their attributes."""

import re
from collections.abc import Awaitable, Sequence
from datetime import timedelta
from typing import ClassVar, Literal

from .context import WorkerContext
from .messages.message import Message


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
    """True: a start runs the latest tick if no instance did. False: it waits for the next one."""
    run_on_first_start: ClassVar[bool] = False
    """True: a worker that is new to the database begins with its latest tick. False: with its next one."""
    max_attempts: ClassVar[int] = 3
    """How often a tick is tried whose instance died, or lost the database; one that was handed back does not count."""
    on_lost: ClassVar[Literal["retry", "skip"]] = "retry"
    """What becomes of a tick whose instance died: "skip" for work that must not be repeated."""
    timeout: ClassVar[timedelta | None] = None
    """After which a run is marked `timed out` and may no longer commit; None: never."""
    jitter: ClassVar[timedelta] = timedelta()
    """Spreads the wake-ups of the instances over this long, at most a period; the ticks stay where they are."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = snake_case(cls.__name__)

    def do_work(self, context: WorkerContext) -> Awaitable[None] | None:
        """Do the work of `context.tick`. What `context.session` holds is committed when this returns."""
        raise NotImplementedError


class MessageWorker:
    """Handles the messages of one `topic`: each once, by whichever instance takes it first.

    Give it `topic`, and write `handle`, or `handle_many` for a batch at once; both may be `async`. What the session
    holds is committed together with the acknowledgement. A batch is committed as one; when any of it fails, all is
    rolled back and handled again one by one, so that one bad message neither blocks nor repeats its neighbours.
    """

    name: ClassVar[str] = ""
    """The worker's name in log and pages; the class name in snake_case if not given."""
    topic: ClassVar[str] = ""
    """One worker handles a topic; all instances share its messages."""
    batch_size: ClassVar[int] = 100
    """How many messages at most are claimed, and committed, at once."""
    max_attempts: ClassVar[int] = 5
    """How often a message is tried before it goes to the dead letters; one that was handed back was not."""
    backoff: ClassVar[timedelta] = timedelta(seconds=1)
    """The pause before the second attempt; doubled with each, up to an hour, and spread by a quarter."""
    concurrency: ClassVar[int] = 1
    """How many batches an instance handles at a time, each on a thread of its own."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = snake_case(cls.__name__)

    def handle(self, message: "Message", context: WorkerContext) -> Awaitable[None] | None:
        """Handle one message; `context.attempt`, `token` and `idempotency_key` are this message's."""
        raise NotImplementedError

    def handle_many(self, messages: "Sequence[Message]", context: WorkerContext) -> Awaitable[None] | None:
        """Handle a batch, in its order; called instead of `handle` where a worker has it."""
        raise NotImplementedError


AnyWorker = type[PeriodicWorker] | type[MessageWorker]


def attempt_after(cls: type[PeriodicWorker], attempt: int) -> int | None:
    """The number of the try that follows one that was lost; None if none follows."""
    return attempt + 1 if cls.on_lost == "retry" and attempt < cls.max_attempts else None


def snake_case(name: str) -> str:
    """Convert PassiveUserCheckerWorker to passive_user_checker_worker, HTTPPing2Worker to http_ping2_worker."""
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
