"""The sweep of stale users, beside one plain UPDATE, and the logins of other users meanwhile."""

import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from random import Random

from sqlalchemy import Connection, Engine, func, select, text
from sqlalchemy.orm import Session

from demo import add_users
from models import User, UserRepository, db

from ..harness.databases import context, database, settle
from ..harness.figures import Figure, Setup, check, in_turns, median, percentile

Sweep = Callable[[Engine, datetime], int]
RAW_UPDATE = """
    UPDATE users SET status = 'passive'
    WHERE status = 'active' AND coalesce(last_login_at, created_at) < :cutoff
"""


def run(setup: Setup) -> Iterator[Figure]:
    for users in (2_000,) if setup.is_small else (10_000, 100_000, 1_000_000):
        with database(setup.engine) as url, context(url):
            yield from measured(setup, url, users, is_largest=users in (2_000, 1_000_000))


def measured(setup: Setup, url: str, users: int, is_largest: bool) -> Iterator[Figure]:
    engine, cutoff = db.engine, datetime.now(UTC) - timedelta(days=30)
    add_users(engine, users, datetime.now(UTC))
    settle(engine)
    sweeps = Sweeps(engine, cutoff)
    rates = in_turns(
        setup,
        f"sweep of {users:,} users",
        {"sweep": lambda: sweeps.rate(sweep), "UPDATE": lambda: sweeps.rate(one_update)},
    )
    aim = ">= 0.95" if is_largest else ""
    yield Figure("sweep", "rows/s", rates["sweep"], "one UPDATE", rates["UPDATE"], aim, at=users)
    if not is_largest:
        return
    if setup.engine == "postgresql":
        volumes = (sweeps.volumes[work] for work in (sweep, one_update))
        yield Figure("write-ahead log", "MB", next(volumes), "one UPDATE", next(volumes), "<= 1")
    settle(engine)
    with Session(engine) as session:
        users_found = UserRepository(session)
        ways = {
            "sweep": lambda: microseconds(lambda: users_found.update_inactive_user_statuses(cutoff)),
            "select 1": lambda: microseconds(lambda: session.scalar(text("select 1"))),
        }
        took = in_turns(setup, "sweep with nothing stale", ways)
    yield Figure("sweep with nothing stale", "us", took["sweep"], "select 1", took["select 1"], "<= 2")
    seconds = 1
    ways = {
        "sweep": lambda: sweeps.logins(url, users, seconds, sweep),
        "UPDATE": lambda: sweeps.logins(url, users, seconds, one_update),
    }
    logins = in_turns(setup, "logins meanwhile", ways)
    yield Figure("p99 of logins meanwhile", "ms", logins["sweep"], "one UPDATE", logins["UPDATE"])


class Sweeps:
    """Sweeps one database again and again. Before each sweep, the same users are stale."""

    def __init__(self, engine: Engine, cutoff: datetime) -> None:
        self._engine, self._cutoff = engine, cutoff
        self.volumes: dict[Sweep, list[float]] = defaultdict(list)
        """The megabytes of write-ahead log of each sweep."""
        with engine.connect() as connection:
            is_stale = func.coalesce(User.last_login_at, User.created_at) < cutoff
            self._stale = connection.scalar(select(func.count(User.id)).where(is_stale)) or 0

    def rate(self, work: Sweep) -> float:
        """Return the rows that were set passive in a second."""
        self._make_stale_again()
        position, began = written(self._engine), time.perf_counter()
        rows = work(self._engine, self._cutoff)
        seconds = time.perf_counter() - began
        self.volumes[work].append((written(self._engine) - position) / 1e6)
        self._check(rows)
        return rows / seconds

    def logins(self, url: str, users: int, pause: int, work: Sweep) -> float:
        """Return the p99 of the logins of another process meanwhile, in milliseconds."""
        self._make_stale_again()
        command = [sys.executable, "-m", __name__, url, str(users)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(pause)
            print("meanwhile", file=process.stdin, flush=True)
            work(self._engine, self._cutoff)
            print("stop", file=process.stdin, flush=True)
            return float(process.stdout.read())

    def _make_stale_again(self) -> None:
        with self._engine.begin() as connection:
            connection.exec_driver_sql("UPDATE users SET status = 'active' WHERE status = 'passive'")
        settle(self._engine)

    def _check(self, rows: int) -> None:
        with self._engine.connect() as connection:
            passive = connection.scalar(select(func.count(User.id)).where(User.status == "passive"))
        check(rows == passive == self._stale, f"{self._stale} users were stale, {rows} changed, {passive} are passive")


def one_update(engine: Engine, cutoff: datetime) -> int:
    with engine.begin() as connection:
        return connection.execute(text(RAW_UPDATE), {"cutoff": for_text(connection, cutoff)}).rowcount


def for_text(connection: Connection, at: datetime) -> object:
    return at if connection.dialect.name == "postgresql" else f"{at:%Y-%m-%d %H:%M:%S.%f}"


def sweep(engine: Engine, cutoff: datetime) -> int:
    with Session(engine) as session:
        return UserRepository(session).update_inactive_user_statuses(cutoff)


def microseconds(work: Callable[[], object]) -> float:
    """Return the median of some hundred calls. Each must find nothing."""
    took = []
    for _ in range(300):
        began = time.perf_counter()
        found = work()
        took.append(time.perf_counter() - began)
        check(found in (0, 1), f"a sweep with nothing stale changed {found} users")
    return 1e6 * median(took)


def written(engine: Engine) -> int:
    """Return the bytes of write-ahead log until now."""
    if engine.dialect.name == "sqlite":
        return 0
    with engine.connect() as connection:
        return int(connection.exec_driver_sql("SELECT pg_current_wal_lsn() - '0/0'").scalar_one())


def log_in_until_told(url: str, users: int) -> None:
    """Log in as random users, some hundred times a second. Print the p99 of the phase `meanwhile`."""
    phase, took, random = ["before"], list[float](), Random(1)

    def listen() -> None:
        for line in sys.stdin:
            phase[0] = line.strip()

    threading.Thread(target=listen, daemon=True).start()
    with context(url), Session(db.engine) as session:
        repository = UserRepository(session)
        repository.record_login(1, datetime.now(UTC))
        session.commit()
        print("started", flush=True)
        while (now := phase[0]) != "stop" or not took:
            began = time.perf_counter()
            repository.record_login(random.randint(1, users), datetime.now(UTC))
            session.commit()
            if now != "before":
                took.append(1000 * (time.perf_counter() - began))
            time.sleep(0.002)
    print(percentile(took, 0.99))


if __name__ == "__main__":
    log_in_until_told(sys.argv[1], int(sys.argv[2]))
