"""The threads that keep an instance alive, and the threads that look for work and for incidents."""

import logging
import math
import threading
from collections.abc import Callable, Collection
from enum import IntEnum
from queue import SimpleQueue
from typing import Protocol

from ..database.clock import steady
from ..errors import first_line
from ..host.logs import Outage, logger_of, unless_expected

log = logger_of(__name__)

_LAST_BEAT_SECONDS = 1.0


class Heartbeat:
    """Calls `beat` every `interval` seconds, and `lost` after each `deadline`. Errors go to `failed`.

    It calls `beat` earlier, after `until_expiry` seconds, when another instance's lease ends: it may be gone.
    It has two threads, as `beat` may hang in a broken network. The other thread watches the deadline meanwhile.
    """

    def __init__(
        self,
        interval: float,
        beat: Callable[[], object],
        failed: Callable[[Exception], None],
        deadline: Callable[[], float],
        lost: Callable[[], None],
        until_expiry: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self._interval, self._beat, self._failed, self._deadline, self._lost = interval, beat, failed, deadline, lost
        self._until_expiry = until_expiry
        self._stopped = threading.Event()
        self._beating = threading.Thread(target=self._renew, name="workers-heartbeat", daemon=True)
        self._watching = threading.Thread(target=self._watch, name="workers-lease", daemon=True)

    def start(self) -> None:
        self._beating.start()
        self._watching.start()

    @property
    def is_alive(self) -> bool:
        """True while both threads live."""
        return self._beating.is_alive() and self._watching.is_alive()

    def stop(self) -> None:
        """Begin no other beat. Wait briefly for a beat in progress."""
        self._stopped.set()
        self._beating.join(_LAST_BEAT_SECONDS)

    def _renew(self) -> None:
        while not self._stopped.wait(min(self._until_expiry(), self._interval)):
            try:
                self._beat()
            except Exception as error:  # without this thread, the instance would stop for good
                self._failed(error)

    def _watch(self) -> None:
        lost = 0.0
        while not self._stopped.wait(max(self._deadline() - steady(), self._interval / 4)):
            if lost != (deadline := self._deadline()) and steady() >= deadline:
                lost = deadline
                try:
                    self._lost()
                except Exception as error:  # as above
                    self._failed(error)


_LAST_LOOK_SECONDS = 1.0


class Look(IntEnum):
    """The extent of a look at the fleet."""

    BUSY = 0
    """The workers that run or must run again."""
    ALL = 1
    """All workers, and their schedules."""
    REARM = 2
    """The same, and arm every timer again."""


class Looking:
    """Calls `look` in a thread of its own when a caller wants a look.

    Looks that wait at the same time become one, which goes as far as the farthest of them.
    """

    def __init__(
        self, look: Callable[[Look], None], failed: Callable[[Exception], None], name: str = "workers-look"
    ) -> None:
        self._look, self._failed = look, failed
        self._wanted: SimpleQueue[Look | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def want(self, look: Look = Look.ALL) -> None:
        """Have the thread look soon."""
        self._wanted.put(look)

    def stop(self) -> None:
        """Begin no other look. Wait briefly for a look in progress."""
        self._wanted.put(None)
        self._thread.join(_LAST_LOOK_SECONDS)

    def _serve(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            farthest = wanted
            while not self._wanted.empty():
                if (wanted := self._wanted.get()) is None:
                    return
                farthest = max(farthest, wanted)
            try:
                self._look(farthest)
            except Exception as error:  # the thread must live on for the next look
                self._failed(error)


class Watch(Protocol):
    """Looks at the fleet for incidents."""

    interval: float
    """The seconds between two looks."""
    topics: Collection[str]
    """The topics of alerts. Each has a thread of its own, because hung runs may use all other threads."""

    def before_joining(self) -> None:
        """Look at the fleet before an instance of this process joins it. Raises nothing."""

    def look(self) -> None:
        """Look at the fleet."""


class Watching:
    """Has a watch look for incidents once per interval, on a thread of its own. Without a watch, it does nothing."""

    def __init__(self, watch: Watch | None, is_away: Callable[[], bool]) -> None:
        """While the database `is_away`, the log has no warning of a look that failed."""
        self._watch, self._is_away = watch, is_away
        self.topics: Collection[str] = watch.topics if watch else ()
        self._looking = Looking(self._look, self._failed, "workers-watch")
        self._outage, self._next_at = Outage(), 0.0

    def before_joining(self) -> None:
        if self._watch is not None:
            self._watch.before_joining()

    def start(self) -> None:
        if self._watch is not None:
            self._looking.start()

    def want(self) -> None:
        """Have the watch look soon, unless it looked within its interval."""
        if self._watch is not None and steady() >= self._next_at:
            self._next_at = steady() + self._watch.interval
            self._looking.want()

    def stop(self) -> None:
        if self._watch is not None:
            self._looking.stop()

    def _look(self, _extent: Look) -> None:
        if self._watch is not None:
            self._watch.look()
            self._outage.ended()

    def _failed(self, error: Exception) -> None:
        level = logging.DEBUG if self._is_away() else self._outage.level()
        log.log(level, "Cannot look for incidents: %s", first_line(error), exc_info=unless_expected(error))
