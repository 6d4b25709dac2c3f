"""Finds the problems of the fleet: failing, overdue and stuck workers, dead messages, and clocks that are off."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from sqlalchemy import ColumnElement, Select, func, select

from ..database.tables import executions, instances, is_dead, message_errors, messages, workers
from ..errors import error_line, spelled_out
from ..history.condition import condition
from ..history.instances import Silence
from ..history.records import FAILED
from ..history.text import second, span
from ..ledger.leases import OFFSET_WARNED, is_alive
from ..stores import Stores
from ..worker import PeriodicWorker

PATIENCE = timedelta(minutes=1)
"""A shorter wait of a tick, or a shorter stop of the fleet, is not an incident."""
_COUNTED = ("succeeded", *FAILED, "lost")


@dataclass(frozen=True)
class Finding:
    """One problem that was found. `detail` reads a sentence about it, which only a new incident needs."""

    kind: str
    subject: str
    detail: Callable[[], str]

    @property
    def key(self) -> tuple[str, str]:
        return self.kind, self.subject


class Findings:
    """Reads the state of the fleet, in a constant number of queries."""

    def __init__(self, stores: Stores, ours: Mapping[str, type[PeriodicWorker]], failures: int) -> None:
        """`ours` are the workers of this release. A worker that failed `failures` times in a row is an incident."""
        self._stores, self._ours, self._failures = stores, ours, failures
        self._read = stores.main.read

    def look(self, open: Collection[tuple[str, str]], patience: timedelta = PATIENCE) -> list[Finding]:
        """Return each problem. A tick may wait for `patience`.

        `open` are the kinds and subjects of open incidents. Such a problem is returned until it is clearly over.
        """
        return [*self._workers(open, patience), *self._failing(), *self._dead(), *self._clocks(open)]

    def _workers(self, open: Collection[tuple[str, str]], patience: timedelta) -> list[Finding]:
        found = condition(self._stores, self._ours)
        overdue = [each for each in found.late if each.waits_for >= patience or ("overdue", each.name) in open]
        return [
            *(Finding("overdue", each.name, partial(found.tardy, each)) for each in overdue),
            *(Finding("stuck", name, partial(str.format, "{}.", why)) for name, why in found.stuck.items()),
        ]

    def _failing(self) -> list[Finding]:
        last = self._last(workers.c.name, executions.c.state).correlate(workers).subquery()
        failed = select(func.count()).select_from(last).where(last.c.state != "succeeded").scalar_subquery()
        rows = self._read(select(workers.c.name).where(failed == self._failures).order_by(workers.c.name))
        return [
            Finding("failing", row.name, partial(self._failure, row.name)) for row in rows if row.name in self._ours
        ]

    def _failure(self, name: str) -> str:
        newest = self._last(name, executions.c.tick, executions.c.finished_at, executions.c.state, executions.c.reason)
        first_failed = newest.order_by(None).order_by(executions.c.tick, executions.c.id).limit(1)
        for success in self._read(newest.where(executions.c.state == "succeeded").limit(1)):
            first_failed = first_failed.where(executions.c.tick > success.tick)
        (first,), (last,) = self._read(first_failed), self._read(newest.limit(1))
        return f"It has failed since {second(first.finished_at)}. Its last run ended as {last.state}{_why(last.reason)}"

    def _last(self, worker: Any, *columns: ColumnElement[Any]) -> Select[Any]:
        """Select the last runs of a worker, as many as must have failed in a row, newest first."""
        is_ours = executions.c.worker == worker, executions.c.state.in_(_COUNTED)
        newest = select(*columns).where(*is_ours).order_by(executions.c.tick.desc(), executions.c.id.desc())
        return newest.limit(self._failures)

    def _dead(self) -> list[Finding]:
        query = select(messages.c.topic, func.count().label("number")).where(is_dead).group_by(messages.c.topic)
        rows = self._read(query.order_by(messages.c.topic))
        return [Finding("dead", row.topic, partial(self._death, row.topic, row.number)) for row in rows]

    def _death(self, topic: str, number: int) -> str:
        newest = select(func.max(messages.c.id)).where(is_dead, messages.c.topic == topic).scalar_subquery()
        of_newest = select(message_errors.c.error).where(message_errors.c.message == newest)
        rows = self._read(of_newest.order_by(message_errors.c.id.desc()).limit(1))
        count = "1 message is" if number == 1 else f"{number:,} messages are"
        return f"{count} dead{_why(rows[0].error if rows else None)}"

    def _clocks(self, open: Collection[tuple[str, str]]) -> list[Finding]:
        query = select(instances.c.host, instances.c.clock_offset).where(
            is_alive, instances.c.clock_offset.is_not(None)
        )
        offsets: dict[str, float] = {}
        for row in self._stores.leases.read(query.order_by(func.abs(instances.c.clock_offset))):
            offsets[row.host] = -row.clock_offset  # the host's largest offset comes last
        return [
            Finding("clock", host, partial(_offset, offset))
            for host, offset in offsets.items()
            # Two limits: an offset near a single limit would open and end incidents in turn.
            if abs(offset) > OFFSET_WARNED.total_seconds() / (2 if ("clock", host) in open else 1)
        ]


def _offset(seconds: float) -> str:
    side = "ahead of" if seconds > 0 else "behind"
    return f"It is {abs(seconds):.1f} s {side} the database's clock."


def _why(reason: str | None) -> str:
    line = error_line(reason)
    return f": {line}" if line else "."


def outage(silence: Silence | None) -> str | None:
    """Describe the time without an instance. None if an instance is alive, or the fleet was only restarted."""
    if silence is None or silence.last is None or silence.length is None:
        return None
    last = silence.last
    if last.signed_off_at and silence.length < PATIENCE:
        return None
    left = "signed off" if last.signed_off_at else "was last seen"
    since = second(silence.since)
    times = f"from {since} to {second(silence.clock)} ({span(silence.length)})"
    return f"No worker ran {times}. The last instance, {spelled_out(last.name)}, {left} at {since}."
