"""Claims on SQLite: a look and a conditional write, in one transaction."""

from sqlalchemy import ColumnElement, update

from ..database.dialects.sqlite import lock_soon
from ..database.sessions import Executes
from ..database.store import Store, count
from ..database.tables import workers
from .claim import BLOCKED, Claim, NotClaimed
from .statements import CLAIM, CLAIM_PENDING, LOOK, Values, start, why_not


class ClaimsOnSQLite:
    """Takes SQLite's single write lock first. After the wait, one read shows whether the tick is still open.

    If another connection keeps the lock for long, the read comes first. A claim's write waits for the lock then.
    """

    def __init__(self, store: Store) -> None:
        self._engine = store.engine

    def tick(self, values: Values) -> Claim | NotClaimed:
        """Claim a tick that may be claimed."""
        with self._engine.begin() as connection:
            lock_soon(connection)
            seen = connection.execute(LOOK, values).one_or_none()
            if seen is None or not seen.is_claimable:
                return why_not(seen)
            token = connection.execute(CLAIM, values).scalar_one_or_none()
            # None: another instance claimed the tick while this call waited longer for the lock.
            return BLOCKED if token is None else start(connection, values, token, 1, "schedule")

    def pending(self, values: Values) -> Claim | None:
        """Claim a tick that must run again."""
        with self._engine.begin() as connection:
            row = connection.execute(CLAIM_PENDING, values).one_or_none()
            return start(connection, values, *row) if row else None

    def lock(self, session: Executes, which: ColumnElement[bool]) -> bool:
        """Lock the database until the end of the session's transaction. False if no worker's row is `which`."""
        # SQLite has no locks of rows: a write takes the only lock.
        return count(session.execute(update(workers).where(which).values(running=workers.c.running))) == 1
