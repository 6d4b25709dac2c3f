"""An idle instance: processor time, statements and memory, with few workers and with many."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from datetime import timedelta
from typing import Any

import psutil
from sqlalchemy import Engine, event, text

from background.manager import the_manager
from models import db

from ..harness.databases import context, database
from ..harness.figures import Figure, Setup, check, in_turns
from ..harness.processes import idle_workers, run_until_told, started
from .startup import BARE

INSTANCES = 2
START_SECONDS = 13  # after the length of a lease, an instance looks once for rows that a wrong clock delayed
BARE_PROCESS = BARE + "\ncreate_app()\nprint('ready', flush=True)\nimport sys\nsys.stdin.readline()\n"


def run(setup: Setup) -> Iterator[Figure]:
    seconds = setup.size(4, 10)
    for workers in (20,) if setup.is_small else (100, 1_000):
        with database(setup.engine) as url, context(url):
            turns = [idle(url, workers, seconds) for _ in range(1 if setup.is_small else 3)]
        yield Figure(
            "an idle instance", "% of a core", [each["processor"] for each in turns], "an instance without workers",
            [each["without"] for each in turns], at=workers,
        )  # fmt: skip
        more = [each["processor"] - each["without"] for each in turns]
        yield Figure("the same, besides the heartbeat", "% of a core", more, aim="<= 0.1", at=workers)
        yield Figure("statements a heartbeat", "", [each["statements"] for each in turns], aim="= 1", at=workers)
        memory = in_turns(
            setup,
            f"memory with {workers} workers",
            {"ours": lambda workers=workers: ours(setup.engine, workers), "bare": bare_memory},
        )
        aim = "<= 1.25" if workers == 100 else ""
        yield Figure("memory", "MB", memory["ours"], "a bare application", memory["bare"], aim, workers)


def idle(url: str, workers: int, seconds: int) -> dict[str, float]:
    """Return the figures of an instance in an idle fleet, and of an instance without workers."""
    with ExitStack() as started:
        fleet = [started.enter_context(instance(url, workers)) for _ in range(INSTANCES)]
        alone = started.enter_context(instance(url, 0))
        time.sleep(START_SECONDS)
        check(number_alive() == INSTANCES + 1, f"{number_alive()} of {INSTANCES + 1} instances are alive")
        before, began = [counts_of(each) for each in (*fleet, alone)], time.monotonic()
        time.sleep(seconds)
        after, lasted = [counts_of(each) for each in (*fleet, alone)], time.monotonic() - began
    spent = [new["processor"] - old["processor"] for new, old in zip(after, before, strict=True)]
    sent, beats = (after[0][name] - before[0][name] for name in ("statements", "heartbeats"))
    check(beats > 0, "an instance sent no heartbeat")
    with db.engine.connect() as connection:
        ran = connection.scalar(text("SELECT count(*) FROM background_executions"))
        known = connection.scalar(text("SELECT count(*) FROM background_workers"))
    check(ran == 0, f"{ran} runs in an idle fleet")
    check(known == workers, f"{known} of {workers} workers are registered")
    return {
        "processor": 100 * sum(spent[:INSTANCES]) / INSTANCES / lasted,
        "without": max(100 * spent[-1] / lasted, 0.001),
        "statements": sent / beats,
    }


def number_alive() -> int:
    return len(the_manager().instance_history.alive_and_last()[0])


def instance(url: str, workers: int) -> AbstractContextManager["subprocess.Popen[str]"]:
    return started([sys.executable, "-m", __name__, url, str(workers)])


def counts_of(process: "subprocess.Popen[str]") -> dict[str, float]:
    """Ask an instance for its counts of statements and heartbeats, and for its processor time."""
    assert process.stdin is not None
    assert process.stdout is not None
    print("tell", file=process.stdin, flush=True)
    return dict(json.loads(process.stdout.readline()))


def ours(engine: str, workers: int) -> float:
    with database(engine) as url:
        with context(url):
            pass
        with instance(url, workers) as process:
            return megabytes(process.pid)


def bare_memory() -> float:
    with started([sys.executable, "-W", "ignore", "-c", BARE_PROCESS]) as process:
        return megabytes(process.pid)


def megabytes(pid: int) -> float:
    """Return the memory that the process has for itself."""
    return float(psutil.Process(pid).memory_full_info().uss / 1e6)


# -- the process of an instance ------------------------------------------------------------------


def live(url: str, workers: int) -> None:
    """Run an instance whose workers have no tick. Print its counts after each line of input."""
    counts = {"statements": 0, "heartbeats": 0}

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        counts["statements"] += 1
        counts["heartbeats"] += "INSERT INTO background_instances" in statement or "_heartbeat_" in statement

    event.listen(Engine, "before_cursor_execute", note)
    workers_here = idle_workers(workers, "idle", timedelta(days=300))
    run_until_told(url, *workers_here, answer=lambda: json.dumps({**counts, "processor": time.process_time()}))


if __name__ == "__main__":
    live(sys.argv[1], int(sys.argv[2]))
