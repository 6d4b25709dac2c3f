"""Claims on PostgreSQL: limits, look, lock, claim and the execution's row, in one request."""

from typing import Any

from sqlalchemy import ColumnElement, select

from ..database.dialects.one_request import OneRequest
from ..database.sessions import Executes
from ..database.store import Store
from ..database.tables import workers
from .claim import Claim, NotClaimed
from .statements import CLAIM_PENDING_AND_START, LOOK_AND_CLAIM, WAIT, Values, claim_of, why_not


class ClaimsOnPostgreSQL:
    """Sends each claim as one request. The store's limits are set in it, for its transaction alone."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tick = OneRequest("claim_tick", store.engine, select(WAIT, *store.limits), LOOK_AND_CLAIM)
        self._pending = OneRequest("claim_pending", store.engine, select(*store.limits), CLAIM_PENDING_AND_START)

    def tick(self, values: Values) -> Claim | NotClaimed:
        """Claim a tick that may be claimed."""
        row = self._send(self._tick, values)
        return why_not(row) if row is None or row[-1] is None else claim_of(values, row[1:])

    def pending(self, values: Values) -> Claim | None:
        """Claim a tick that must run again."""
        row = self._send(self._pending, values)
        return claim_of(values, row) if row else None

    def lock(self, session: Executes, which: ColumnElement[bool]) -> bool:
        """Lock the worker's row until the end of the session's transaction. False if no row is `which`."""
        row = select(workers.c.token, *self._store.idle).where(which).with_for_update(read=True)
        return session.execute(row).first() is not None

    def _send(self, request: OneRequest, values: Values) -> Any:
        with self._store.single.begin() as connection:
            return request.row(connection, values)
