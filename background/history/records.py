"""The records that people read: instances, executions, and the rows around a tick."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby
from typing import Any, NamedTuple

from ..errors import error_line
from ..ledger.claim import WorkerState


@dataclass(frozen=True)
class InstanceRecord:
    """One instance, as its row shows it."""

    id: str
    host: str
    pid: int
    started_at: datetime
    heartbeat_at: datetime
    signed_off_at: datetime | None
    release: str | None = None
    clock_ahead: float | None = None
    """The seconds by which its host's clock is ahead of the database's."""
    is_alive: bool = True

    @property
    def name(self) -> str:
        return f"{self.host}:{self.pid}"

    @property
    def state(self) -> str:
        return "alive" if self.is_alive else "signed off" if self.signed_off_at else "lost"


STATES = ("running", "succeeded", "failed", "lost", "handed back", "timed out", "cancelled", "skipped", "missed")
FAILED = ("failed", "timed out")  # the states of an execution whose own code is in trouble
Place = tuple[datetime, int]  # the tick of an execution or the due moment of a message, and the id


class Record(NamedTuple):
    """One row of the executions: an attempt at a tick, or the ticks `tick` to `through` that did not run."""

    id: int
    worker: str
    tick: datetime
    through: datetime | None
    trigger: str
    state: str
    attempt: int | None
    token: int | None
    instance: str | None
    instance_name: str | None
    started_at: datetime | None
    finished_at: datetime | None
    progress_done: float | None
    progress_total: float | None
    reason: str | None
    cancelled_at: datetime | None
    """The moment when a user cancelled it. Its run may go on for a while."""
    cancelled_by: str | None
    clock: datetime
    """The database's clock when this was read."""
    is_gone: bool = False
    """True if it says "running" and its instance is gone: another instance will take it over."""

    @property
    def duration(self) -> timedelta | None:
        """The time for which it ran, or has run. None if it did not run."""
        return (self.finished_at or self.clock) - self.started_at if self.started_at else None

    @property
    def last_line(self) -> str | None:
        """The last line of the reason, with its moments in UTC. For a traceback, the error itself."""
        line = error_line(self.reason)
        return line and line.replace("+00:00", "Z")

    def as_dict(self) -> dict[str, Any]:
        """Return its columns, and the seconds for which it ran."""
        row = self._asdict()
        del row["clock"]
        return {**row, "seconds": self.duration.total_seconds() if self.duration is not None else None}

    @property
    def began_at(self) -> datetime:
        """Its start. For ticks that did not run, the first tick."""
        return self.started_at or self.tick

    @property
    def ended_at(self) -> datetime:
        """Its end, or now. For ticks that did not run, the last tick."""
        return (self.finished_at or self.clock) if self.started_at else (self.through or self.tick)

    def covers(self, tick: datetime) -> bool:
        return self.tick <= tick <= (self.through or self.tick)


@dataclass(frozen=True)
class ErrorGroup:
    """The errors with the same last line."""

    line: str
    count: int
    first_at: datetime
    last_at: datetime
    newest: int
    """The id of the row with the newest error."""


def grouped(errors: Iterable[tuple[str, datetime, int]]) -> list[ErrorGroup]:
    """Group errors by their text. Each has its last line, its moment and the id of its row. Most frequent first."""
    groups = []
    for line, same in groupby(sorted(errors), key=lambda error: error[0]):
        of_line = list(same)
        (_, first, _), (_, last, newest) = of_line[0], of_line[-1]
        groups.append(ErrorGroup(line, len(of_line), first, last, newest))
    return sorted(groups, key=lambda group: (-group.count, group.line))


class Glance(NamedTuple):
    """The columns of a row that a sparkline shows."""

    worker: str
    tick: datetime
    state: str
    started_at: datetime | None
    ended_at: datetime
    """Now, if it runs. Without meaning for ticks that did not run."""


@dataclass(frozen=True)
class Window:
    """The executions of the fleet between two moments."""

    since: datetime
    until: datetime
    clock: datetime
    records: tuple[Record, ...]
    """In the order in which they were written, without their reasons."""
    complete_since: datetime
    """Later than `since` if there are more executions than the limit. Older executions may be missing."""
    seen: tuple[InstanceRecord, ...]
    """The instances that lived in it, the oldest first."""

    @property
    def is_complete(self) -> bool:
        return self.complete_since <= self.since


@dataclass(frozen=True)
class Surroundings:
    """The rows around a moment in the life of a worker. `at` may be in the future."""

    name: str
    at: datetime
    clock: datetime
    state: WorkerState | None
    records: tuple[Record, ...] = ()
    """Every attempt at the tick that `at` belongs to, oldest first. Or the one row that says why it did not run."""
    before: Record | None = None
    """Without `records`, the latest row of a scheduled tick before `at`."""
    after: Record | None = None
    oldest: datetime | None = None
    """The tick of the worker's oldest row. Earlier rows may have been pruned."""
    alive: tuple[InstanceRecord, ...] = ()
    last_seen: InstanceRecord | None = None
    manual: Record | None = None
    """The newest attempt at a manual run after that tick, if the question is about now."""
