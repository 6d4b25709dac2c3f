"""The rows that the traced app's workers write, and the rules that hold for them after any start and stop."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Column, Integer, MetaData, String, Table, create_engine, insert, inspect, select
from sqlalchemy.pool import NullPool

from background import Message, WorkerContext
from background.database.clock import UtcDateTime, now
from background.database.dialects.sqlite import prepare
from background.database.tables import executions, instances, workers

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

table = Table(
    "effects",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("worker", String(100), nullable=False),
    Column("tick", UtcDateTime, nullable=False),
    Column("note", String(100), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("key", String(200), nullable=False),
    Column("at", UtcDateTime, nullable=False),
)


class Effect(NamedTuple):
    worker: str
    tick: datetime
    note: str
    attempt: int
    pid: int
    key: str
    at: datetime


def leave(context: WorkerContext, pid: int, note: str = "done") -> None:
    """Write one effect of this run, in the run's own transaction, at the database's time."""
    context.session.execute(
        insert(table).values(
            worker=context.worker,
            tick=context.tick,
            note=note,
            attempt=context.attempt,
            pid=pid,
            key=context.idempotency_key,
            at=now(),
        )
    )


def leave_each(context: WorkerContext, messages: Sequence[Message], pid: int) -> None:
    """Write one effect for each of the messages, as `leave` does for the current message."""
    rows = [
        {"worker": context.worker, "tick": each.due_at, "attempt": each.attempt, "key": each.idempotency_key}
        for each in messages
    ]
    context.session.execute(insert(table).values(note="done", pid=pid, at=now()), rows)


class Effects:
    """The effects in one database. Each call reads them again."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = create_engine(url, poolclass=NullPool)
        prepare(self._engine)
        table.create(self._engine)

    def all(self, worker: str = "ticker", note: str = "done") -> list[Effect]:
        """Return the effects in the order in which the runs wrote them."""
        columns = [column for column in table.columns if column.name != "id"]
        query = select(*columns).where(table.c.worker == worker, table.c.note == note).order_by(table.c.id)
        with self._engine.connect() as connection:
            return [Effect(*row) for row in connection.execute(query)]

    def notes(self, worker: str) -> list[str]:
        """Return the notes of the worker's effects, in order."""
        query = select(table.c.note).where(table.c.worker == worker).order_by(table.c.id)
        with self._engine.connect() as connection:
            return list(connection.scalars(query))

    def ticks(self, worker: str = "ticker") -> list[datetime]:
        return [effect.tick for effect in self.all(worker)]

    def pids(self, worker: str = "ticker") -> set[int]:
        return {effect.pid for effect in self.all(worker)}

    def check_once(self, worker: str = "ticker") -> list[Effect]:
        """Check that each tick ran at most once, in order, never early, and under its own key.

        Returns the effects.
        """
        found = self.all(worker)
        ticks = [effect.tick for effect in found]
        assert ticks == sorted(set(ticks)), f"twice, or out of order: {ticks}"
        early = [effect for effect in found if effect.at < effect.tick]
        assert not early, f"early: {early}"
        assert [effect.key for effect in found] == [f"{worker}:{tick.isoformat()}" for tick in ticks]
        return found

    def check_consecutive(self, period: timedelta, since: datetime, worker: str = "ticker") -> list[Effect]:
        """Check as `check_once` does, and that no tick after `since` is left out.

        A tick may be skipped if the previous run was still on, as on a machine that stood still.
        """
        found = [effect for effect in self.check_once(worker) if effect.tick > since]
        for one, following in pairwise(found):
            history = self.history(worker, one.tick)
            overlapped = [row["tick"] for row in history if (row["reason"] or "").startswith("still running")]
            left_out = [one.tick + number * period for number in range(1, (following.tick - one.tick) // period)]
            assert set(left_out) <= set(overlapped), "\n".join(map(str, history))
            assert (following.tick - one.tick) % period == timedelta(), (one, following)
        return found

    def check_answered(self, period: timedelta, worker: str = "ticker") -> None:
        """Check as `check_once` does, and that every tick from the first run to the last has one outcome or reason."""
        first, *_, last = (effect.tick for effect in self.check_once(worker))
        answered = []
        for row in self.history(worker, first):
            if row["state"] not in ("running", "lost", "handed back"):
                ticks = ((row["through"] or row["tick"]) - row["tick"]) // period + 1
                answered += [row["tick"] + number * period for number in range(ticks)]
        due = [first + number * period for number in range((last - first) // period + 1)]
        assert sorted(tick for tick in answered if tick <= last) == due

    def history(self, worker: str, since: datetime = EPOCH) -> list[dict[str, Any]]:
        """Return the executions of the worker's ticks from `since` on."""
        query = select(executions).where(executions.c.worker == worker, executions.c.tick >= since)
        with self._engine.connect() as connection:
            return [dict(row) for row in connection.execute(query.order_by(executions.c.id)).mappings()]

    def states(self, worker: str) -> list[tuple[str, int]]:
        """Return the state and the attempt of the worker's executions, in order."""
        columns = (executions.c.state, executions.c.attempt)
        query = select(*columns).where(executions.c.worker == worker).order_by(executions.c.id)
        with self._engine.connect() as connection:
            return [(state, attempt) for state, attempt in connection.execute(query)]

    def schedule(self, worker: str) -> tuple[str, datetime]:
        """Return the worker's schedule in force, as text, and the moment since which it is in force."""
        query = select(workers.c.schedule, workers.c.scheduled_at).where(workers.c.name == worker)
        with self._engine.connect() as connection:
            text, since = connection.execute(query).one()
        return text, since

    def instances(self, alive: bool = False) -> set[int]:
        """Return the pids of the processes that joined the fleet. With `alive`, only of the living processes."""
        return set(self.heartbeats(alive))

    def heartbeats(self, alive: bool = False) -> dict[int, datetime]:
        """Return the time of each process's last heartbeat, by pid."""
        url = self._engine.url
        if url.get_backend_name() == "sqlite":
            url = url.set(database=f"{url.database}-instances")
            if not Path(str(url.database)).exists():
                return {}
        query = select(instances.c.pid, instances.c.heartbeat_at)
        if alive:
            query = query.where(instances.c.signed_off_at.is_(None), instances.c.expires_at > now())
        with create_engine(url, poolclass=NullPool).connect() as connection:
            if not inspect(connection).has_table(instances.name):  # SQLite's file exists a moment before its table
                return {}
            return dict(connection.execute(query).all())
