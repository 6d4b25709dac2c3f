"""Open transactions of the calling thread. A call that commits separately could wait for them for ever."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Engine, event
from sqlalchemy.exc import OperationalError

from ...errors import CommitFirst
from ...host.forks import ForkSafeLock
from .error_codes import is_lock_unavailable
from .sqlite import is_locked

_IN_TRANSACTION = 2  # of libpq's PQtransactionStatus
_REMEDY = "call db.session.commit() first, or in a run context.commit()"


class OpenTransactions:
    """Keeps which thread uses which connection of the application's engine."""

    def __init__(self, engine: Engine) -> None:
        self._on_sqlite = engine.dialect.name == "sqlite"
        self._threads: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._changing = ForkSafeLock()
        event.listen(engine, "checkout", self._checked_out)
        event.listen(engine, "checkin", self._checked_in)

    @contextmanager
    def refused(self, call: str, own: Engine, runs: bool = False) -> Iterator[None]:
        """Refuse `call`, which commits on the engine `own`, if this thread would wait for itself.

        With `runs`, the call runs a worker in another session. That session could wait for any row that this thread
        holds.
        """
        for driver in self._of_this_thread():
            if driver.in_transaction and is_locked(own) if self._on_sqlite else runs and _has_written(driver):
                raise CommitFirst(
                    f"{call} was called amid a transaction of the same thread that has written; expected no such "
                    f"transaction, as the call commits on its own and would wait for it: {_REMEDY}."
                )
        try:
            yield
        except OperationalError as error:
            if not is_lock_unavailable(error) or not any(map(_has_written, self._of_this_thread())):
                raise
            raise CommitFirst(
                f"{call} waited in vain for a row that an open transaction has locked, perhaps the caller's own; "
                f"expected a free row: {_REMEDY}, or try again when the other transaction has ended."
            ) from error

    def _of_this_thread(self) -> list[Any]:
        this = threading.get_ident()
        with self._changing:
            records = [record for record, thread in self._threads.items() if thread == this]
        return [record.driver_connection for record in records if record.dbapi_connection is not None]

    def _checked_out(self, _connection: Any, record: Any, _proxy: Any) -> None:
        with self._changing:
            self._threads[record] = threading.get_ident()

    def _checked_in(self, _connection: Any, record: Any) -> None:
        with self._changing:
            self._threads.pop(record, None)


def _has_written(driver: Any) -> bool:
    """Return whether a transaction of PostgreSQL has written, or locked, any row."""
    if driver.info.transaction_status != _IN_TRANSACTION:
        return False
    with driver.cursor() as cursor:
        cursor.execute("SELECT txid_current_if_assigned() IS NOT NULL")
        return bool(cursor.fetchone()[0])
