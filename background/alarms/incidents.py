"""The rows of the incidents. One statement decides which instance opens or ends an incident, and so sends its alert."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, String, delete, literal, not_, or_, select, true, update
from sqlalchemy.orm import Session

from ..database.clock import AHEAD, UtcDateTime, now
from ..database.tables import AnyText, chores, incidents
from ..errors import spelled_out
from ..stores import Stores

CALM = timedelta(minutes=10)
"""After the end of an incident, no incident of the same kind and subject opens for this time."""
_LOOK = "look for incidents"
_LONGEST_DETAIL = 1_000
_is_open = incidents.c.ended_at.is_(None)


@dataclass(frozen=True)
class Incident:
    """One problem of the fleet, from its beginning to its end."""

    id: int
    kind: str
    """failing, overdue, stuck, dead, clock or silent."""
    subject: str
    """The worker, the topic or the host. Empty for the whole fleet."""
    opened_at: datetime
    ended_at: datetime | None
    detail: str

    @property
    def key(self) -> tuple[str, str]:
        return self.kind, self.subject

    @property
    def at_opening(self) -> str:
        """The detail, for a reader of a later time: it may no longer hold."""
        return self.detail if self.kind == "silent" else f"When it opened: {self.detail}"


class Incidents:
    """Reads the incidents of one database, and opens and ends them on a caller's session."""

    def __init__(self, stores: Stores) -> None:
        self._store = stores.main
        self._kept = max(timedelta(days=stores.app.config["WORKERS_HISTORY_DAYS"]), CALM)

    def claim_look(self, every: timedelta) -> bool:
        """Return True if this instance should look for incidents now.

        Concurrency: every instance calls this. The row of the last look lets one instance look in each interval.
        """
        is_due = or_(chores.c.until <= now(-every), chores.c.until > now(AHEAD))
        not_yet = select(chores.c.name).where(chores.c.name == _LOOK, not_(is_due))
        if self._store.has_one_writer and self._store.read(not_yet):
            return False
        row = self._store.insert(chores).values(name=_LOOK, until=now())
        look = row.on_conflict_do_update(index_elements=["name"], set_={"until": now()}, where=is_due)
        return self._store.change(look.execution_options(preserve_rowcount=True)) > 0

    def current(self) -> list[Incident]:
        """Return the open incidents, oldest first."""
        return self._read(_is_open)

    def recent(self, limit: int = 20) -> list[Incident]:
        """Return the open incidents, oldest first, then the incidents that ended last."""
        ended = select(incidents).where(incidents.c.ended_at.is_not(None))
        newest = self._store.read(ended.order_by(incidents.c.ended_at.desc()).limit(limit))
        return [*self.current(), *(Incident(*row) for row in newest)]

    def known(self) -> list[Incident]:
        """Return the open incidents, and the incidents that ended too recently to open again."""
        return self._read(or_(_is_open, incidents.c.ended_at > now(-CALM)))

    def _read(self, which: ColumnElement[bool]) -> list[Incident]:
        query = select(incidents).where(which).order_by(incidents.c.opened_at, incidents.c.id)
        return [Incident(*row) for row in self._store.read(query)]

    def open(
        self,
        session: Session,
        kind: str,
        subject: str,
        detail: str,
        span: tuple[datetime | None, datetime | None] = (None, None),
    ) -> Incident | None:
        """Open an incident on the caller's session. None if it is open, or ended a short time ago.

        `span` is the beginning and the end of an incident that is already over. None if its row exists.

        Concurrency: several instances may find the same problem. The unique indexes let one of them insert the row.
        """
        since, until = span
        calm = select(incidents.c.id).where(
            incidents.c.kind == kind, incidents.c.subject == subject, incidents.c.ended_at > now(-CALM)
        )
        is_free = not_(calm.exists()) if until is None else true()  # a problem that is over is found only once
        detail = spelled_out(detail)[:_LONGEST_DETAIL]
        values: list[ColumnElement[Any]] = [
            literal(kind, String()),
            literal(subject, String()),
            now() if since is None else literal(since, UtcDateTime()),
            literal(until, UtcDateTime()),
            literal(detail, AnyText()),
        ]
        columns = incidents.c.keys()[1:]
        row = self._store.insert(incidents).from_select(columns, select(*values).where(is_free))
        return self._written(session, row.on_conflict_do_nothing().returning(incidents))

    def end(self, session: Session, id: int) -> Incident | None:
        """End the incident on the caller's session. None if it ended before.

        Concurrency: several instances may do this, and one of them changes the row. The caller read the incident before
        it looked at the fleet. So an incident that opened meanwhile stays open.
        """
        row = update(incidents).where(incidents.c.id == id, _is_open).values(ended_at=now())
        return self._written(session, row.returning(incidents))

    def _written(self, session: Session, statement: Any) -> Incident | None:
        """Write the row, and delete the incidents that ended long ago."""
        within = self._store.sessions.within(session)
        found = within.execute(statement).one_or_none()
        if found is None:
            return None
        within.execute(delete(incidents).where(incidents.c.ended_at < now(-self._kept)))
        return Incident(*found)
