"""Who is alive: one row per life of a process, renewed by one heartbeat statement for all that it holds."""

import os
import socket
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import uuid4

from sqlalchemy import Engine, create_engine, delete, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateTable

from .clock import now, single_statements
from .models import instances
from .sqlite import prepare

_LAST_BEAT_SECONDS = 1.0
_FORGOTTEN_AFTER = timedelta(days=1)


@dataclass
class Instance:
    """One life of one process. `deadline` is monotonic: past it, this instance believes in none of its claims."""

    lease: timedelta
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    id: str = field(default_factory=lambda: uuid4().hex)
    deadline: float = 0.0
    clock_offset: timedelta = timedelta()

    @property
    def name(self) -> str:
        return f"{self.host}:{self.pid}"

    @property
    def is_alive(self) -> bool:
        return time.monotonic() < self.deadline

    def database_time(self) -> datetime:
        """This host's clock, corrected by the offset that the last heartbeat measured."""
        return datetime.now(UTC) + self.clock_offset

    def measured(self, clock: datetime, before: float, after: float) -> None:
        """Take in the database's `clock`, read between two readings of this host's (Unix seconds)."""
        self.clock_offset = clock - datetime.fromtimestamp((before + after) / 2, UTC)


class Instances:
    """The rows of the living and of those who died lately."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._single = single_statements(engine)
        self._insert = sqlite.insert if engine.dialect.name == "sqlite" else postgresql.insert
        if engine.dialect.name == "sqlite":
            with engine.begin() as connection:  # IF NOT EXISTS, as several processes may be the first at once
                connection.execute(CreateTable(instances, if_not_exists=True))

    def beat(self, instance: Instance) -> None:
        """Renew everything that `instance` holds, or sign it on: one statement either way."""
        sent, host_before = time.monotonic(), time.time()
        renewed = {
            "heartbeat_at": now(),
            "expires_at": now(instance.lease),
            "clock_offset": instance.clock_offset.total_seconds(),
        }
        row = {"id": instance.id, "host": instance.host, "pid": instance.pid, "started_at": now(), **renewed}
        upsert = self._insert(instances).values(row)
        with self._single.begin() as connection:
            clock = connection.execute(
                upsert.on_conflict_do_update(index_elements=["id"], set_=renewed).returning(now())
            ).scalar_one()
            host_after = time.time()
        instance.measured(clock, host_before, host_after)
        instance.deadline = sent + instance.lease.total_seconds()

    def sign_off(self, instance: Instance) -> None:
        """End this life; whatever it still holds counts as handed back."""
        with self.engine.begin() as connection:
            connection.execute(
                update(instances).where(instances.c.id == instance.id).values(signed_off_at=now(), expires_at=now())
            )
            connection.execute(delete(instances).where(instances.c.expires_at < now(-_FORGOTTEN_AFTER)))

    def gone(self, ids: Collection[str]) -> dict[str, bool]:
        """Those of `ids` who are not alive: True for one that signed off, False for one that was lost."""
        with self._single.connect() as connection:
            rows = connection.execute(
                select(
                    instances.c.id, instances.c.signed_off_at, (instances.c.expires_at > now()).label("alive")
                ).where(instances.c.id.in_(ids))
            ).all()
        alive = {row.id for row in rows if row.alive and row.signed_off_at is None}
        signed_off = {row.id for row in rows if row.signed_off_at is not None}
        return {each: each in signed_off for each in ids if each not in alive}


def instances_engine(engine: Engine) -> Engine:
    """A connection for heartbeats alone, which nothing else can starve.

    On SQLite a run that has written holds the only write lock until it commits, so the heartbeats have a
    small database of their own beside the main one (all its processes live on one host).
    """
    if engine.dialect.name != "sqlite":
        return create_engine(engine.url, pool_size=1, max_overflow=0, isolation_level="READ COMMITTED")
    beside = create_engine(engine.url.set(database=f"{engine.url.database}-instances"))
    prepare(beside)
    return beside


class Heartbeat(threading.Thread):
    """Calls `beat` every `interval` seconds until stopped; outlives every error."""

    def __init__(self, interval: float, beat: Callable[[], None], failed: Callable[[Exception], None]) -> None:
        super().__init__(name="workers-heartbeat", daemon=True)
        self._interval, self._beat, self._failed = interval, beat, failed
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(self._interval):
            try:
                self._beat()
            except Exception as error:  # a thread that ended would stop this instance for good
                self._failed(error)

    def stop(self) -> None:
        self._stopped.set()
        if threading.current_thread() is not self and self.is_alive():
            self.join(_LAST_BEAT_SECONDS)
