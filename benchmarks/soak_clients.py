"""Other clients of the soak's database: an open transaction, a storm of notifications, a backup.

Any client may do this, so it must not break the promise. Each client works in a thread of its own. A fault of the
database may end its session.
"""

import os
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from uuid import uuid4

from sqlalchemy import URL, Engine, func, select, text
from sqlalchemy.exc import OperationalError

from background.database.notifications import CHANNEL
from background.database.tables import messages

HELD_SECONDS = (3.0, 8.0)
BACKUP_SECONDS = 60
KNOWN_TOPICS = ("", "letters", "parcels")
# The last text is the longest that PostgreSQL takes.
ODD_TOPICS = (" ", "Überraschung 📦", "letters;parcels", "x" * 7999)

_NOTIFY = text("SELECT pg_notify(:channel, topic) FROM unnest(CAST(:topics AS text[])) AS topic")


class Clients:
    """The clients of one database. Each of `kinds` is a method. It starts a client, and returns a note for the log."""

    kinds = ("transaction", "storm", "backup")

    def __init__(self) -> None:
        self.backups = 0  # without the incomplete ones
        self.problems: list[str] = []
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    def _start(self, call: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=self._run, args=(call, *arguments), name="soak-client", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, call: Callable[..., None], *arguments: object) -> None:
        try:
            call(*arguments)
        except Exception as error:  # the soak reports it at its end
            self.problems.append(f"another client failed in {call.__name__}: {error!r}")

    def close(self) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join()


class ClientsOfSqlite(Clients):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def transaction(self, random: Random) -> str:
        """Hold a transaction open after a read, so that no checkpoint resets the write-ahead log."""
        seconds = random.uniform(*HELD_SECONDS)
        self._start(self._hold, seconds)
        return f"for {seconds:.1f} s"

    def _hold(self, seconds: float) -> None:
        with closing(self._connect()) as reader:
            reader.execute("BEGIN")
            reader.execute(f"SELECT count(*) FROM {messages.name}").fetchone()
            self._closed.wait(seconds)

    def storm(self, random: Random) -> str:
        """Commit small writes, one after the other, and touch the file of the heartbeats."""
        commits = random.randint(100, 400)
        self._start(self._write, commits)
        return f"{commits} commits"

    def _write(self, commits: int) -> None:
        with closing(self._connect()) as writer, suppress(sqlite3.OperationalError):  # another client has the lock
            writer.execute("PRAGMA synchronous = NORMAL")  # as the shop does, so that a commit waits for no disk
            writer.execute("CREATE TABLE IF NOT EXISTS soak_storm (id INTEGER PRIMARY KEY)")
            for _ in range(commits):
                writer.execute("INSERT INTO soak_storm DEFAULT VALUES")
                with suppress(FileNotFoundError):
                    os.utime(f"{self._path}-instances")
                if self._closed.wait(0.003):
                    return

    def backup(self, random: Random) -> str:
        """Copy the database while it is written to."""
        self._start(self._back_up, self._path.with_name(f"backup-{uuid4().hex}.sqlite"))
        return ""

    def _back_up(self, path: Path) -> None:
        with closing(self._connect()) as source, closing(sqlite3.connect(path)) as copy:
            source.backup(copy)
            self.backups += copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        path.unlink()

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=5, isolation_level=None)


class ClientsOfPostgresql(Clients):
    def __init__(self, engine: Engine, url: URL, programs: Path) -> None:
        super().__init__()
        self._engine, self._url, self._programs = engine, url, programs

    def transaction(self, random: Random) -> str:
        """Hold a snapshot open, so that no vacuum removes a row that is deleted or replaced meanwhile."""
        seconds = random.uniform(*HELD_SECONDS)
        self._start(self._hold, seconds)
        return f"for {seconds:.1f} s"

    def _hold(self, seconds: float) -> None:
        engine = self._engine.execution_options(isolation_level="REPEATABLE READ")
        with suppress(OperationalError), engine.connect() as connection:
            connection.execute(select(func.count()).select_from(messages))
            self._closed.wait(seconds)

    def storm(self, random: Random) -> str:
        """Notify the engine's channel of topics, most of them without a worker."""
        transactions, topics = random.randint(20, 60), random.randint(20, 200)
        self._start(self._notify, transactions, topics)
        return f"{transactions} transactions of {topics} notifications"

    def _notify(self, transactions: int, count: int) -> None:
        with suppress(OperationalError), self._engine.connect() as connection:
            for _ in range(transactions):
                topics = [*KNOWN_TOPICS, *ODD_TOPICS, *(uuid4().hex for _ in range(count))]
                connection.execute(_NOTIFY, {"channel": CHANNEL, "topics": topics})
                if self._closed.wait(0.01):
                    return

    def backup(self, random: Random) -> str:
        """Run `pg_dump` into /dev/null. It reads from one snapshot, and holds a lock on each table."""
        self._start(self._dump)
        return ""

    def _dump(self) -> None:
        url = self._url.set(drivername="postgresql").render_as_string(hide_password=False)
        command = [self._programs / "pg_dump", "--dbname", url, "--file", os.devnull]
        with suppress(subprocess.TimeoutExpired):
            self.backups += subprocess.run(command, capture_output=True, timeout=BACKUP_SECONDS).returncode == 0
