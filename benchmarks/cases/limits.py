"""The limits of the machine: a synchronized write, a round trip, and a commit of one row."""

import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psycopg

from ..harness.databases import database, driver_address
from ..harness.figures import Figure, Setup, check, in_turns


def run(setup: Setup) -> Iterator[Figure]:
    number = setup.size(50, 2_000)
    with database(setup.engine) as url:
        address = driver_address(url)
        ways = {"fdatasync": lambda: number / synchronized_writes(number)}
        if setup.engine == "sqlite":
            ways["round trip"] = lambda: rate(number * 10, on_sqlite(address), selects)
            for level in ("NORMAL", "FULL"):
                ways[f"commit, synchronous {level}"] = lambda level=level: rate(
                    number, on_sqlite(address, level), commits
                )
        else:
            ways["round trip"] = lambda: rate(number * 2, on_postgresql(address), selects)
            ways["commit"] = lambda: rate(number, on_postgresql(address), commits)
        for name, values in in_turns(setup, "limits", ways).items():
            yield Figure(name, "a second", values)


def synchronized_writes(number: int) -> float:
    with tempfile.NamedTemporaryFile(prefix="bookstore-benchmark-") as file:
        began = time.perf_counter()
        for _ in range(number):
            os.write(file.fileno(), b"x" * 4096)
            os.fdatasync(file.fileno())
        return time.perf_counter() - began


def on_sqlite(path: str, level: str = "NORMAL") -> Any:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA synchronous = {level}")
    return connection


def on_postgresql(address: str) -> Any:
    return psycopg.connect(address, autocommit=True, prepare_threshold=None)


def rate(number: int, connection: Any, work: Callable[[Any, int], float]) -> float:
    """Return how many of `number` steps are done in a second. The work returns its seconds."""
    with closing(connection):
        return number / work(connection, number)


def selects(connection: Any, number: int) -> float:
    began = time.perf_counter()
    for _ in range(number):
        connection.execute("SELECT 1").fetchone()
    return time.perf_counter() - began


def commits(connection: Any, number: int) -> float:
    kind, value = ("INTEGER", "?") if isinstance(connection, sqlite3.Connection) else ("bigserial", "%s")
    connection.execute("DROP TABLE IF EXISTS limits")
    connection.execute(f"CREATE TABLE limits (id {kind} PRIMARY KEY, at bigint)")
    began = time.perf_counter()
    for each in range(number):
        connection.execute(f"INSERT INTO limits (at) VALUES ({value})", (each,))
    seconds = time.perf_counter() - began
    [found] = connection.execute("SELECT count(*) FROM limits").fetchone()
    check(found == number, f"{found} of {number} commits are in the table")
    return seconds
