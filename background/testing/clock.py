"""The clock of a test, in the place of the database's clock."""

from datetime import MAXYEAR, MINYEAR, UTC, datetime, timedelta
from types import TracebackType
from typing import Any

from sqlalchemy import Connection, Engine, event

from ..database.clock import clocks_of_tests, with_time


class Clock:
    """A clock that stands still until the test moves it.

    In the clock's `with` block, every SQLAlchemy engine of this process reads this clock instead of the database's. The
    steady clock of the leases goes on. Your own code reads the host's clock unless it uses `context.tick`.
    """

    def __init__(self, at: datetime | None = None) -> None:
        self.now = _aware(at) if at is not None else datetime.now(UTC).replace(microsecond=0)
        """The time of the clock (aware, UTC)."""

    def set(self, at: datetime) -> None:
        """Set the clock to `at` (aware), in the past or the future."""
        self.now = _aware(at)

    def move(self, by: timedelta) -> None:
        """Move the clock ahead by `by`."""
        if not isinstance(by, timedelta):
            raise TypeError(f"The clock was moved by {by!r}; expected a timedelta: write timedelta(hours=1).")
        self.set(self.now + by)

    def __enter__(self) -> "Clock":
        clocks_of_tests.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        last = max(at for at, each in enumerate(clocks_of_tests) if each is self)  # a block may enter its clock again
        del clocks_of_tests[last]


@event.listens_for(Engine, "before_cursor_execute", retval=True)
def _at_the_time_of_the_clock(
    connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
) -> tuple[str, Any]:
    """Put the clock's time into the statement.

    Concurrency: other threads send statements while a block begins or ends. So this listener is never removed.
    """
    for clock in clocks_of_tests[-1:]:
        statement = with_time(statement, clock.now, connection.dialect.name)
    return statement, parameters


def _aware(at: datetime) -> datetime:
    if not isinstance(at, datetime) or at.tzinfo is None:
        raise ValueError(f"The clock was set to {at!r}; expected an aware datetime: write datetime(..., tzinfo=UTC).")
    if not MINYEAR < at.year < MAXYEAR:
        raise ValueError(f"The clock was set to {at}; expected a year from {MINYEAR + 1} to {MAXYEAR - 1}.")
    return at.astimezone(UTC)
