"""The roll-up: one instance of the fleet counts the runs and messages of each slot of time, once the slot is over."""

import random
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta

from sqlalchemy import delete, insert, literal, select, update

from ..database.clock import now
from ..database.store import Store
from ..database.tables import chores, tallies
from .counting import Tallies, count_messages, count_runs

MINUTES, HOUR = timedelta(minutes=5), timedelta(hours=1)
"""The lengths of the slots."""
MINUTES_KEPT = timedelta(hours=3)
_CHORES = {MINUTES: "count by minutes", HOUR: "count by hours"}
_SPREAD_SECONDS = (1.0, 60.0)
_MOST_SLOTS = 6  # in one step, so that it takes little time and memory after an outage
_COUNTS: Mapping[str, Callable[..., Tallies]] = {"worker": count_runs, "topic": count_messages}


class RollUp:
    """Counts the runs and messages that ended in each slot.

    Keeps the counts of 5 minutes for three hours, and of hours for `kept`.
    """

    def __init__(self, store: Store, kept: timedelta) -> None:
        self._store = store
        self.kept = {MINUTES: MINUTES_KEPT, HOUR: kept}
        self._look_at: datetime | None = None

    def is_due(self, clock: datetime) -> bool:
        """Return whether this process should call `step` now, by the database's clock: once per slot."""
        before = self._look_at
        is_set_back = before is not None and before > clock + 2 * MINUTES
        if before is not None and clock < before and not is_set_back:
            return False
        # Instances look at different moments, so that the first is done before the others look.
        spread = timedelta(seconds=random.uniform(*_SPREAD_SECONDS))  # noqa: S311 - no secret
        self._look_at = floor(clock, MINUTES) + MINUTES + spread
        return before is not None and not is_set_back

    def step(self) -> bool:
        """Count a few slots that are over. False if no such slot is left.

        Concurrency: any instance may do this at the same moment. Each counts, and the first writes.
        """
        clock, until = self.counted()
        is_more = [self._step(length, clock, until.get(length)) for length in self.kept]
        return any(is_more)

    def counted(self) -> tuple[datetime, dict[timedelta, datetime]]:
        """Return the database's clock, and the moment up to which the slots of each length are counted."""
        clock = select(now().label("clock")).subquery()
        rows = self._store.read(select(clock.c.clock, chores).outerjoin_from(clock, chores, literal(True)))
        until = {row.name: row.until for row in rows}
        return rows[0].clock, {length: until[name] for length, name in _CHORES.items() if name in until}

    def _step(self, length: timedelta, clock: datetime, until: datetime | None) -> bool:
        end = floor(clock, length)
        if until == end:
            return False
        # Count the slot before once more, because a commit may come late. After a clock was set back, count
        # the repeated time again.
        first = end - self.kept[length] if until is None else max(min(until, end) - length, end - self.kept[length])
        edges = [floor(first, length)]
        while edges[-1] < end and len(edges) <= _MOST_SLOTS:
            edges.append(edges[-1] + length)
        found = {kind: counts(self._store, edges) for kind, counts in _COUNTS.items()}
        self._write(length, until, edges, found)
        return edges[-1] < end

    def _write(
        self, length: timedelta, until: datetime | None, edges: list[datetime], found: Mapping[str, Tallies]
    ) -> None:
        """Replace the counts between the edges, unless another instance has done so since `until` was read."""
        seconds = int(length.total_seconds())
        name = _CHORES[length]
        turn = update(chores).where(chores.c.name == name, chores.c.until == until).values(until=edges[-1])
        if until is None:
            turn = self._store.insert(chores).values(name=name, until=edges[-1]).on_conflict_do_nothing()
        in_slots = (tallies.c.seconds == seconds, tallies.c.start >= edges[0], tallies.c.start < edges[-1])
        with self._store.begin() as connection:
            if connection.execute(turn.returning(chores.c.until)).first() is None:
                return
            connection.execute(delete(tallies).where(*in_slots))
            for number, start in enumerate(edges[:-1]):
                rows = [
                    (kind, name, tally.as_json())
                    for kind, counts in found.items()
                    for (slot, name), tally in counts.items()
                    if slot == number
                ]
                if rows:
                    source = self._store.table_of(rows, "kind", "name", "counts")
                    columns = (literal(seconds), literal(start, tallies.c.start.type))
                    query = select(*columns, source.c.kind, source.c.name, source.c.counts)
                    connection.execute(
                        insert(tallies).from_select(["seconds", "start", "kind", "name", "counts"], query)
                    )


def floor(at: datetime, length: timedelta) -> datetime:
    """Return the start of the slot that the moment is in."""
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    return at - (at - epoch) % length
