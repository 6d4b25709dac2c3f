"""Counts runs and messages from their rows, by the time at which they ended. One statement for each kind of row."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Float,
    Integer,
    Select,
    and_,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    null,
    select,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import FunctionElement

from ..database.clock import UtcDateTime, elapsed, last_until
from ..database.store import Store
from ..database.tables import LARGEST_ID, executions, message_errors, messages, workers
from .tally import BOUNDS, Lengths, Tally

EACH = "each name"
ALL = ""
"""The name of the sum over all workers, or over all topics."""
_DISORDER = timedelta(minutes=1)  # ids of transactions that overlap are not quite in the order of time
_NO_LENGTH = cast(null(), Float)
_written_from = bindparam("written_from", type_=UtcDateTime())

Tallies = dict[tuple[int, str], Tally]
"""Tallies by the number of the slot and the name."""


def count_runs(store: Store, edges: Sequence[datetime], name: str = EACH, most: int | None = None) -> Tallies:
    """Count the runs that ended between the first and the last of `edges`. Each slot reaches from an edge to the next.

    `name` is a worker, ALL for the sum over all workers, or EACH for each worker and the sum. Reads at most the oldest
    `most` runs.
    """
    return _counted([_runs], store, edges, name, most)


def count_messages(store: Store, edges: Sequence[datetime], name: str = EACH, most: int | None = None) -> Tallies:
    """Count the messages that were enqueued or ended, and their failed attempts. Arguments are as in `count_runs`."""
    return _counted([_ended, _enqueued, _failed], store, edges, name, most)


def _counted(parts: Iterable[Any], store: Store, edges: Sequence[datetime], name: str, most: int | None) -> Tallies:
    found: Tallies = defaultdict(Tally)
    values: dict[str, Any] = {f"edge{number}": edge for number, edge in enumerate(edges)}
    values |= {"of": name, "written_from": edges[0] - _DISORDER}
    for part in parts:
        for row in store.read(_grouped(part, len(edges) - 1, name if name in (ALL, EACH) else "one", most), values):
            more = Tally(
                Counter({row.state: row.number}),
                _lengths(row.took_bin, row.number, row.longest),
                _lengths(row.late_bin, row.number, row.latest),
            )
            for each in {row.name, ALL} if name == EACH else {name}:
                found[row.slot, each].add(more)
    return found


def _lengths(place: int | None, number: int, longest: float | None) -> Lengths:
    if place is None or longest is None:
        return Lengths()
    return Lengths(Counter({place: number}), max(longest, 0.0))  # a clock may be set back


@lru_cache
def _grouped(part: Any, slots: int, which: str, most: int | None) -> Select[Any]:
    """Group the rows of `part` by slot, name, state and bins. The OFFSET has the database compute each length once."""
    rows = part(slots) if most is None else part(slots).order_by(literal_column("place")).limit(most)
    each = rows.offset(0).subquery("each")
    columns = [
        each.c.slot,
        each.c.name if which == EACH else literal_column("''").label("name"),
        each.c.state,
        _Bin(each.c.took).label("took_bin"),
        _Bin(each.c.late).label("late_bin"),
    ]
    lengths = func.max(each.c.took).label("longest"), func.max(each.c.late).label("latest")
    query = select(*columns, func.count().label("number"), *lengths)
    if which == "one":
        query = query.where(each.c.name == bindparam("of"))
    return query.group_by(*(literal_column(str(place)) for place in range(1, len(columns) + 1)))


class _Bin(FunctionElement[int]):
    """The number of BOUNDS up to a length in seconds. NULL if the length is NULL."""

    type = Integer()
    inherit_cache = True


@compiles(_Bin, "postgresql")
def _bin_on_postgresql(element: _Bin, compiler: SQLCompiler, **kwargs: Any) -> str:
    length = compiler.process(element.clauses, **kwargs)
    return f"width_bucket({length}, CAST('{{{','.join(map(repr, BOUNDS))}}}' AS double precision[]))"


@compiles(_Bin, "sqlite")
def _bin_on_sqlite(element: _Bin, compiler: SQLCompiler, **kwargs: Any) -> str:
    length = compiler.process(element.clauses, **kwargs)
    return f"CASE WHEN {length} IS NOT NULL THEN {_search(length, 0, len(BOUNDS))} END"


def _search(length: str, first: int, last: int) -> str:
    """Return SQL for the number of BOUNDS up to the length, which is between `first` and `last`."""
    if first == last:
        return str(first)
    middle = (first + last) // 2
    below, above = _search(length, first, middle), _search(length, middle + 1, last)
    return f"CASE WHEN {length} < {BOUNDS[middle]!r} THEN {below} ELSE {above} END"


# -- the rows: each with its slot, name, state and lengths ---------------------------------------


# With `run_on_first_start`, a worker's first run has a tick from before the worker was known. This run is not late.
_known_at = select(workers.c.scheduled_at).where(workers.c.name == executions.c.worker).scalar_subquery()
_is_first_start = and_(executions.c.token == literal_column("1"), executions.c.tick < _known_at)


def _runs(slots: int) -> Select[Any]:
    runs = executions.c
    is_first = and_(runs.trigger == literal_column("'schedule'"), runs.attempt == literal_column("1"))
    return _rows(
        slots,
        runs.finished_at,
        runs.worker,
        runs.state,
        elapsed(runs.started_at, runs.finished_at),
        case((_is_first_start, _NO_LENGTH), (is_first, elapsed(runs.tick, runs.started_at))),
    ).where(runs.started_at.is_not(None))


def _ended(slots: int) -> Select[Any]:
    is_done = messages.c.state == literal_column("'done'")
    took = case((is_done, elapsed(messages.c.due_at, messages.c.finished_at)))
    return _rows(slots, messages.c.finished_at, messages.c.topic, messages.c.state, took)


def _enqueued(slots: int) -> Select[Any]:
    rows = _rows(slots, messages.c.enqueued_at, messages.c.topic, literal_column("'enqueued'"), place=messages.c.id)
    return rows.where(_is_later(messages.c.id, messages.c.enqueued_at))


def _failed(slots: int) -> Select[Any]:
    rows = _rows(slots, message_errors.c.at, messages.c.topic, literal_column("'failed'"), place=message_errors.c.id)
    rows = rows.join_from(message_errors, messages, messages.c.id == message_errors.c.message)
    return rows.where(_is_later(message_errors.c.id, message_errors.c.at))


def _is_later(id: ColumnElement[int], at: ColumnElement[datetime]) -> ColumnElement[bool]:
    """Return whether a row's id is of the counted time. Without the upper end, PostgreSQL starts parallel workers."""
    return and_(id > last_until(at, _written_from), id <= LARGEST_ID)


def _rows(
    slots: int, at: Any, name: Any, state: Any, took: Any = _NO_LENGTH, late: Any = _NO_LENGTH, place: Any = None
) -> Select[Any]:
    """Select the rows of one kind. `place` is their order, from the oldest: by default the moment `at`."""
    edges = [_edge(number) for number in range(slots + 1)]
    # As text: a number as parameter would make each slot's number a parameter, too.
    before: list[Any] = [(at < edge, literal_column(str(number))) for number, edge in enumerate(edges[1:-1])]
    last: ColumnElement[int] = literal_column(str(slots - 1))
    slot: ColumnElement[int] = case(*before, else_=last) if before else last
    columns = {
        "slot": slot,
        "name": name,
        "state": state,
        "took": took,
        "late": late,
        "place": at if place is None else place,
    }
    return select(*(each.label(name) for name, each in columns.items())).where(at >= edges[0], at < edges[-1])


def _edge(number: int) -> ColumnElement[datetime]:
    return bindparam(f"edge{number}", type_=UtcDateTime())
