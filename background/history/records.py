"""Who is alive and who was, read for people: nothing here decides who runs."""

from dataclasses import dataclass
from datetime import datetime, timedelta
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
    """How far its host's clock is ahead of the database's, in seconds."""
    is_alive: bool = True

    @property
    def name(self) -> str:
        return f"{self.host}:{self.pid}"

    @property
    def state(self) -> str:
        return "alive" if self.is_alive else "signed off" if self.signed_off_at else "lost"


STATES = ("running", "succeeded", "failed", "lost", "handed back", "timed out", "skipped", "missed")
Place = tuple[datetime, int]  # the tick and the id of an execution


class Record(NamedTuple):
    """One row of the executions: an attempt at a tick, or the ticks `tick` to `through` that nobody ran."""

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
    clock: datetime
    """The database's clock when this was read."""
    is_gone: bool = False
    """Whether it says "running" and its instance is not alive: another one will take it over."""

    @property
    def duration(self) -> timedelta | None:
        """How long it ran, or has run; None for one that did not."""
        return (self.finished_at or self.clock) - self.started_at if self.started_at else None

    @property
    def last_line(self) -> str | None:
        """The end of the reason, with its moments as people read them: of a traceback, the error itself."""
        line = error_line(self.reason)
        return line and line.replace("+00:00", "Z")

    def as_dict(self) -> dict[str, Any]:
        """Its columns, and how long it ran in seconds."""
        row = self._asdict()
        del row["clock"]
        return {**row, "seconds": self.duration.total_seconds() if self.duration is not None else None}

    @property
    def began_at(self) -> datetime:
        """When it was started; of ticks that were not run, the first of them."""
        return self.started_at or self.tick

    @property
    def ended_at(self) -> datetime:
        """When it ended, or now; of ticks that were not run, the last of them."""
        return (self.finished_at or self.clock) if self.started_at else (self.through or self.tick)

    def covers(self, tick: datetime) -> bool:
        return self.tick <= tick <= (self.through or self.tick)


class Glance(NamedTuple):
    """The little of a row that a small picture shows."""

    worker: str
    tick: datetime
    state: str
    started_at: datetime | None
    ended_at: datetime
    """Now, of one that runs; of ticks that were not run it means nothing."""


@dataclass(frozen=True)
class Window:
    """What the fleet did between two moments."""

    since: datetime
    until: datetime
    clock: datetime
    records: tuple[Record, ...]
    """In the order in which they were written, without their reasons."""
    complete_since: datetime
    """Later than `since` where more happened than was asked for: of the time before then something is left out."""
    seen: tuple[InstanceRecord, ...]
    """The instances that lived in it, the oldest first."""

    @property
    def is_complete(self) -> bool:
        return self.complete_since <= self.since


@dataclass(frozen=True)
class Surroundings:
    """What the rows say about a moment of a worker's life. `at` may be in the future."""

    name: str
    at: datetime
    clock: datetime
    state: WorkerState | None
    records: tuple[Record, ...] = ()
    """Every attempt at the tick that `at` belongs to, oldest first; or the one row that says why there was none."""
    before: Record | None = None
    """The latest scheduled tick before `at` that something is known about, where there are no `records`."""
    after: Record | None = None
    oldest: datetime | None = None
    """The tick of the worker's oldest row; what was before it may have been pruned."""
    alive: tuple[InstanceRecord, ...] = ()
    last_seen: InstanceRecord | None = None
