"""An answer of the database within seconds, whatever hangs: a probe must not wait as long as what it probes."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from ..database.clock import steady

Whom = TypeVar("Whom")
Answer = TypeVar("Answer")

_GIVEN_UP_SECONDS = 30.0


class Timebox(Generic[Whom, Answer]):
    """Asks on a thread of its own, one question at a time. A caller that comes meanwhile gets the same answer."""

    def __init__(self, ask: Callable[[Whom], Answer], seconds: float) -> None:
        self._ask, self._seconds = ask, seconds
        self._asking = threading.Lock()
        self._answer: Future[Answer] | None = None
        self._asked_at = 0.0

    def answer(self, whom: Whom) -> Answer:
        """What `ask(whom)` returns or raises; TimeoutError if it does neither in time."""
        with self._asking:
            age = steady() - self._asked_at
            if self._answer is None or self._answer.done() or age > _GIVEN_UP_SECONDS:
                self._answer, self._asked_at, age = Future(), steady(), 0.0
                threading.Thread(target=self._settle, args=(self._answer, whom), name="prompt", daemon=True).start()
            answer = self._answer
        try:
            return answer.result(max(self._seconds - age, 0))
        except TimeoutError:
            raise TimeoutError(f"no answer within {self._seconds:g} s") from None

    def _settle(self, answer: Future[Answer], whom: Whom) -> None:
        try:
            answer.set_result(self._ask(whom))
        except Exception as error:  # it is raised where it was asked
            answer.set_exception(error)
