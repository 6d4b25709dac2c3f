"""Workers that run each second: the ticks that no process ran, and the lateness, beside APScheduler alone."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from sqlalchemy import Float, Table, delete, func, insert, select
from sqlalchemy.orm import Mapped, mapped_column

from background import PeriodicWorker, WorkerContext
from models import db

from ..harness.databases import context, database, driver_address
from ..harness.effects import Rows
from ..harness.figures import Figure, Setup, check, check_once, in_turns, percentile
from ..harness.processes import run_until_told, started

APSCHEDULER = Path(__file__).parents[1] / "peers" / "with_apscheduler.py"
PROCESSES = {"sqlite": 2, "postgresql": 4}


class Late(Rows):
    """The seconds from a tick to the start of its run."""

    __tablename__ = "benchmark_late"
    id: Mapped[int] = mapped_column(primary_key=True)
    worker: Mapped[int]
    tick: Mapped[int]
    late: Mapped[float] = mapped_column(Float(53))


lateness: Table = Late.__table__


def run(setup: Setup) -> Iterator[Figure]:
    with database(setup.engine) as url, context(url):
        lateness.create(db.engine)
        for workers in (10,) if setup.is_small else (100,) if setup.engine == "sqlite" else (100, 1_000):
            found: dict[str, list[tuple[float, float]]] = {"engine": [], "APScheduler": []}
            seconds = setup.size(2, 5)

            def measure(way: str, workers: int = workers, seconds: int = seconds, found: dict = found) -> float:
                found[way].append(measured(url, way, workers, seconds))
                return 0.0

            turns = replace(setup, turns=min(setup.turns, 3)) if workers > 100 else setup
            in_turns(turns, f"{workers:,} ticks a second", {way: lambda way=way: measure(way) for way in found})
            late, missed = ([each[part] for each in found["engine"]] for part in (0, 1))
            of, missed_alone = ([each[part] for each in found["APScheduler"]] for part in (0, 1))
            aim = "<= 0.5" if setup.engine == "postgresql" else ""
            load = f"at {workers:,} ticks a second"
            yield Figure(f"lateness p99 {load}", "ms", late, "APScheduler alone", of, aim)
            yield Figure(f"ticks not run {load}", "%", missed, aim="= 0")
            yield Figure(f"ticks not run {load}, APScheduler alone", "%", missed_alone)


def measured(url: str, way: str, workers: int, seconds: int) -> tuple[float, float]:
    """Return the p99 of the lateness in ms, and the percentage of ticks that no process ran."""
    with db.engine.begin() as connection:
        connection.execute(delete(lateness))
    with ExitStack() as started:
        if way == "engine":
            number = PROCESSES[db.engine.dialect.name]
            started.callback(end_together, [started.enter_context(fleet_process(url, workers)) for _ in range(number)])
        else:
            started.enter_context(apscheduler(url, workers))
        wait_for_all(workers)
        began = int(time.time()) + 1
        ended = began + seconds + 1
        time.sleep(ended - time.time())
        wait_for_all(workers, ended)
        found_at = time.time()
    columns = lateness.c.worker, lateness.c.tick, lateness.c.late
    with db.engine.connect() as connection:
        rows = connection.execute(select(*columns).where(lateness.c.tick.between(began, ended - 1))).all()
        check(connection.scalar(select(func.count()).select_from(lateness)) > 0, f"no tick of {way} ran")
    expected = workers * (ended - began)
    if way == "engine":
        check_once(len(rows), len(rows), len({(row.worker, row.tick) for row in rows}), "ticks")
    late = [row.late for row in rows] or [found_at - began]  # if no tick ran, each is at least this late
    return 1000 * percentile(late, 0.99), 100 * (1 - len(rows) / expected)


def wait_for_all(workers: int, tick: int = 0) -> None:
    """Wait until each worker has run `tick` or a later tick, for at most ten seconds.

    Processes that cannot keep up with their ticks are measured too.
    """
    count = select(func.count(lateness.c.worker.distinct())).where(lateness.c.tick >= tick)
    deadline = time.monotonic() + 10
    with db.engine.connect() as connection:
        while (connection.scalar(count) or 0) < workers and time.monotonic() < deadline:
            connection.rollback()
            time.sleep(0.2)


def end_together(processes: list["subprocess.Popen[str]"]) -> None:
    """Tell all processes to end, before the caller waits for any of them."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def fleet_process(url: str, workers: int) -> AbstractContextManager["subprocess.Popen[str]"]:
    return started([sys.executable, "-m", __name__, url, str(workers)])


def apscheduler(url: str, workers: int) -> AbstractContextManager[object]:
    environment = {**os.environ, "PEERS_URL": url, "PEERS_DATABASE": driver_address(url)}
    return started([sys.executable, str(APSCHEDULER), str(workers)], environment)


class EachSecond(PeriodicWorker):
    """Writes one row as its effect."""

    period = timedelta(seconds=1)
    number = 0

    def do_work(self, context: WorkerContext) -> None:
        tick = int(context.tick.timestamp())
        row = {"worker": self.number, "tick": tick, "late": time.time() - tick}
        context.session.execute(insert(lateness), row)


def each_second(number: int) -> Iterator[type[PeriodicWorker]]:
    for each in range(number):
        names = {"name": f"each_second_{each}", "number": each, "__doc__": EachSecond.__doc__}
        yield type("EachSecond", (EachSecond,), names)


if __name__ == "__main__":
    run_until_told(sys.argv[1], *each_second(int(sys.argv[2])))
