"""Leases: one row per instance. One heartbeat statement renews everything that the instance holds."""

import math
import os
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import uuid4

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Connection,
    Engine,
    Float,
    and_,
    bindparam,
    case,
    delete,
    false,
    func,
    literal,
    literal_column,
    not_,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.exc import OperationalError

from ..database.clock import AHEAD, LONGEST_PAUSE, elapsed, now, steady
from ..database.dialects.error_codes import is_lock_unavailable
from ..database.dialects.one_request import limited
from ..database.store import Statements, limit
from ..database.tables import (
    LONGEST_RELEASE,
    AnyText,
    any_put_off,
    any_running,
    executions,
    instances,
    is_retry,
    may_be_run_again,
    next_due,
    workers,
)

OFFSET_WARNED = timedelta(seconds=1)
LEASE_IS_OVER = "its instance could not renew the lease in time"
_FORGOTTEN_AFTER = timedelta(days=1)
_GONE_SINCE = timedelta(minutes=5)
_STEP_SECONDS = 1.0
_LEAST_PATIENCE, _MOST_PATIENCE = 0.05, 0.5  # seconds
_MOST_CANCELS = 4_000  # characters
_IDENTITY = ("id", "host", "pid", "release")


@dataclass
class Instance:
    """One life of one process.

    After `deadline`, on the `steady()` clock, this instance assumes that it has lost all its claims.
    """

    lease: timedelta
    host: str = field(default_factory=lambda: ascii(socket.gethostname())[1:-1])
    pid: int = field(default_factory=os.getpid)
    id: str = field(default_factory=lambda: uuid4().hex)
    deadline: float = 0.0
    """0 before the first heartbeat."""
    first_expiry: float = math.inf
    """The moment, on the `steady()` clock, when the first lease of another instance ends. Read by each heartbeat."""
    clock_offset: timedelta = timedelta()
    release: str | None = None
    """The application's release, if the application names it."""

    @property
    def name(self) -> str:
        return f"{self.host}:{self.pid}"

    @property
    def is_alive(self) -> bool:
        return steady() < self.deadline

    def database_time(self) -> datetime:
        """Return this host's time, corrected by the offset that the last heartbeat measured."""
        return datetime.now(UTC) + self.clock_offset


@dataclass(frozen=True)
class Pulse:
    """News of the fleet that a heartbeat brings. If nothing happened, the instance reads nothing more."""

    schedules: str | None
    """A text that changes with the schedule of any worker."""
    is_busy: bool
    """True if any worker runs or must run again, or any message is being handled."""
    is_ahead: bool
    """True if a worker or a waiting message has a moment in the clock's future: the clock was ahead before."""
    was_set: bool
    """True if the database's clock was set since this process read it last."""
    clock: datetime = field(compare=False)
    """The database's clock at the heartbeat."""
    due: Mapping[str, datetime] = field(compare=False)
    """The moment when the first waiting message of each topic is due, or NEVER. Paused topics are left out."""
    took: float = field(compare=False)
    """The seconds that the database took for the heartbeat."""
    cancels: Mapping[str, str | None] = field(compare=False, default_factory=dict)
    """The claims of this instance that users cancelled, by id, each with the user's name."""
    is_blind: bool = False
    """True if another client kept a table locked. The heartbeat then renewed the lease and read nothing."""

    def has_news(self, before: "Pulse | None") -> bool:
        """Return whether more changed since the pulse `before` than the workers that run or must run again."""
        return before is None or self.is_ahead or replace(before, is_busy=self.is_busy) != self


class Leases(Statements):
    """The rows of all instances: living instances, and for a day instances that left or died."""

    def __init__(self, engine: Engine, lease: float) -> None:
        super().__init__(engine)
        self._lease = lease
        self._looks: dict[tuple[str, ...], Callable[[Connection, dict[str, Any]], Any]] = {}
        self._renewal = self._upsert(null(), false(), false(), _first_expiry)
        # The longest wait of `_look` for a lock. The renewal comes after it, and must be well within the lease.
        self._patience = max(_LEAST_PATIENCE, min(_MOST_PATIENCE, lease / 10))
        self._pace: tuple[float, float] | None = None
        self._began, self._judging_from = steady(), 0.0

    def beat(
        self, instance: Instance, topics: Sequence[str] = (), floors: Mapping[str, datetime | None] | None = None
    ) -> Pulse:
        """Renew everything that `instance` holds, or sign it on, in one request.

        The same request looks for work: running claims, and messages that wait in `topics`. If another client keeps
        one of their tables locked, a second request renews the lease alone. So the lease depends on its own table only.

        With `floors`, look for messages that are due at the floor of their topic or later. Also look for instances
        that were lost in the last minutes, because they may hold messages. Without `floors`, look for every message.
        """
        try:
            return self._beat(instance, partial(self._look, tuple(topics), floors), topics)
        except OperationalError as error:
            if not is_lock_unavailable(error):
                raise
        return replace(self.renew(instance), is_blind=True)

    def renew(self, instance: Instance) -> Pulse:
        """Renew everything that `instance` holds, or sign it on, without a look for work."""
        return self._beat(instance, lambda connection, values: connection.execute(self._renewal, values).one(), ())

    def _beat(
        self, instance: Instance, send: Callable[[Connection, dict[str, Any]], Sequence[Any]], topics: Sequence[str]
    ) -> Pulse:
        sent, instance.first_expiry = steady(), math.inf
        values = {f"its_{name}": getattr(instance, name) for name in _IDENTITY}
        values |= {"lease": instance.lease.total_seconds(), "offset": instance.clock_offset.total_seconds()}
        with self.single.begin() as connection:
            host_before = time.time()  # not before connecting, which may take long
            clock, cancels, schedules, is_busy, is_ahead, expiry, *dues, took = send(connection, values)
            host_after = time.time()
        clock = clock.astimezone(UTC)
        least, most = (clock - datetime.fromtimestamp(host, UTC) for host in (host_after, host_before))
        instance.clock_offset = min(max(instance.clock_offset, least), most)  # unchanged while it is possible
        instance.deadline = sent + instance.lease.total_seconds()
        if expiry is not None:
            instance.first_expiry = steady() + (expiry - clock).total_seconds()
        due = {topic: at for topic, at in zip(topics, dues, strict=True) if at is not None}
        was_set = self._was_set(clock, sent)
        return Pulse(schedules, bool(is_busy), bool(is_ahead), was_set, clock, due, took, _users(cancels))

    def _look(
        self,
        topics: tuple[str, ...],
        floors: Mapping[str, datetime | None] | None,
        connection: Connection,
        values: dict[str, Any],
    ) -> Sequence[Any]:
        """Renew the lease and look for work. Building the statement takes as long as sending it, so it is kept."""
        names = [f"floor_{at}" for at in range(len(topics))] if self.keeps_old_entries else []
        if topics not in self._looks:
            patience = select(limit("lock_timeout", self._patience))
            upsert = self._upsert(*_pulse(topics, names), *next_due(topics, *names))
            self._looks[topics] = limited("heartbeat", self.engine, patience, upsert)
        values |= {"is_full": floors is None, **dict(zip(names, map((floors or {}).get, topics), strict=False))}
        row: Sequence[Any] = self._looks[topics](connection, values)
        return row

    def _upsert(self, *columns: ColumnElement[Any]) -> Any:
        lease, offset = bindparam("lease", type_=Float), bindparam("offset", type_=Float)
        renewed = {"heartbeat_at": now(), "expires_at": now(lease), "clock_offset": offset}
        identity: dict[str, Any] = {name: bindparam(f"its_{name}") for name in _IDENTITY}
        # Escapes for characters that the database cannot hold make a release longer.
        identity["release"] = func.substr(bindparam("its_release", type_=AnyText()), 1, LONGEST_RELEASE)
        row = self.insert(instances).values({**identity, "started_at": now(), **renewed})
        renewal = row.on_conflict_do_update(index_elements=["id"], set_=renewed)
        return renewal.returning(now(), instances.c.cancels, *columns, elapsed(self.began, now()))

    def cancel(self, instance: str, claim: str, by: str | None) -> None:
        """Tell `instance` with its next heartbeat that a user cancelled its claim with the id `claim`.

        On SQLite this waits for no run, because the instances have a file of their own. Old requests are cut off.
        """
        requests = literal(f"{claim} {by or ''}\n") + func.coalesce(instances.c.cancels, "")
        newest = func.substr(requests, 1, _MOST_CANCELS)
        self.change(update(instances).where(instances.c.id == instance).values(cancels=newest))

    def write(self) -> None:
        """Execute an UPDATE that changes nothing, but fails on a database that accepts no writes."""
        self.change(update(instances).where(false()).values(pid=instances.c.pid))

    def sign_off(self, instance: Instance) -> None:
        """Sign off. Everything still held counts as handed back, and later commits are refused."""
        instance.deadline = 0.0
        own = update(instances).where(instances.c.id == instance.id)
        self.change(own.values(signed_off_at=now(), expires_at=now()))
        self.change(delete(instances).where(instances.c.expires_at < now(-_FORGOTTEN_AFTER)))

    def forget(self, instance: Instance) -> None:
        """Delete the row of an instance that ran nothing (one may exist per lock taken outside a worker)."""
        instance.deadline = 0.0
        self.change(delete(instances).where(instances.c.id == instance.id))

    def ending(self, id: str) -> str:
        """Return how the lease of an instance ended that did not sign off, for the history and the log."""
        is_known = self.read(select(instances.c.id).where(instances.c.id == id))
        return "stopped renewing its lease" if is_known else "is not known to the fleet: its row was deleted"

    def gone(self, ids: Collection[str]) -> dict[str, bool]:
        """Return the instances of `ids` that are not alive: True if signed off, False if lost.

        After the database's clock was set, no instance counts as lost for one lease, in which all instances renew it.
        A process that started after the change did not see it. For its first lease, it also spares each instance with a
        heartbeat in the future.
        """
        sent = steady()
        columns = (instances.c.id, instances.c.signed_off_at, is_alive.label("is_alive"), _is_ahead.label("is_ahead"))
        if rows := self.read(select(*columns, now().label("clock")).where(instances.c.id.in_(ids))):
            self._was_set(rows[0].clock, sent)
        signed_off = {row.id for row in rows if row.signed_off_at is not None}
        spared = {row.id for row in rows if row.is_alive or (row.is_ahead and sent < self._began + self._lease)}
        if sent < self._judging_from:
            spared.update(ids)
        return {each: each in signed_off for each in ids if each in signed_off or each not in spared}

    def expired(self, ids: Collection[str], since: datetime, until: datetime) -> set[str]:
        """Return the instances of `ids` whose leases ended between two moments of the database's clock."""
        query = select(instances.c.id).where(instances.c.id.in_(ids), instances.c.expires_at.between(since, until))
        return {row.id for row in self.read(query)}

    @property
    def is_steady(self) -> bool:
        """True once this process has seen the database's clock run steadily for one lease."""
        return steady() >= max(self._judging_from, self._began + self._lease)

    def _was_set(self, clock: datetime, sent: float) -> bool:
        """Return whether the database's clock was set: it and the `steady()` clock differ since the last call.

        `clock` was requested at `sent`. A request takes time, so only bounds of the difference are known.
        """
        received = steady()
        before, self._pace = self._pace, (clock.timestamp() - received, clock.timestamp() - sent)
        if before is None:
            return False
        least, most = before
        was_set = self._pace[0] > most + _STEP_SECONDS or self._pace[1] < least - _STEP_SECONDS
        if was_set:
            self._judging_from = received + self._lease
        return was_set


def _users(cancels: str | None) -> dict[str, str | None]:
    """Return the cancelled claims of an instance by id, each with the name of the user who cancelled it first."""
    lines = [line.partition(" ") for line in (cancels or "").split("\n")[:-1]]
    return {claim: by or None for claim, _, by in lines}


_is_ahead = instances.c.heartbeat_at > now(timedelta(seconds=_STEP_SECONDS))  # the clock was set back since
is_alive: ColumnElement[bool] = and_(
    instances.c.signed_off_at.is_(None), instances.c.expires_at > now(), not_(_is_ahead)
)

_schedule_lines = (
    select((workers.c.name + " " + workers.c.schedule + " " + workers.c.declared).label("line"))
    .order_by(workers.c.name)
    .subquery()
)
_NEWLINE: Any = literal_column("'\n'")  # SQLAlchemy would write a text into each request anew
_others = and_(is_alive, instances.c.id != bindparam("its_id"))
_first_expiry = select(func.min(instances.c.expires_at)).where(_others).scalar_subquery()
_is_worker_ahead = or_(
    workers.c.mark > now(AHEAD),
    workers.c.scheduled_at > now(AHEAD),
    and_(workers.c.pending_tick > now(AHEAD), workers.c.pending_trigger != "manual"),
    and_(is_retry, workers.c.pending_after > now(LONGEST_PAUSE)),
)


# The index of the running messages has no floor. So a heartbeat with floors looks for instances that are lost.
_any_gone = select(instances.c.id).where(not_(is_alive), instances.c.expires_at > now(-_GONE_SINCE)).exists()
_any_held = case((bindparam("is_full", type_=Boolean), any_running), else_=_any_gone)


def _pulse(topics: Sequence[str], floors: Sequence[str]) -> tuple[ColumnElement[Any], ...]:
    """Return the columns of a pulse that follow the clock. The due moments of the topics come last."""
    is_pending = and_(workers.c.pending_tick.is_not(None), may_be_run_again)
    is_busy = select(workers.c.name).where(or_(workers.c.running.is_not(None), is_pending)).exists()
    is_any_ahead = select(workers.c.name).where(_is_worker_ahead).exists()
    return (
        select(func.aggregate_strings(_schedule_lines.c.line, _NEWLINE)).scalar_subquery(),
        or_(
            is_busy,
            select(executions.c.id).where(executions.c.state == literal_column("'running'")).exists(),
            _any_held,
        ),
        or_(is_any_ahead, *any_put_off(topics, *floors)),
        _first_expiry,
    )
