"""Processes of a measure: each says when it is ready, and ends when it is told."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from background import PeriodicWorker, WorkerContext
from background.worker import AnyWorker

from .databases import context, without_workers
from .figures import check


@contextmanager
def started(command: list[str], environment: Mapping[str, str] | None = None) -> Iterator["subprocess.Popen[str]"]:
    """Start the process, and wait until it is ready. Tell it to end after the block."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        check(process.stdout.readline() == "ready\n", f"the process did not start: {command[:3]}")
        try:
            yield process
        finally:
            process.communicate("\n", timeout=60)


def run_until_told(url: str, *workers: AnyWorker, answer: Callable[[], object] = lambda: "") -> None:
    """Run these workers alone in this process, until it reads an empty line. Print an answer to each other line."""
    with context(url):
        manager = without_workers()
        for worker in workers:
            manager.add(worker)
        manager.start()
        print("ready", flush=True)
        while sys.stdin.readline().strip():
            print(answer(), flush=True)
        manager.stop()


class Idle(PeriodicWorker):
    """Finds nothing to do."""

    period = timedelta(hours=1)

    def do_work(self, context: WorkerContext) -> None:
        pass


def idle_workers(number: int, name: str, period: timedelta = Idle.period) -> list[type[PeriodicWorker]]:
    """Make `number` workers, whose names begin with `name`."""
    more = {"__doc__": Idle.__doc__, "period": period}
    return [type("Idle", (Idle,), {"name": f"{name}_{each}", **more}) for each in range(number)]
