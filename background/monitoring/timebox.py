"""Runs a query with a time limit, so that a probe answers within seconds even if the database hangs."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Generic, TypeVar

from ..database.clock import steady
from ..database.connections import again_if_stale

Subject = TypeVar("Subject")
Answer = TypeVar("Answer")

_GIVEN_UP_SECONDS = 30.0


class Timebox(Generic[Subject, Answer]):
    """Runs one query at a time, on a thread of its own. Callers that come meanwhile get the same result.

    The query may run again, as the first use of a stale connection fails.
    """

    def __init__(self, ask: Callable[[Subject], Answer], seconds: float) -> None:
        self._ask, self._seconds = ask, seconds
        self._asking = threading.Lock()
        self._answer: Future[Answer] | None = None
        self._asked_at = 0.0

    def answer(self, subject: Subject) -> Answer:
        """Return the result of `ask(subject)`, or raise its error. Raises TimeoutError if it does not end in time."""
        with self._asking:
            age = steady() - self._asked_at
            if self._answer is None or self._answer.done() or age > _GIVEN_UP_SECONDS:
                self._asked_at, age = steady(), 0.0
                self._answer = begun(partial(again_if_stale, partial(self._ask, subject)))
            answer = self._answer
        try:
            return answer.result(max(self._seconds - age, 0))
        except TimeoutError:
            raise TimeoutError(f"no answer within {self._seconds:g} s") from None


def begun(ask: Callable[[], Answer]) -> "Future[Answer]":
    """Call `ask` on a thread of its own, which does not delay an exit. Return the future of its answer."""
    future: Future[Answer] = Future()
    threading.Thread(target=_settle, args=(future, ask), name="timebox", daemon=True).start()
    return future


def _settle(future: "Future[Answer]", ask: Callable[[], Answer]) -> None:
    try:
        future.set_result(ask())
    except Exception as error:  # `result` raises it in the thread that waits
        future.set_exception(error)
