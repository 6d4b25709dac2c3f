"""A named lock for the user's own critical sections: one holder in the whole fleet, for as long as its lease lasts."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from uuid import uuid4

from sqlalchemy import Engine, Executable, Row, String, and_, bindparam, delete, func, null, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from ..database.clock import now, single_statements, steady
from ..database.connections import again_if_stale
from ..database.store import count
from ..database.tables import locks
from ..errors import InvalidLock, LockNotAcquired, first_line
from ..host.logs import logger_of
from .leases import LEASE_IS_OVER, Instance, Leases

log = logger_of(__name__)

_LONGEST_NAME = 200
_LONGEST_WAIT = 86_400
_FIRST_PAUSE, _LAST_PAUSE = 0.02, 0.25
_RETRY_SECONDS = 1.0
_MOST_SHOWN = 1_000
_FLOOR = ""  # not the name of a lock: this row keeps the greatest token of those that were pruned


@dataclass(frozen=True)
class Holding:
    """A lock, its holder's instance, and since when; for people to read."""

    name: str
    instance: str
    instance_name: str
    since: datetime


@dataclass(frozen=True)
class Lock:
    """A lock that its block holds."""

    name: str
    token: int
    """Greater than the token of the previous holder, so the guarded resource can refuse a smaller one.

    It repeats only if the database loses commits that it acknowledged.
    """
    _holder: str = field(repr=False)
    _instance: Instance = field(repr=False)
    _locks: "Locks" = field(repr=False)

    def still_held(self) -> bool:
        """Ask the database whether no other caller can have the lock yet. False once the lease is known to be over.

        Raises LockNotAcquired if the database does not answer.
        """
        if self._instance.pid != os.getpid():  # a fork: it is its parent's
            return False
        return self._instance.is_alive and self._locks.has(self) and self._instance.is_alive


class Locks:
    """The locks of one database. Each statement is a transaction of its own, so a frozen process holds no row.

    `present` gives the caller's instance. `waits` waits for so many seconds, and returns True if the caller must stop
    waiting.
    """

    def __init__(
        self,
        engine: Engine,
        instances: Leases,
        present: Callable[[], AbstractContextManager[Instance]],
        prefix: str,
        waits: Callable[[float], bool],
    ) -> None:
        self._engine, self._instances = single_statements(engine), instances
        self._present, self._prefix, self._waits = present, prefix, waits
        self._insert = sqlite.insert if engine.dialect.name == "sqlite" else postgresql.insert
        self._held_here: set[tuple[str, int, int]] = set()

    @contextmanager
    def hold(self, name: str, timeout: float) -> Iterator[Lock | None]:
        """Hold the lock `name`; None where others still do after `timeout` seconds. See `manager.lock`."""
        if _here(name) in self._held_here:
            log.warning(
                "Lock %r: this thread holds it already, and locks are not re-entrant: it is not given again", name
            )
            yield None
            return
        with ExitStack() as stack:
            try:
                instance = stack.enter_context(self._present())
                mine = Lock(name, 0, uuid4().hex, instance, self)
                lock = stack.enter_context(self._held(mine, timeout))
            except SQLAlchemyError as error:
                raise _unknown(name, error) from error
            yield lock

    def has(self, lock: Lock) -> bool:
        """Return whether the lock is still this holder's."""
        try:
            return bool(self._all(_HELD, self._mine(lock)))
        except SQLAlchemyError as error:
            raise _unknown(lock.name, error) from error

    def held(self) -> list[Holding]:
        """Return all held locks, including those of dead instances, which the next caller may take over."""
        return [
            Holding(row.name.removeprefix(self._prefix), row.instance, row.instance_name, row.since)
            for row in self._all(_ALL_HELD)
        ]

    def prune(self, before: datetime, most: int) -> int:
        """Delete `most` of the locks that no caller has held since `before`. Return how many there were.

        The floor is raised first, so that a lock of the same name begins above it.

        Concurrency: a caller that acquires a lock meanwhile moves its `since`, and the lock stays.
        """
        old = and_(locks.c.name != _FLOOR, locks.c.since < before)
        holders = self._all(select(locks.c.instance).distinct().where(old, locks.c.holder.is_not(None)))
        gone = self._instances.gone({row.instance for row in holders})
        idle = and_(old, or_(locks.c.holder.is_(None), locks.c.instance.in_(gone)))
        highest = select(func.coalesce(func.max(locks.c.token), 0)).where(idle).scalar_subquery()
        floor = self._insert(locks).values(name=_FLOOR, token=highest, since=now())
        raised, is_higher = {"token": floor.excluded.token}, locks.c.token < floor.excluded.token
        self._run(floor.on_conflict_do_update(index_elements=["name"], set_=raised, where=is_higher))
        some = select(locks.c.name).where(idle).limit(most)
        return self._run(delete(locks).where(idle, locks.c.token <= _FLOOR_TOKEN, locks.c.name.in_(some)))

    # -- acquiring -----------------------------------------------------------------------------

    @contextmanager
    def _held(self, mine: Lock, timeout: float) -> Iterator[Lock | None]:
        lock = self._wait(mine, timeout)
        if lock is None:
            yield None
            return
        here = _here(lock.name)
        self._held_here.add(here)
        try:
            if not lock._instance.is_alive:
                raise _unknown(lock.name, LEASE_IS_OVER)
            yield lock
        finally:
            self._held_here.discard(here)
            if lock._instance.pid == os.getpid():  # else this is a fork that leaves its parent's block
                self._release(lock)

    def _wait(self, mine: Lock, timeout: float) -> Lock | None:
        until, pause = steady() + timeout, _FIRST_PAUSE
        while (lock := self._try(mine)) is None:
            left = until - steady()
            if left <= 0 or self._waits(min(pause, left)):
                break
            pause = min(pause * 1.5, _LAST_PAUSE)
        return lock

    def _try(self, mine: Lock) -> Lock | None:
        """Return None only if a live instance holds the lock. After losing a race, look again."""
        while True:
            seen = self._look(mine.name)
            if seen is None:
                self._make(mine.name)
            elif self._is_taken(mine.name, seen):
                return None
            elif token := self._take(mine, seen):
                return replace(mine, token=token)

    def _look(self, name: str) -> Row[Any] | None:
        return next(iter(self._all(_SEEN, {"of": self._prefix + name})), None)

    def _is_taken(self, name: str, seen: Row[Any]) -> bool:
        if seen.holder is None:
            return False
        gone = self._instances.gone({seen.instance})
        if not gone:
            log.debug("Lock %r: %s has held it since %s", name, seen.instance_name, seen.since.isoformat())
        elif not gone[seen.instance]:
            ending = self._instances.ending(seen.instance)
            log.warning("Lock %r: %s held it and %s", name, seen.instance_name, ending)
        return not gone

    def _make(self, name: str) -> None:
        """Make a free row, if there is none yet. Concurrency: one of the callers makes it.

        Its first token is set when it is taken, by a statement that sees the deletion of the row before.
        """
        row = self._insert(locks).values(name=self._prefix + name, token=0, since=now())
        self._run(row.on_conflict_do_nothing())

    def _take(self, mine: Lock, seen: Row[Any]) -> int | None:
        """Return the new token, or None.

        Concurrency: every caller that saw the lock free, or its holder gone, in the row `seen`. That holder may release
        it, too. The row's lock puts them in order: the first raises the token, and the others find it raised. After
        lost commits another holder may have the same token, so the holder must be the same, too.
        """
        instance, values = mine._instance, self._mine(mine) | {"seen": seen.token, "seen_by": seen.holder}
        try:
            with self._engine.begin() as connection:
                acquiring = values | {"its_id": instance.id, "its_name": instance.name}
                return connection.execute(_TAKEN, acquiring).scalar_one_or_none()
        except BaseException:  # it may be ours all the same, or become ours: perhaps only the reply got lost
            self._later(instance, _CALLED_OFF, values)
            raise

    # -- releasing -----------------------------------------------------------------------------

    def _release(self, lock: Lock) -> None:
        """Release the lock.

        Concurrency: when the lease was over, another holder may have taken it. The lock stays with that holder.
        """
        try:
            self._run(_RELEASED, self._mine(lock))
        except BaseException as error:
            self._later(lock._instance, _RELEASED, self._mine(lock))
            if not isinstance(error, SQLAlchemyError):
                raise
            log.warning("Lock %r: could not release it yet: %s", lock.name, first_line(error))

    def _later(self, *statement: Any) -> None:
        threading.Thread(target=self._keep_trying, args=statement, name="workers-lock", daemon=True).start()

    def _keep_trying(self, instance: Instance, statement: Executable, values: dict[str, Any]) -> None:
        """Until the database answers; when the instance is gone, it holds no lock anyway."""
        while instance.is_alive:
            with suppress(SQLAlchemyError):
                self._run(statement, values)
                break
            time.sleep(_RETRY_SECONDS)

    # -- helpers -------------------------------------------------------------------------------

    def check(self, name: object, timeout: object) -> None:
        """Raise InvalidLock for what `hold` cannot take."""
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise InvalidLock(
                f"{name!r} cannot be the name of a lock; expected a text of printable characters: "
                'name it after what it guards, as in "invoice-42".'
            )
        if len(self._prefix + name) > _LONGEST_NAME:
            raise InvalidLock(
                f"The name of the lock {name!r} has {len(name)} characters; expected at most "
                f"{_LONGEST_NAME - len(self._prefix)}: shorten it, or give a hash of it."
            )
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 <= timeout <= _LONGEST_WAIT:
            raise InvalidLock(
                f"The lock {name!r} was given the timeout {timeout!r}; expected a number of seconds "
                f"from 0 to {_LONGEST_WAIT}: leave it out, not to wait at all."
            )

    def _mine(self, lock: Lock) -> dict[str, Any]:
        return {"of": self._prefix + lock.name, "by": lock._holder}

    def _all(self, query: Executable, values: dict[str, Any] | None = None) -> list[Row[Any]]:
        return again_if_stale(lambda: self._rows(query, values))

    def _rows(self, query: Executable, values: dict[str, Any] | None) -> list[Row[Any]]:
        with self._engine.connect() as connection:
            return list(connection.execute(query, values))

    def _run(self, statement: Executable, values: dict[str, Any] | None = None) -> int:
        """How many rows a statement changed that does no harm if it runs twice."""
        return again_if_stale(lambda: self._changed(statement, values))

    def _changed(self, statement: Executable, values: dict[str, Any] | None) -> int:
        with self._engine.begin() as connection:
            return count(connection.execute(statement, values))


_floor = locks.alias("floor")
_FLOOR_TOKEN = select(_floor.c.token).where(_floor.c.name == _FLOOR).scalar_subquery()
_of_name, _by_holder = locks.c.name == bindparam("of"), locks.c.holder == bindparam("by")
_at_seen = and_(
    locks.c.token == bindparam("seen"),
    locks.c.holder.is_not_distinct_from(bindparam("seen_by", type_=String())),
)
_SEEN = select(locks).where(_of_name)
_HELD = select(locks.c.token).where(_of_name, _by_holder)
_ALL_HELD = select(locks).where(locks.c.holder.is_not(None)).order_by(locks.c.name).limit(_MOST_SHOWN)
_TAKEN = (
    update(locks)
    .where(_of_name, _at_seen)
    .values(
        token=func.coalesce(func.nullif(locks.c.token, 0), _FLOOR_TOKEN, 0) + 1,
        holder=bindparam("by"),
        instance=bindparam("its_id"),
        instance_name=bindparam("its_name"),
        since=now(),
    )
    .returning(locks.c.token)
)
_free = {"holder": null(), "instance": null(), "instance_name": null(), "since": now()}
_RELEASED = update(locks).where(_of_name, _by_holder).values(_free)
# Where the acquisition is still on its way, it finds the token raised when it arrives.
_CALLED_OFF = update(locks).where(_of_name, or_(_by_holder, _at_seen)).values(_free | {"token": locks.c.token + 1})


def _here(name: str) -> tuple[str, int, int]:
    return name, os.getpid(), threading.get_ident()


def _unknown(name: str, why: SQLAlchemyError | str) -> LockNotAcquired:
    reason = why if isinstance(why, str) else first_line(why)
    return LockNotAcquired(
        f"Who holds the lock {name!r} could not be found out: {reason}. "
        "Expected a database that answers: do nothing that needs the lock, and try again later."
    )
