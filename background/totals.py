"""What each worker has done, counted: history is pruned, and these only grow."""

from bisect import bisect_left
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from .models import totals

if TYPE_CHECKING:
    from .ledger import Claim

# Upper bounds, in seconds, of the histograms' buckets; behind the last one there is "inf".
DURATIONS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0, 1800.0, 3600.0)
LATENESSES = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0)


class Totals:
    """Adds to the counts of a worker, in the transaction of what is counted.

    Nobody else is there: all that do this hold the worker's row.
    """

    def __init__(self, insert: Callable[..., Any]) -> None:
        new = insert(totals)
        grown = {
            "count": totals.c.count + 1,
            "seconds": totals.c.seconds + new.excluded.seconds,
            "latest_at": new.excluded.latest_at,
        }
        keys = [column.name for column in totals.primary_key]
        self._add = new.on_conflict_do_update(index_elements=keys, set_=grown)

    def add(
        self, connection: Connection | Session, claim: "Claim", state: str, started_at: datetime, finished_at: datetime
    ) -> None:
        """One execution, which ended in `state`; how late it began is told of a scheduled tick's first attempt."""
        took, late = finished_at - started_at, started_at - claim.tick
        rows = [_row(claim.worker, "state", state, took, finished_at)]
        rows.append(_row(claim.worker, "duration", _bucket(DURATIONS, took), took, finished_at))
        if claim.trigger == "schedule" and claim.attempt == 1:
            rows.append(_row(claim.worker, "lateness", _bucket(LATENESSES, late), late, finished_at))
        connection.execute(self._add, rows)

    def add_not_run(self, connection: Connection, worker: str, state: str, at: datetime) -> None:
        """One row of ticks that were skipped or missed, however many it stands for."""
        connection.execute(self._add, [_row(worker, "state", state, timedelta(), at)])


def _row(worker: str, kind: str, label: str, length: timedelta, at: datetime) -> dict[str, Any]:
    seconds = max(length.total_seconds(), 0.0)
    return {"worker": worker, "kind": kind, "label": label, "count": 1, "seconds": seconds, "latest_at": at}


def _bucket(bounds: tuple[float, ...], length: timedelta) -> str:
    at = bisect_left(bounds, length.total_seconds())
    return f"{bounds[at]:g}" if at < len(bounds) else "inf"
