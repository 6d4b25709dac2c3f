"""The sweep of stale users beside one plain UPDATE, in one run. The ratios count, not the absolute numbers.

    python -m benchmarks.sweep --engine postgresql --users 1000000

Needs requirements-dev.txt: it starts a PostgreSQL of its own. A tenth of the users is stale.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from random import Random

from sqlalchemy import Connection, Engine, text
from sqlalchemy.orm import Session

from demo import add_users
from models import UserRepository, db

from .harness.databases import context, database, settle

RAW_UPDATE = """
    UPDATE users SET status = 'passive'
    WHERE status = 'active' AND coalesce(last_login_at, created_at) < :cutoff
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["sqlite", "postgresql"], required=True)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--login", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.login:
        log_in_until_told(arguments.url, arguments.users)
        return
    with database(arguments.engine) as url, context(url):
        measure(url, arguments.users, arguments.rounds)


def measure(url: str, users: int, rounds: int) -> None:
    engine, cutoff = db.engine, datetime.now(UTC) - timedelta(days=30)
    add_users(engine, users, datetime.now(UTC))
    remember_state(engine)

    ratios, volumes = [], []
    for number in range(1, rounds + 1):
        raw = timed(engine, lambda: raw_update(engine, cutoff))
        ours = timed(engine, lambda: sweep(engine, cutoff))
        ratios.append(ours.rate / raw.rate)
        volumes.append(ours.wal / raw.wal if raw.wal else 0.0)
        print(f"{number}: one UPDATE {raw}   our sweep {ours}   rate x{ratios[-1]:.2f}, WAL x{volumes[-1]:.2f}")
    print(f"rows/s against one UPDATE (aim: >= 0.95): x{statistics.median(ratios):.2f}")
    if engine.dialect.name == "postgresql":
        print(f"WAL against one UPDATE (aim: <= 1): x{statistics.median(volumes):.2f}")

    settle(engine)
    idle_us, select_us = idle_run(engine, cutoff)
    print(f"nothing stale: {idle_us:.0f} us, `select 1` {select_us:.0f} us: x{idle_us / select_us:.2f} (aim: <= 2)")

    measure_logins(url, engine, users, "one UPDATE", lambda: raw_update(engine, cutoff))
    measure_logins(url, engine, users, "our sweep", lambda: sweep(engine, cutoff))


class Measured:
    def __init__(self, rows: int, seconds: float, wal: int) -> None:
        self.rate, self.wal, self.seconds = rows / seconds, wal, seconds

    def __str__(self) -> str:
        return f"{self.seconds:6.2f} s {self.rate:9,.0f} rows/s" + (f" {self.wal / 1e6:6.0f} MB" if self.wal else "")


def timed(engine: Engine, run: Callable[[], int]) -> Measured:
    make_stale_again(engine)
    wal, start = wal_position(engine), time.perf_counter()
    rows = run()
    return Measured(rows, time.perf_counter() - start, wal_position(engine) - wal)


def raw_update(engine: Engine, cutoff: datetime) -> int:
    with engine.begin() as connection:
        return connection.execute(text(RAW_UPDATE), {"cutoff": for_text(connection, cutoff)}).rowcount


def sweep(engine: Engine, cutoff: datetime) -> int:
    with Session(engine) as session:
        return UserRepository(session).update_inactive_user_statuses(cutoff)


def idle_run(engine: Engine, cutoff: datetime) -> tuple[float, float]:
    """Return the medians of an idle sweep and of `select 1`, each in the session of a run."""
    ours, select = [], []
    with Session(engine) as session:
        users = UserRepository(session)
        for _ in range(1000):
            start = time.perf_counter()
            assert users.update_inactive_user_statuses(cutoff) == 0
            middle = time.perf_counter()
            session.scalar(text("select 1"))
            ours.append(middle - start)
            select.append(time.perf_counter() - middle)
    return statistics.median(ours) * 1e6, statistics.median(select) * 1e6


def measure_logins(url: str, engine: Engine, users: int, name: str, run: Callable[[], int]) -> None:
    make_stale_again(engine)
    command = [sys.executable, "-m", "benchmarks.sweep", "--engine", engine.dialect.name]
    command += ["--users", str(users), "--login", "yes", "--url", url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(3)
        tell(process.stdin, "meanwhile")
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        tell(process.stdin, "stop")
        print(f"logins beside {name} ({seconds:.2f} s): {process.stdout.read().strip()}")


def tell(stream: object, word: str) -> None:
    print(word, file=stream, flush=True)  # type: ignore[call-overload]


def log_in_until_told(url: str, users: int) -> None:
    """Measure some hundred logins a second of random users. The standard input names the phases."""
    import threading

    phase, took = ["idle"], {"idle": [0.0], "meanwhile": [0.0]}

    def listen() -> None:
        for line in sys.stdin:
            phase[0] = line.strip()

    threading.Thread(target=listen, daemon=True).start()
    random = Random(1)
    with context(url), Session(db.engine) as session:
        repository = UserRepository(session)
        repository.record_login(1, datetime.now(UTC))
        session.commit()
        print("started", flush=True)
        while (now := phase[0]) != "stop":
            start = time.perf_counter()
            repository.record_login(random.randint(1, users), datetime.now(UTC))
            session.commit()
            took[now].append((time.perf_counter() - start) * 1000)
            time.sleep(0.002)
    print(", ".join(f"{name} {figures(sorted(values))}" for name, values in took.items()))


def figures(values: list[float]) -> str:
    p50, p99 = values[len(values) // 2], values[int(len(values) * 0.99)]
    return f"p50 {p50:.1f} / p99 {p99:.1f} / max {values[-1]:.1f} ms of {len(values) - 1}"


def remember_state(engine: Engine) -> None:
    settle(engine)


def make_stale_again(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE users SET status = 'active' WHERE status = 'passive'")
    settle(engine)


def wal_position(engine: Engine) -> int:
    if engine.dialect.name == "sqlite":
        return 0
    with engine.connect() as connection:
        return int(connection.exec_driver_sql("SELECT pg_current_wal_lsn() - '0/0'").scalar_one())


def for_text(connection: Connection, at: datetime) -> object:
    return at if connection.dialect.name == "postgresql" else f"{at:%Y-%m-%d %H:%M:%S.%f}"


if __name__ == "__main__":
    main()
