"""The database's clock, which decides, and this host's steady clock, which no user can set."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    DateTime,
    Engine,
    Float,
    String,
    TypeDecorator,
    case,
    func,
    literal,
    select,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import FunctionElement

from ..host.logs import logger_of
from .dialects.writes import COMMITS_ITSELF

log = logger_of(__name__)

_HIGHEST_BIT = 2**40  # of an id


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC `datetime`: timestamptz on PostgreSQL, sortable text with microseconds on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        return dialect.type_descriptor(String(26) if dialect.name == "sqlite" else DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        if not isinstance(value, datetime) or value.tzinfo is None:
            raise ValueError(
                f"{value!r} has no time zone; expected an aware datetime: write datetime.now(UTC) or add tzinfo=UTC."
            )
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None).isoformat(" ", "microseconds") if dialect.name == "sqlite" else value

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], datetime | None] | None:
        # Not `process_result_value`, which takes twice as long. A page reads thousands of moments.
        if getattr(dialect, "reads_utc", False):  # the driver returns UTC
            return None
        return _from_text if dialect.name == "sqlite" else _in_utc


@lru_cache(maxsize=4096)  # the rows of a page repeat the same few moments
def _from_text(value: str | None) -> datetime | None:
    if value is None:
        return None
    try:
        found = datetime.fromisoformat(f"{value}+00:00")
    except ValueError:
        return _typed(value)
    return found if found.tzinfo else _typed(value)


@lru_cache(maxsize=1024)  # the warning appears once
def _typed(value: str) -> datetime:
    """Return a moment that a user typed in another form, such as 2026-11-30 or 2026-11-30T07:00:00Z.

    An error here would end each page and each tick. So an unreadable text counts as 1970.
    """
    try:
        found = datetime.fromisoformat(value)
        return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    except (TypeError, ValueError, OverflowError):
        log.warning(
            "The database has the moment %.50r; expected a text such as '2026-11-30 07:00:00.000000'. It counts as "
            "1970 until the row is corrected",
            value,
        )
        return datetime(1970, 1, 1, tzinfo=UTC)


def _in_utc(value: datetime | None) -> datetime | None:
    return value if value is None or value.tzinfo is UTC else value.astimezone(UTC)


class _Now(FunctionElement[datetime]):
    name = "now"
    type = UtcDateTime()
    inherit_cache = True


def now(ahead: timedelta | ColumnElement[float] | None = None) -> ColumnElement[datetime]:
    """Return the database's time when the statement runs, plus `ahead`. It is never the transaction's frozen time.

    `ahead` is a timedelta or an expression in seconds. SQLite reads the host's clock and cuts it to the millisecond, so
    its time is never ahead of the host's.
    """
    if isinstance(ahead, timedelta):
        ahead = literal(ahead.total_seconds(), Float) if ahead else None
    return _Now() if ahead is None else _Now(ahead)


_ON_POSTGRESQL = "clock_timestamp()"
_ON_SQLITE = "strftime('%Y-%m-%d %H:%M:%f000', 'now'"  # and modifiers


@compiles(_Now, "postgresql")
def _postgresql(element: _Now, compiler: SQLCompiler, **kwargs: Any) -> str:
    if not len(element.clauses):
        return _ON_POSTGRESQL
    return f"({_ON_POSTGRESQL} + make_interval(secs => {compiler.process(element.clauses, **kwargs)}))"


@compiles(_Now, "sqlite")
def _sqlite(element: _Now, compiler: SQLCompiler, **kwargs: Any) -> str:
    if not len(element.clauses):
        return f"{_ON_SQLITE})"
    seconds = compiler.process(element.clauses, **kwargs)
    return f"{_ON_SQLITE}, printf('%+.3f seconds', {seconds}))"


clocks_of_tests: list[Any] = []
"""The clocks of tests that are in force, the innermost last. With a clock, each statement has a time in its text."""


def with_time(statement: str, at: datetime, dialect: str) -> str:
    """Return the statement with the moment `at` in the place of the database's clock. Tests use it."""
    if dialect == "sqlite":
        moment = at.replace(tzinfo=None).isoformat(" ", "milliseconds")
        return statement.replace(_ON_SQLITE, _ON_SQLITE.replace("now", moment))
    return statement.replace(_ON_POSTGRESQL, f"CAST('{at.isoformat()}' AS timestamptz)")


class elapsed(FunctionElement[float]):
    """The seconds from one moment in the database to a later moment. NULL if a user typed one that is unreadable."""

    name = "elapsed"
    type = Float()
    inherit_cache = True


@compiles(elapsed, "postgresql")
def _elapsed_on_postgresql(element: elapsed, compiler: SQLCompiler, **kwargs: Any) -> str:
    since, until = (compiler.process(each, **kwargs) for each in element.clauses)
    # PostgreSQL before version 17 cannot subtract 'infinity'. In later versions the difference is infinite, too.
    length = f"CAST(extract(epoch FROM {until} - {since}) AS float)"
    return f"CASE WHEN isfinite({since}) AND isfinite({until}) THEN {length} END"


@compiles(elapsed, "sqlite")
def _elapsed_on_sqlite(element: elapsed, compiler: SQLCompiler, **kwargs: Any) -> str:
    since, until = (compiler.process(each, **kwargs) for each in element.clauses)
    return f"round((julianday({until}) - julianday({since})) * 86400, 3)"


def last_until(moment: ColumnElement[datetime], at: datetime | ColumnElement[datetime]) -> ColumnElement[int]:
    """Select the greatest id of the rows whose `moment` is at most `at`. The table needs no index on `moment`.

    Ids grow with this moment. So a binary search on the primary key finds the id quickly among any number of rows.
    """
    id: ColumnElement[int] = moment.table.c.id
    step = select(literal(0, BigInteger).label("place"), literal(_HIGHEST_BIT, BigInteger).label("bit"))
    search = step.cte("search", recursive=True)
    ahead = search.c.place + search.c.bit
    first = select(moment).where(id >= ahead, moment.is_not(None)).order_by(id).limit(1)
    place = case((first.correlate(search).scalar_subquery() <= at, ahead), else_=search.c.place)
    search = search.union_all(select(place, search.c.bit // 2).where(search.c.bit > 0))
    return select(func.max(search.c.place)).scalar_subquery()


LONGEST_BACKOFF, SPREAD = timedelta(hours=1), 0.25
LONGEST_PAUSE = LONGEST_BACKOFF * (1 + SPREAD)
"""The longest pause before another attempt at a message or a failed tick."""

AHEAD = timedelta(seconds=1)
"""The longest lead of a stored moment over the clock that counts as normal.

A moment further ahead was written while the clock was wrong. A smaller error of the clock delays nothing for long.
"""


def steady() -> float:
    """Return the seconds on a clock that no user can set. On Linux it also counts the time that the host slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def single_statements(engine: Engine) -> Engine:
    """Return `engine` for transactions of one statement. On PostgreSQL that saves the BEGIN and the ROLLBACK.

    SQLite's driver sends neither of them for a read. A write that begins with WITH commits itself there.
    """
    is_sqlite = engine.dialect.name == "sqlite"
    return engine.execution_options(**({COMMITS_ITSELF: True} if is_sqlite else {"isolation_level": "AUTOCOMMIT"}))
