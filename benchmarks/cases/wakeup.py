"""The time from a commit to the handler in another process, and the processor time of waiting there."""

import sys
import time
from collections.abc import Iterator
from random import Random

import psutil
from sqlalchemy import Float, Table, insert, select
from sqlalchemy.orm import Mapped, mapped_column

from background import BackgroundWorkerManager, Message, MessageWorker, WorkerContext
from models import db

from ..harness.databases import context, database, without_workers
from ..harness.effects import Rows, effects
from ..harness.figures import Figure, Setup, check, check_once, median, percentile, progress
from ..harness.processes import run_until_told, started

random = Random(1)


class Arrival(Rows):
    """The moment at which a handler got a message, by the clock that all processes of this host share."""

    __tablename__ = "benchmark_arrivals"
    id: Mapped[int] = mapped_column(primary_key=True)
    message: Mapped[int]
    at: Mapped[float] = mapped_column(Float(53))


arrivals: Table = Arrival.__table__


class Probe(MessageWorker):
    """Writes down when it got a message."""

    topic = "probe"

    def handle(self, message: Message, context: WorkerContext) -> None:
        context.session.execute(insert(arrivals), {"message": message.id, "at": time.monotonic()})


def run(setup: Setup) -> Iterator[Figure]:
    p50_aim, p99_aim = ("<= 10 ms", "<= 25 ms") if setup.engine == "sqlite" else ("<= 3 ms", "")
    number = setup.size(5, 60)
    p50, p99, idle, commits = [], [], [], []
    with database(setup.engine) as url, context(url):
        for table in (arrivals, effects):
            table.create(db.engine)
        with started([sys.executable, "-m", __name__, url]) as process:
            manager = without_workers()
            manager.add(Probe)
            for _ in range(setup.turns):
                latencies = [1000 * latency for latency in probe(setup, manager, number)]
                p50.append(percentile(latencies, 0.5))
                p99.append(percentile(latencies, 0.99))
                commits.append(1000 * median([commit_after_a_pause() for _ in range(number)]))
                idle.append(share_of_a_core(process.pid, setup.size(1, 5)))
    of = "one commit after the same pause"
    yield Figure("to a handler in another process, p50", "ms", p50, of, commits, p50_aim)
    yield Figure("to a handler in another process, p99", "ms", p99, aim=p99_aim)
    yield Figure("that process, waiting", "% of a core", idle, aim="<= 1")


def probe(setup: Setup, manager: BackgroundWorkerManager, number: int) -> list[float]:
    """Send messages to the idle process, one at a time. Return the seconds of each."""
    took = []
    for _ in progress(range(number), f"{setup.engine}: wakeup"):
        pause()
        message = manager.enqueue("probe", None)
        began = time.monotonic()
        db.session.commit()
        took.append(arrival(message) - began)
    with db.engine.connect() as connection:
        found = connection.scalars(select(arrivals.c.message)).all()
    check(len(found) == len(set(found)), "a message arrived twice")
    check_once(number, len(took), len(took), "probes")
    return took


def pause() -> None:
    time.sleep(random.uniform(0.05, 0.12))


def commit_after_a_pause() -> float:
    """Return the seconds of a commit of one row. After a pause, it takes longer than in a loop."""
    pause()
    db.session.execute(insert(effects), {"message": 0})
    began = time.monotonic()
    db.session.commit()
    return time.monotonic() - began


def arrival(message: int | None) -> float:
    deadline = time.monotonic() + 30
    with db.engine.connect() as connection:
        while (at := connection.scalar(select(arrivals.c.at).where(arrivals.c.message == message))) is None:
            connection.rollback()
            check(time.monotonic() < deadline, f"message {message} did not arrive within 30 s")
            time.sleep(0.01)
    return float(at)


def share_of_a_core(pid: int, seconds: float) -> float:
    """Return how many percent of a core the process uses, while nothing happens."""
    time.sleep(0.5)
    process = psutil.Process(pid)
    began, used = time.monotonic(), sum(process.cpu_times()[:2])
    time.sleep(seconds)
    return 100 * (sum(process.cpu_times()[:2]) - used) / (time.monotonic() - began)


if __name__ == "__main__":
    run_until_told(sys.argv[1], Probe)
