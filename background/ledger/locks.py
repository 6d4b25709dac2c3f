"""Named locks for the user's own critical sections: one holder in the whole fleet, for as long as its lease lasts."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Any
from uuid import uuid4

from sqlalchemy import Engine, Executable, Row, String, and_, bindparam, delete, func, null, or_, select, update
from sqlalchemy.exc import SQLAlchemyError

from ..database.clock import now, steady
from ..database.connections import again_if_stale
from ..database.store import Statements
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
_FLOOR = ""  # not the name of a lock: this row keeps the greatest token of all pruned rows


@dataclass(frozen=True)
class Holding:
    """A held lock for people to read: its holder's instance, and since when the lock is held."""

    name: str
    instance: str
    instance_name: str
    since: datetime


@dataclass(frozen=True)
class Lock:
    """A lock that the caller's `with` block holds."""

    name: str
    token: int
    """Greater than the token of the previous holder, so the guarded resource can refuse a smaller one.

    It repeats only if the database loses commits that it acknowledged.
    """
    _holder: str = field(repr=False)
    _instance: Instance = field(repr=False)
    _locks: "Locks" = field(repr=False)

    def still_held(self) -> bool:
        """Ask the database whether this block still holds the lock. False once the lease is over.

        Raises LockNotAcquired if the database does not answer.
        """
        if self._instance.pid != os.getpid():  # in a forked child: its parent holds the lock
            return False
        return self._instance.is_alive and self._locks.has(self) and self._instance.is_alive


class Locks(Statements):
    """The locks of one database. Each statement is a transaction of its own, so a frozen process holds no row.

    `present` gives the caller's instance. `waits` waits for a number of seconds. It returns True if the caller must
    stop waiting.
    """

    def __init__(
        self,
        engine: Engine,
        instances: Leases,
        present: Callable[[], AbstractContextManager[Instance]],
        prefix: str,
        waits: Callable[[float], bool],
    ) -> None:
        super().__init__(engine)
        self._instances, self._present, self._prefix, self._waits = instances, present, prefix, waits
        self._held_here: set[tuple[str, int, int]] = set()

    @contextmanager
    def hold(self, name: str, timeout: float) -> Iterator[Lock | None]:
        """Hold the lock `name`. Yields None if another caller keeps it for `timeout` seconds."""
        if _of_this_thread(name) in self._held_here:
            log.warning(
                "Lock %r: this thread holds it already, and locks are not re-entrant. The inner block gets None", name
            )
            yield None
            return
        with ExitStack() as stack:
            try:
                instance = stack.enter_context(self._present())
                wanted = Lock(name, 0, uuid4().hex, instance, self)
                lock = stack.enter_context(self._acquired(wanted, timeout))
            except SQLAlchemyError as error:
                raise _unknown(name, error) from error
            yield lock

    def has(self, lock: Lock) -> bool:
        """Return whether the database still names the holder of `lock`."""
        try:
            return bool(self._all(_HELD, self._owner(lock)))
        except SQLAlchemyError as error:
            raise _unknown(lock.name, error) from error

    def held(self) -> list[Holding]:
        """Return all held locks, including those of dead instances, which the next caller may take over."""
        return [
            Holding(row.name.removeprefix(self._prefix), row.instance, row.instance_name, row.since)
            for row in self._all(_ALL_HELD)
        ]

    def prune(self, before: datetime, most: int) -> int:
        """Delete at most `most` locks that no caller has held since `before`. Return their number.

        The floor rises first, so that the next lock of the same name gets a greater token.

        Concurrency: a caller may acquire such a lock meanwhile. That moves its `since`, so its row stays.
        """
        old = and_(locks.c.name != _FLOOR, locks.c.since < before)
        holders = self._all(select(locks.c.instance).distinct().where(old, locks.c.holder.is_not(None)))
        gone = self._instances.gone({row.instance for row in holders})
        idle = and_(old, or_(locks.c.holder.is_(None), locks.c.instance.in_(gone)))
        highest = select(func.coalesce(func.max(locks.c.token), 0)).where(idle).scalar_subquery()
        floor = self.insert(locks).values(name=_FLOOR, token=highest, since=now())
        raised, is_higher = {"token": floor.excluded.token}, locks.c.token < floor.excluded.token
        self._run(floor.on_conflict_do_update(index_elements=["name"], set_=raised, where=is_higher))
        some = select(locks.c.name).where(idle).limit(most)
        return self._run(delete(locks).where(idle, locks.c.token <= _FLOOR_TOKEN, locks.c.name.in_(some)))

    # -- acquiring -----------------------------------------------------------------------------

    @contextmanager
    def _acquired(self, wanted: Lock, timeout: float) -> Iterator[Lock | None]:
        lock = self._wait(wanted, timeout)
        if lock is None:
            yield None
            return
        key = _of_this_thread(lock.name)
        self._held_here.add(key)
        try:
            if not lock._instance.is_alive:
                raise _unknown(lock.name, LEASE_IS_OVER)
            yield lock
        finally:
            self._held_here.discard(key)
            if lock._instance.pid == os.getpid():  # otherwise a forked child leaves its parent's block
                self._release(lock)

    def _wait(self, wanted: Lock, timeout: float) -> Lock | None:
        until, pause = steady() + timeout, _FIRST_PAUSE
        while (lock := self._try(wanted)) is None:
            left = until - steady()
            if left <= 0 or self._waits(min(pause, left)):
                break
            pause = min(pause * 1.5, _LAST_PAUSE)
        return lock

    def _try(self, wanted: Lock) -> Lock | None:
        """Return None only if a live instance holds the lock. After losing a race, look again."""
        while True:
            seen = self._look(wanted.name)
            if seen is None:
                self._insert_row(wanted.name)
            elif self._is_taken(wanted.name, seen):
                return None
            elif token := self._take(wanted, seen):
                return replace(wanted, token=token)

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

    def _insert_row(self, name: str) -> None:
        """Insert a free row if the lock has no row yet.

        The row gets its first token when a caller takes the lock. That statement reads the floor, which pruning has
        raised before it deleted an earlier row.

        Concurrency: every caller may do this, and the first inserts the row.
        """
        row = self.insert(locks).values(name=self._prefix + name, token=0, since=now())
        self._run(row.on_conflict_do_nothing())

    def _take(self, wanted: Lock, seen: Row[Any]) -> int | None:
        """Return the new token, or None if another caller was first.

        Concurrency: every caller that read the row `seen`, with no holder or a dead one, may do this. So may that
        holder, which releases the lock. The row's lock orders them. The first raises the token, and each other one
        finds it raised. After lost commits another holder may have the same token, so the holder is compared too.
        """
        instance, values = wanted._instance, self._owner(wanted) | {"seen": seen.token, "seen_by": seen.holder}
        try:
            with self.single.begin() as connection:
                acquiring = values | {"its_id": instance.id, "its_name": instance.name}
                return connection.execute(_TAKEN, acquiring).scalar_one_or_none()
        except BaseException:  # the UPDATE may still have succeeded, or may succeed later: only its reply is missing
            self._in_background(instance, _CALLED_OFF, values)
            raise

    # -- releasing -----------------------------------------------------------------------------

    def _release(self, lock: Lock) -> None:
        """Release the lock.

        Concurrency: if the lease was over, another caller may have taken the lock. That caller keeps it.
        """
        try:
            self._run(_RELEASED, self._owner(lock))
        except BaseException as error:
            self._in_background(lock._instance, _RELEASED, self._owner(lock))
            if not isinstance(error, SQLAlchemyError):
                raise
            log.warning("Lock %r could not be released yet: %s", lock.name, first_line(error))

    def _in_background(self, *statement: Any) -> None:
        threading.Thread(target=self._keep_trying, args=statement, name="workers-lock", daemon=True).start()

    def _keep_trying(self, instance: Instance, statement: Executable, values: dict[str, Any]) -> None:
        """Try until the database answers. Once the instance is dead, it holds no lock anyway."""
        while instance.is_alive:
            with suppress(SQLAlchemyError):
                self._run(statement, values)
                break
            time.sleep(_RETRY_SECONDS)

    # -- helpers -------------------------------------------------------------------------------

    def check(self, name: object, timeout: object) -> None:
        """Raise InvalidLock for a name or a timeout that `hold` cannot take."""
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
                f"from 0 to {_LONGEST_WAIT}: leave it out if the caller must not wait."
            )

    def _owner(self, lock: Lock) -> dict[str, Any]:
        return {"of": self._prefix + lock.name, "by": lock._holder}

    def _all(self, query: Executable, values: dict[str, Any] | None = None) -> Sequence[Any]:
        return again_if_stale(partial(self.read, query, values))

    def _run(self, statement: Executable, values: dict[str, Any] | None = None) -> int:
        """Run a statement that does no harm if it runs twice. Return how many rows it changed."""
        return again_if_stale(partial(self.change, statement, values))


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
# If the acquisition is still on its way, it will find the token raised.
_CALLED_OFF = update(locks).where(_of_name, or_(_by_holder, _at_seen)).values(_free | {"token": locks.c.token + 1})


def _of_this_thread(name: str) -> tuple[str, int, int]:
    return name, os.getpid(), threading.get_ident()


def _unknown(name: str, why: SQLAlchemyError | str) -> LockNotAcquired:
    reason = why if isinstance(why, str) else first_line(why)
    return LockNotAcquired(
        f"The lock {name!r} could not be checked: {reason}. "
        "Expected a database that answers: treat the lock as not held, and try again later."
    )
