"""The floor of each topic: the moment from which one process looks for its due messages.

On PostgreSQL, while an old transaction is open, each look passes the index entries of all messages done since then. A
backup of an hour would slow the queue. A look from the floor passes only the newest entries.
A message can wait below the floor: its transaction committed late, or another process gave it back. A heartbeat finds
it, because it looks without floors. If such a look is slow, the next nine heartbeats look from the floors. While it is
quick, no look needs a floor.
"""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

_LATE = timedelta(seconds=1)
"""From this age on, a transaction that enqueued is late."""
_QUICK = 0.002  # seconds. A look that takes less needs no floor
_SLOW = 1 / 40  # of the time between two heartbeats. After a longer look, heartbeats look from the floors
_SPARED = 9  # heartbeats after a slow look


@dataclass(frozen=True, eq=False)
class Floor:
    """A moment of the database's clock. None stands for a look at all messages."""

    at: datetime | None = None


@dataclass(frozen=True)
class Beat:
    """The look of one heartbeat, which began with the `floors` of the topics."""

    floors: Mapping[str, Floor]
    is_full: bool

    @property
    def moments(self) -> dict[str, datetime | None] | None:
        """The floors to look from. None for a look without floors."""
        return None if self.is_full else {topic: floor.at for topic, floor in self.floors.items()}


class Floors:
    """The floors of one process.

    Concurrency: the heartbeat and the consumers of a topic lift its floor, each after a look of its own. If another
    thread changed the floor during the look, the lower floor stays.
    """

    def __init__(self, heartbeat: float, may_help: bool) -> None:
        """Expect a heartbeat each `heartbeat` seconds. Without `may_help`, every look is without floors."""
        self._slow, self._may_help = heartbeat * _SLOW, may_help
        self._is_used = False
        self._floors: dict[str, Floor] = {}
        self._spared = 0
        self._changed = threading.Lock()

    def of(self, topic: str) -> Floor:
        """Return the floor for a look that begins now."""
        with self._changed:
            return self._floors.setdefault(topic, Floor())

    def lift(self, topic: str, began: Floor, first: datetime, asked: datetime) -> None:
        """Set the floor after a look, which began with the floor `began` at the moment `asked`.

        `first` is the due moment of the first waiting message that the look found.
        """
        lifted = min(first, asked - _LATE)
        with self._changed:
            floor = self._floors[topic]
            if self._is_used and (floor is began or (floor.at is not None and lifted < floor.at)):
                self._floors[topic] = Floor(lifted)

    def lower(self, topic: str, at: datetime) -> None:
        """Have each look that begins later find a message that is due at the moment `at`."""
        with self._changed:
            floor = self._floors.get(topic, Floor())
            self._floors[topic] = Floor(None if floor.at is None else min(floor.at, at))

    def forget(self) -> None:
        """Have each look that begins later find every message."""
        with self._changed:
            self._floors = {topic: Floor() for topic in self._floors}

    def at_heartbeat(self, topics: Iterable[str]) -> Beat:
        """Return the look of a heartbeat that begins now."""
        return Beat({topic: self.of(topic) for topic in topics}, is_full=not self._spared)

    def after_heartbeat(self, beat: Beat, due: Mapping[str, datetime], asked: datetime, took: float) -> None:
        """Lift the floors after a heartbeat's look for the messages that are `due`. It took the database `took` s."""
        if not beat.is_full:
            self._spared -= 1
        elif self._may_help and took > _QUICK:
            self._is_used, self._spared = True, _SPARED if took > self._slow else 0
        elif self._is_used:
            self._is_used = False
            self.forget()
        for topic, first in due.items():
            self.lift(topic, beat.floors[topic], first, asked)
