"""Reads the instances for people: living and gone. Decides nothing."""

from collections.abc import Collection
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Select, and_, bindparam, func, not_, or_, select, true

from ..database.clock import now
from ..database.tables import instances
from ..ledger.leases import Leases, is_alive
from .records import InstanceRecord

_MOST_GONE = 20
_MOST_LIVED = 500


@dataclass(frozen=True)
class Silence:
    """A fleet in which no instance is alive."""

    last: InstanceRecord | None
    """The instance that was seen last. None if no instance is known."""
    clock: datetime

    @property
    def since(self) -> datetime | None:
        """The moment when the last instance signed off, or renewed its lease for the last time."""
        return (self.last.signed_off_at or self.last.heartbeat_at) if self.last else None

    @property
    def length(self) -> timedelta | None:
        return self.clock - self.since if self.since else None


class InstanceHistory:
    """Reads the rows of the instances."""

    def __init__(self, rows: Leases) -> None:
        self._read = rows.read

    def gone(self, ids: Collection[str]) -> set[str]:
        """Return the instances of `ids` that are not alive."""
        if not ids:
            return set()
        return set(ids) - {id for (id,) in self._read(_alive_of, {"ids": [*ids]})}

    def seen(self) -> list[InstanceRecord]:
        """Return the living instances, then the gone instances that left last, each newest first."""
        newest = _seen.order_by(instances.c.started_at.desc())
        alive, gone = newest.where(is_alive), newest.where(not_(is_alive)).limit(_MOST_GONE)
        return [InstanceRecord(*row) for query in (alive, gone) for row in self._read(query)]

    def alive(self) -> tuple[int, datetime]:
        """Return the number of living instances, and the database's clock."""
        [(number, clock)] = self._read(_number_alive)
        return number, clock

    def silence(self) -> Silence | None:
        """Return the state of a fleet in which no instance is alive, in one read. None while an instance is alive."""
        left = func.coalesce(instances.c.signed_off_at, instances.c.heartbeat_at)
        latest = _seen.order_by(is_alive.desc(), left.desc()).limit(1).subquery()
        one = select(now().label("clock")).subquery()
        [(clock, *row)] = self._read(select(one.c.clock, latest).outerjoin_from(one, latest, true()))
        last = None if row[0] is None else InstanceRecord(*row)
        return None if last and last.is_alive else Silence(last, clock)

    def lived(self, since: datetime, until: datetime, ids: Collection[str]) -> tuple[InstanceRecord, ...]:
        """Return the instances that lived between the two moments, and the instances `ids`, oldest first."""
        lived = and_(instances.c.started_at <= until, instances.c.heartbeat_at >= since)
        query = _seen.where(or_(lived, instances.c.id.in_(ids))).order_by(instances.c.started_at, instances.c.id)
        return tuple(InstanceRecord(*row) for row in self._read(query.limit(_MOST_LIVED)))

    def alive_and_last(self) -> tuple[tuple[InstanceRecord, ...], InstanceRecord | None]:
        """Return the living instances, oldest first, and the instance that was seen last."""
        living = self._read(_seen.where(is_alive).order_by(instances.c.started_at))
        last = self._read(_seen.order_by(instances.c.heartbeat_at.desc()).limit(1))
        return tuple(InstanceRecord(*row) for row in living), (InstanceRecord(*last[0]) if last else None)


_seen: Select[Any] = select(
    *(instances.c[field.name] for field in fields(InstanceRecord) if field.name in instances.c),
    -instances.c.clock_offset,
    is_alive,
)
# Built once, as building takes longer than reading.
_alive_of = select(instances.c.id).where(instances.c.id.in_(bindparam("ids", expanding=True)), is_alive)
_number_alive = select(func.count(), now()).select_from(instances).where(is_alive)
