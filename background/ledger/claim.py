"""Values about claims: a claim, a worker's state as the database has it, and why a claim was refused."""

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Literal

from ..schedule.parsing import parse_schedule
from ..schedule.periods import Schedule


@dataclass(frozen=True)
class Claim:
    """The right to run one tick of one worker, while the worker's row has this `id` and `token`.

    The token repeats if the database loses commits that it acknowledged. The id never repeats.
    """

    worker: str
    tick: datetime
    attempt: int
    token: int
    trigger: str
    execution: int | None
    """The id of the execution's row. None if that row was deleted by hand."""
    started_at: datetime | None = None
    id: str | None = None
    """Random. None if an older release made the claim."""
    instance: str | None = None
    instance_name: str | None = None

    @property
    def idempotency_key(self) -> str:
        """A text that all attempts at this tick share, and no other tick has."""
        kind = "" if self.trigger == "schedule" else f"{self.trigger}:"
        return f"{self.worker}:{kind}{self.tick.isoformat()}"


@dataclass(frozen=True)
class WorkerState:
    """One worker's row, the claim in force (if any) and the database's clock, from one read."""

    name: str
    clock: datetime
    mark: datetime | None
    schedule_text: str
    scheduled_at: datetime
    declared: str
    declared_by: str | None
    paused_at: datetime | None
    pending_tick: datetime | None
    pending_trigger: str | None
    running: Claim | None
    started_at: datetime | None
    progress_done: float | None
    progress_total: float | None
    instance: str | None
    instance_name: str | None
    has_strays: bool = False
    """True if an execution says "running" while its claim is not in force: the claim was ended by hand."""
    mark_ahead: datetime | None = None
    """The mark from a time when the clock was ahead. Ticks up to it may have run."""

    @property
    def is_bare(self) -> bool:
        """True if the execution of the claim in force has no row: that row was deleted by hand."""
        return self.running is not None and self.running.execution is None

    @property
    def is_damaged(self) -> bool:
        """True while the rows contradict each other, which only a change by hand can cause."""
        return self.is_bare or self.has_strays

    @property
    def overridden(self) -> bool:
        """True if `reschedule` replaced the declared schedule."""
        return self.schedule_text != self.declared

    @property
    def owed(self) -> datetime | None:
        """The tick that must run before any other.

        A pause delays the tick, unless a user requested it. If the clock was set back, the tick waits until it is due.
        """
        tick = self.pending_tick
        is_held_up = self.paused_at or (tick and tick > self.clock)
        return None if is_held_up and self.pending_trigger != "manual" else tick

    @property
    def schedule(self) -> Schedule:
        """The schedule in force. Raises InvalidSchedule if this release cannot read its text."""
        return parse_schedule(self.schedule_text)


class NotClaimed(Enum):
    """Why a claim was refused. Falsy, so `if claim:` works."""

    DECIDED = "it is already decided"
    BLOCKED = "the worker is paused or running, or the tick is not due"

    def __bool__(self) -> Literal[False]:
        return False


DECIDED, BLOCKED = NotClaimed.DECIDED, NotClaimed.BLOCKED
