"""What a run is given; and the fence: no commit of a run passes once its claim is gone."""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import TypeVar

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import Session, SessionTransaction

from ..context import WorkerContext
from ..database.outages import is_cut_off
from ..errors import BatchRolledBack, ClaimLost, RunStopped, first_line
from ..host.forks import ended_in_a_fork
from ..host.logs import logger_of
from ..ledger.leases import Instance
from ..messages.message import Batch, Freed, Message
from ..messages.queue import Queue
from ..signals import message_buried, send
from ..worker import MessageWorker
from .execution import finish, insist
from .failures import in_short, told
from .running import Runs

T = TypeVar("T")


class MessageContext(WorkerContext):
    """The run of a batch of messages, or of one of it."""

    def __init__(
        self, batch: Batch, these: Sequence[Message], messages: Queue, instance: Instance, db: SQLAlchemy
    ) -> None:
        super().__init__(batch, these[0], instance, db, messages.sessions)
        self.claim: Batch = batch
        self._messages = messages
        self._open = [message.id for message in these]
        self._handled: list[int] = []
        self._transaction: SessionTransaction | None = None

    def begin(self, message: Message) -> None:
        """From here on this run is that of `message`; raises ClaimLost where its lease is over."""
        self.refuse_if_lost()
        self.tick, self.attempt, self.token = message.tick, message.attempt, message.token
        self.idempotency_key = message.idempotency_key
        self.log_fields |= {"tick": message.tick.isoformat(), "execution": message.idempotency_key}

    def handled(self, *messages: Message) -> None:
        """The next commit acknowledges them, together with what the session holds."""
        self.session.flush()  # `book.stock = Book.stock + 1` by the next one would replace this one's
        self._refuse_if_rolled_back()
        self._handled += [message.id for message in messages]
        self._transaction = self._transaction or self.session.get_transaction()

    def finish(self) -> None:
        self.session.flush()
        self.check(self.session)
        self._finishing = True
        self.session.commit()

    def check(self, session: Session) -> None:
        self.refuse_if_lost()
        if self._finishing:
            return
        session.flush()
        done = self._handled if session is self.session else []
        if done:
            self._refuse_if_rolled_back()
        try:
            self._messages.acknowledge(self.claim, done, self._open, self.within(session))
        except ClaimLost:
            self.lose("somebody else has it")
            raise
        self._open = [each for each in self._open if each not in done]
        if done:
            self._handled, self._transaction = [], None

    def _refuse_if_rolled_back(self) -> None:
        """What one message of a batch rolls back is the work of those before it, too."""
        if self._transaction is not None and self.session.get_transaction() is not self._transaction:
            raise BatchRolledBack(
                f"Worker {self.worker!r} rolled back what it had done for other messages of the batch; they are "
                "handled again one by one. Let the exception pass, or set batch_size = 1."
            )

    def _what(self) -> str:
        return f"{len(self._open)} messages" if len(self._open) > 1 else f"the message {self.idempotency_key}"


_LONGEST_PAUSE_SECONDS = 3600.0
_MOST_EXCUSED = 5
_UNWRITTEN = "The error could not be written: see the log of the instance."


class BatchRun:
    """One batch of one instance, and what becomes of its messages."""

    def __init__(
        self,
        worker: type[MessageWorker],
        batch: Batch,
        messages: Queue,
        runs: Runs,
        instance: Instance,
        app: Flask,
        db: SQLAlchemy,
        excused: Counter[int],
    ) -> None:
        self._worker, self._batch, self._messages, self._runs = worker, batch, messages, runs
        self._instance, self._app, self._db, self._excused = instance, app, db, excused
        self._log = logger_of(f"background.{worker.name}")

    def run(self) -> timedelta | None:
        """Handle the batch; return the pause after which one of its messages is due again, if any is."""
        began, number = time.monotonic(), len(self._batch.messages)
        error = self._handled(self._batch.messages)
        pause = self._after(error) if error else None
        if error is None:
            for each in self._excused.keys() & self._batch.ids:
                del self._excused[each]
            what = f"{number} messages" if number > 1 else f"the message {self._batch.messages[0].idempotency_key}"
            self._log.info("Handled %s in %.3f s", what, time.monotonic() - began)
        if self._runs.stopping.is_set():
            self._write("goes back", partial(self._messages.hand_back, self._batch, self._batch.ids))
        return pause

    def _after(self, error: BaseException) -> timedelta | None:
        """What follows where the batch as one failed with `error`."""
        if isinstance(error, ClaimLost):
            self._log.warning("Lost %d messages: %s", len(self._batch.messages), first_line(error))
            return None
        left = self._write("is left", partial(self._messages.left, self._batch)) or []
        if not left:  # the reply to its commit got lost, or others have them
            self._log.warning("The messages are done, or not this instance's any more: %s", first_line(error))
            return None
        if (pause := self._excuse(left, error)) is not None:
            return pause
        if len(self._batch.messages) == 1:
            return self._settle(left[0], error)
        if not isinstance(error, RunStopped):
            self._log.info("Handling %d messages one by one, after they failed as one: %s", len(left), in_short(error))
        return min(filter(None, map(self._alone, left)), default=None)

    def _excuse(self, left: Sequence[Message], error: BaseException) -> timedelta | None:
        """Hand `left` back if the database failed them. Return the pause before another instance may claim them.

        This does not count as an attempt. A message is excused a few times only: its handler may itself refuse to
        write.
        """
        times = max(self._excused[message.id] for message in left)
        if times >= _MOST_EXCUSED or not is_cut_off(error):
            return None
        self._excused.update(message.id for message in left)
        pause = _pause(self._worker, times) if times else timedelta()  # perhaps only a pooled connection was old
        ids = [message.id for message in left]
        self._log.warning("Handed %d messages back: the database connection broke: %s", len(ids), in_short(error))
        self._write("goes back", partial(self._messages.hand_back, self._batch, ids, pause))
        return pause

    def _alone(self, message: Message) -> timedelta | None:
        if self._runs.stopping.is_set() or not self._instance.is_alive:
            return None
        error = self._handled([message])
        return self._settle(message, error) if error else None

    def _handled(self, messages: Sequence[Message]) -> BaseException | None:
        """Run the handler, and commit its effects with the acknowledgement; what went wrong, if anything did."""
        try:
            with ended_in_a_fork(f"The run of {self._worker.__name__}"), self._app.app_context():
                context = MessageContext(self._batch, messages, self._messages, self._instance, self._db)
                with self._runs.entered(context):
                    self._run(messages, context)
        except BaseException as error:  # also of what the application does at the end of a context
            return error
        return None

    def _run(self, messages: Sequence[Message], context: MessageContext) -> None:
        try:
            with ended_in_a_fork(f"The batch of {self._worker.__name__}"):
                self._call(messages, context)
                context.finish()
        except BaseException as error:
            self._runs.roll_back(error)
            raise

    def _call(self, messages: Sequence[Message], context: MessageContext) -> None:
        worker = self._worker()
        if self._worker.handle_many is not MessageWorker.handle_many:
            context.begin(messages[0])
            with ended_in_a_fork(f"{self._worker.__name__}.handle_many"):
                finish(worker.handle_many(messages, context))
            context.handled(*messages)
            return
        for message in messages:
            if context.stopping:
                break  # what was handled is committed, the rest handed back
            context.begin(message)
            with ended_in_a_fork(f"{self._worker.__name__}.handle"):
                finish(worker.handle(message, context))
            context.handled(message)

    def _settle(self, message: Message, error: BaseException) -> timedelta | None:
        """Write down that `message` failed; return the pause before its next attempt, if there is one."""
        key, worker = message.idempotency_key, self._worker
        if isinstance(error, RunStopped) and self._runs.stopping.is_set():
            return None  # it is handed back with the rest
        if isinstance(error, ClaimLost):
            self._log.warning("Lost the message %s: %s", key, first_line(error))
            return None
        if (excused := self._excuse([message], error)) is not None:
            return excused
        pause = _pause(worker, message.attempt)
        text = told(error)
        fail = partial(self._messages.fail, self._batch, [message.id])
        write = partial(fail, text, worker.max_attempts, pause)
        freed = self._write("failed", write, partial(fail, _UNWRITTEN, worker.max_attempts, pause))
        if freed and freed[0].state == "dead":
            self._log.error("Buried the message %s, attempt %d failed", key, message.attempt, exc_info=error)
            tell_of_the_dead(self._app, freed, text)
        elif freed:
            said = (key, message.attempt, pause.total_seconds(), in_short(error))
            self._log.warning("The message %s failed, attempt %d; another in %.1f s: %s", *said)
            return pause
        return None

    def _write(self, what: str, *ways: Callable[[], T]) -> T | None:
        return insist(self._instance, f"what of {self._batch.worker} {what}", *ways)


def tell_of_the_dead(app: Flask, freed: Iterable[Freed], error: str) -> None:
    """Tell the application of those that were buried."""
    for each in freed:
        if each.state == "dead":
            send(app, message_buried, message=each.id, topic=each.topic, error=error)


def _pause(worker: type[MessageWorker], attempt: int) -> timedelta:
    """Doubled with each attempt, and spread, so that what failed together does not come back together."""
    seconds = min(worker.backoff.total_seconds() * 2.0 ** min(attempt - 1, 100), _LONGEST_PAUSE_SECONDS)
    return timedelta(seconds=seconds * random.uniform(0.75, 1.25))  # noqa: S311 - no secret
