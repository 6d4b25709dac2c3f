"""Counts of each worker's executions, for metrics. The history is pruned, but the counts only grow."""

from bisect import bisect_left
from datetime import datetime, timedelta
from functools import lru_cache

from sqlalchemy import TextClause, bindparam, text

from ..database.sessions import Executes
from ..database.tables import totals
from .claim import Claim

# Upper bounds, in seconds, of the histograms' buckets. The bucket after the last bound is "inf".
DURATIONS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0, 1800.0, 3600.0)
LATENESSES = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0)

Row = tuple[str, str, timedelta]


def add_execution(
    connection: Executes, claim: Claim, state: str, started_at: datetime | None, finished_at: datetime
) -> None:
    """Count one execution, which ended in `state`, in the transaction that ends it. `started_at` may be unknown.

    Only the first attempt at a scheduled tick counts towards the lateness.

    Concurrency: no other transaction counts for this worker, because this transaction holds the worker's row.
    """
    began = started_at or finished_at
    took, late = finished_at - began, began - claim.tick
    rows = [("state", state, took), ("duration", _bucket(DURATIONS, took), took)]
    if claim.trigger == "schedule" and claim.attempt == 1:
        rows.append(("lateness", _bucket(LATENESSES, late), late))
    _add(connection, claim.worker, rows, finished_at)


def add_not_run(connection: Executes, worker: str, state: str, at: datetime) -> None:
    """Count one row of skipped or missed ticks as one, however many ticks it stands for. Concurrency: as above."""
    _add(connection, worker, [("state", state, timedelta())], at)


def _bucket(bounds: tuple[float, ...], length: timedelta) -> str:
    at = bisect_left(bounds, length.total_seconds())
    return f"{bounds[at]:g}" if at < len(bounds) else "inf"


def _add(connection: Executes, worker: str, rows: list[Row], at: datetime) -> None:
    values: dict[str, object] = {"worker": worker, "at": at}
    for number, (kind, label, length) in enumerate(rows):
        seconds = max(length.total_seconds(), 0.0)
        values |= {f"kind{number}": kind, f"label{number}": label, f"seconds{number}": seconds}
    tables = connection.get_execution_options().get("schema_translate_map") or {}
    connection.execute(_statement(len(rows), tables.get(None)), values)


@lru_cache
def _statement(rows: int, schema: str | None) -> TextClause:
    """Build one INSERT for so many rows, as SQL text.

    PostgreSQL does not end an idle transaction whose last statement was an `executemany`. SQLAlchemy would compile an
    INSERT of several rows again for each call.
    """
    values = ", ".join(f"(:worker, :kind{row}, :label{row}, 1, :seconds{row}, :at)" for row in range(rows))
    place = '"' + schema.replace('"', '""').replace(":", "\\:") + '".' if schema else ""
    return text(
        f"INSERT INTO {place}background_totals AS background_totals "  # noqa: S608
        f"(worker, kind, label, count, seconds, latest_at) VALUES {values} "
        "ON CONFLICT (worker, kind, label) DO UPDATE SET count = background_totals.count + 1, "
        "seconds = background_totals.seconds + excluded.seconds, latest_at = excluded.latest_at"
    ).bindparams(bindparam("at", type_=totals.c.latest_at.type))
