"""Requests a second while 100 workers run, beside the same application without workers."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

from flask import Flask

import app as shop
from background.manager import the_manager

from ..harness.databases import SETTINGS, context, database
from ..harness.figures import Figure, Setup, check, in_turns, percentile
from ..harness.processes import idle_workers

WORKERS = 100
PERIOD = 60  # seconds: ordinary workers
CLIENTS = 4
REQUEST = b"GET /nothing HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n"


def create_app() -> Flask:
    """Make the application with 100 workers, and a page that does nothing."""
    app = shop.create_app()
    with app.app_context():
        manager = the_manager()
        for worker in idle_workers(WORKERS, "ordinary", timedelta(seconds=PERIOD)):
            manager.add(worker)
    app.add_url_rule("/nothing", view_func=lambda: "nothing")
    return app


def run(setup: Setup) -> Iterator[Figure]:
    with database(setup.engine) as url:
        with context(url):
            pass  # makes the tables
        p99: dict[str, list[float]] = {"true": [], "false": []}

        def measure(enabled: str) -> float:
            rate, slowest = measured(url, enabled, setup.size(1, PERIOD))
            p99[enabled].append(slowest)
            return rate

        few = replace(setup, turns=min(setup.turns, 3))  # each turn takes two minutes
        rates = in_turns(few, "web", {enabled: lambda enabled=enabled: measure(enabled) for enabled in p99})
        of, aim = "the same without workers", ">= 0.95"
        yield Figure(
            f"requests, {WORKERS} workers each {PERIOD} s", "requests/s", rates["true"], of, rates["false"], aim
        )
        yield Figure("p99 of these requests", "ms", p99["true"], of, p99["false"])


def measured(url: str, enabled: str, seconds: int) -> tuple[float, float]:
    """Return the requests in a second, and their p99 in milliseconds."""
    with served(url, enabled) as port:
        took: list[float] = []
        ended = time.monotonic() + seconds
        clients = [threading.Thread(target=ask_until, args=(port, ended, took)) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    check(len(took) > 0, "no request was answered")
    return len(took) / seconds, 1000 * percentile(took, 0.99)


@contextmanager
def served(url: str, enabled: str) -> Iterator[int]:
    """Serve by two sync workers. Yield the port."""
    command = [sys.executable, "-m", "gunicorn", "--workers", "2", "--bind", "127.0.0.1:0", "--log-level", "info"]
    environment = {**os.environ, **SETTINGS, "DATABASE_URL": url, "WORKERS_ENABLED": enabled, "GUNICORN_CMD_ARGS": ""}
    command += ["benchmarks.cases.web:create_app()"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        port = None
        for line in process.stderr:
            if found := re.search(r"Listening at: http://127\.0\.0\.1:(\d+)", line):
                port = int(found[1])
                break
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        try:
            check(port is not None, "gunicorn did not start")
            assert port is not None
            for _ in range(20):  # both workers answer, and their workers have started
                ask(port)
            time.sleep(1)
            yield port
        finally:
            process.terminate()
            process.wait(60)
            drain.join()


def ask_until(port: int, ended: float, took: list[float]) -> None:
    while time.monotonic() < ended:
        began = time.perf_counter()
        ask(port)
        took.append(time.perf_counter() - began)


def ask(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(REQUEST)
        answer = b""
        while part := connection.recv(65_536):
            answer += part
    check(answer.startswith(b"HTTP/1.0 200") or answer.startswith(b"HTTP/1.1 200"), f"answered: {answer[:80]!r}")
