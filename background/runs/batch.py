"""The run of a batch of messages: its context, its handler, and the outcome of each message."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import Session, SessionTransaction

from ..context import WorkerContext
from ..database.outages import is_cut_off
from ..errors import BatchRolledBack, Bury, ClaimLost, InvalidCursor, RunStopped, first_line
from ..host.forks import ended_in_a_fork
from ..host.logs import logger_of
from ..ledger.leases import Instance
from ..messages.later import Later
from ..messages.message import Batch, Freed, Message
from ..messages.queue import Queue
from ..signals import message_buried, send
from ..worker import MessageWorker, pause_after
from .execution import await_result, write_with_retries
from .failures import summary, traceback_of
from .running import Runs
from .unsent import Unsent

T = TypeVar("T")


class MessageContext(WorkerContext):
    """The context of a batch of messages, or of a single message of it."""

    def __init__(
        self, batch: Batch, these: Sequence[Message], messages: Queue, instance: Instance, db: SQLAlchemy
    ) -> None:
        super().__init__(batch, these[0], instance, db, messages.sessions)
        self.claim: Batch = batch
        self._messages = messages
        self._open = dict.fromkeys(message.id for message in these)
        self._handled: list[int] = []
        self._transaction: SessionTransaction | None = None
        self._unsent = Unsent(self.session)

    def begin(self, message: Message) -> None:
        """Make `message` the current message of this run. Raises ClaimLost if the lease is over."""
        self.refuse_if_lost()
        self.tick, self.attempt, self.token = message.due_at, message.attempt, message.token
        self.idempotency_key = self.log_fields.execution = message.idempotency_key
        self.log_fields.tick = message.due_at

    def handled(self, *messages: Message) -> None:
        """Let the next commit acknowledge `messages`, together with the session's effects."""
        session = self.session
        if session is not self._unsent.session:  # a handler removed the session
            self._unsent = Unsent(session)
        if len(messages) < len(self._open):
            self._unsent.end_message()
        else:
            session.flush()  # all messages at once, or a single message
        self._refuse_if_rolled_back(session)
        self._handled += [message.id for message in messages if message.id in self._open]
        self._transaction = self._transaction or session.get_transaction()

    def finish(self) -> None:
        session = self.session
        self.check(session)
        self._finishing = True
        session.commit()

    def _check_claim(self, session: Session) -> None:
        done = self._handled if session is self.session else []
        if done:
            self._refuse_if_rolled_back(session)
        self._messages.acknowledge(self.claim, done, self._open, self.within(session))
        for each in done:
            del self._open[each]
        if done:
            self._handled, self._transaction = [], None

    def _refuse_if_rolled_back(self, session: Session) -> None:
        """Raise BatchRolledBack if a handler rolled back the work of the earlier messages, too."""
        if self._transaction is not None and session.get_transaction() is not self._transaction:
            raise BatchRolledBack(
                f"Worker {self.worker!r} rolled back its work for other messages of the batch; the engine "
                "handles them again one by one. Let the exception pass, or set batch_size = 1."
            )

    @property
    def cursor(self) -> Any:
        raise self._without_cursor()

    @cursor.setter
    def cursor(self, value: Any) -> None:
        raise self._without_cursor()

    def _without_cursor(self) -> InvalidCursor:
        return InvalidCursor(
            f"Worker {self.worker!r} used context.cursor for {self._work()}; expected it in a PeriodicWorker only. A "
            "message is handled in one transaction: enqueue one message for each slice of long work."
        )

    def _work(self) -> str:
        return f"{len(self._open)} messages" if len(self._open) > 1 else f"the message {self.idempotency_key}"


_MOST_EXCUSED = 5
_UNWRITTEN = "The error could not be written: see the log of the instance."


class BatchRun:
    """One batch of one instance, from the handler to the outcome of each message."""

    def __init__(
        self,
        worker: type[MessageWorker],
        batch: Batch,
        messages: Queue,
        runs: Runs,
        instance: Instance,
        excused: Counter[int],
    ) -> None:
        self._worker, self._batch, self._messages, self._runs = worker, batch, messages, runs
        self._instance, self._excused = instance, excused
        self._log = logger_of(f"background.{worker.name}")

    def run(self) -> timedelta | None:
        """Handle the batch. Return the pause until a message of it is due again, or None."""
        began, number = time.monotonic(), len(self._batch.messages)
        error = self._handle(self._batch.messages)
        pause = self._after_failure(error) if error else None
        if error is None:
            for each in self._excused.keys() & self._batch.ids:
                del self._excused[each]
            work = f"{number} messages" if number > 1 else f"the message {self._batch.messages[0].idempotency_key}"
            self._log.info("Handled %s in %.3f s", work, time.monotonic() - began)
        if self._runs.stopping.is_set():
            self._write("go back", partial(self._messages.hand_back, self._batch, self._batch.ids))
        return pause

    def _after_failure(self, error: BaseException) -> timedelta | None:
        """Decide about each message after the whole batch failed with `error`. Return the pause, as `run`."""
        if isinstance(error, ClaimLost):
            self._log.warning("Lost %d messages: %s", len(self._batch.messages), first_line(error))
            return None
        left = self._write("are left", partial(self._messages.left, self._batch)) or []
        if not left:  # the reply to the commit was lost, or another instance has the messages
            self._log.warning("The messages are done, or another instance took them over: %s", first_line(error))
            return None
        if (pause := self._excuse(left, error)) is not None:
            return pause
        if len(self._batch.messages) == 1:
            return self._write_failure(left[0], error)
        if not isinstance(error, RunStopped):
            self._log.info("Handling %d messages one by one, after they failed as one: %s", len(left), summary(error))
        return min(filter(None, map(self._handle_alone, left)), default=None)

    def _excuse(self, left: Sequence[Message], error: BaseException) -> timedelta | None:
        """Hand the messages `left` back if the database failed. Return the pause before an instance may claim them.

        This does not count as an attempt. A message is excused only a few times: its handler may cause the error.
        """
        times = max(self._excused[message.id] for message in left)
        if isinstance(error, Bury | Later) or times >= _MOST_EXCUSED or not is_cut_off(error):
            return None
        self._excused.update(message.id for message in left)
        # No pause at first: perhaps only a pooled connection was stale.
        pause = pause_after(self._worker, times) if times else timedelta()
        ids = [message.id for message in left]
        self._log.warning("Handed %d messages back: the database connection broke: %s", len(ids), summary(error))
        self._write("go back", partial(self._messages.hand_back, self._batch, ids, pause))
        return pause

    def _handle_alone(self, message: Message) -> timedelta | None:
        if self._runs.stopping.is_set() or not self._instance.is_alive:
            return None
        error = self._handle([message])
        return self._write_failure(message, error) if error else None

    def _handle(self, messages: Sequence[Message]) -> BaseException | None:
        """Run the handler, and commit its effects with the acknowledgement. Return the error, if there was an error."""
        try:
            with ended_in_a_fork(f"The run of {self._worker.__name__}"), self._runs.app.app_context():
                context = MessageContext(self._batch, messages, self._messages, self._instance, self._runs.db)
                with self._runs.entered(context):
                    self._run(messages, context)
        except BaseException as error:  # also an error of the application at the end of its context
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
                await_result(worker.handle_many(messages, context))
            context.handled(*messages)
            return
        with ended_in_a_fork(f"{self._worker.__name__}.handle") as end_child:
            for message in messages:
                if context.stopping:
                    break  # the handled messages are committed, and the rest is handed back
                context.begin(message)
                await_result(worker.handle(message, context))
                end_child()
                context.handled(message)

    def _write_failure(self, message: Message, error: BaseException) -> timedelta | None:
        """Write that `message` failed. Return the pause before its next attempt, or None."""
        key, worker = message.idempotency_key, self._worker
        if isinstance(error, RunStopped) and self._runs.stopping.is_set():
            return None  # `run` hands this message back with the rest
        if isinstance(error, ClaimLost):
            self._log.warning("Lost the message %s: %s", key, first_line(error))
            return None
        if isinstance(error, Later):
            return self._postpone(message, error)
        if (excused := self._excuse([message], error)) is not None:
            return excused
        is_final = isinstance(error, Bury)
        pause, most = pause_after(worker, message.attempt), message.attempt if is_final else worker.max_attempts
        text = first_line(error) if is_final else traceback_of(error)
        fail = partial(self._messages.fail, self._batch, [message.id])
        freed = self._write("failed", partial(fail, text, most, pause), partial(fail, _UNWRITTEN, most, pause))
        if freed and freed[0].state == "dead":
            if is_final:
                self._log.warning("Buried the message %s: %s", key, text)
            else:
                self._log.error("Buried the message %s, attempt %d failed", key, message.attempt, exc_info=error)
            signal_buried(self._runs.app, freed, text)
        elif freed:
            details = (key, message.attempt, pause.total_seconds(), summary(error))
            self._log.warning("The message %s failed, attempt %d; the next in %.1f s: %s", *details)
            return pause
        return None

    def _postpone(self, message: Message, later: Later) -> timedelta | None:
        """Write that the handler wants `message` later. Return the pause until then, or None."""
        text = first_line(later) if later.has_reason else None
        postpone = partial(self._messages.postpone, self._batch, [message.id], later.delay)
        if not self._write("are postponed", partial(postpone, text), partial(postpone, _UNWRITTEN)):
            return None
        self._log.info("Postponed the message %s by %s: %s", message.idempotency_key, later.delay, first_line(later))
        return later.delay

    def _write(self, what: str, *writes: Callable[[], T]) -> T | None:
        return write_with_retries(self._instance, f"which messages of {self._batch.worker} {what}", *writes)


def signal_buried(app: Flask, freed: Iterable[Freed], error: str) -> None:
    """Send a signal to the application for each message that was buried."""
    for each in freed:
        if each.state == "dead":
            send(app, message_buried, message=each.id, topic=each.topic, error=error)
