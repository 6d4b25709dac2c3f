"""The limits of the machine: a synchronized write, a round trip, and a commit of one row."""

import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import psycopg
from sqlalchemy import make_url

from ..harness.databases import database
from ..harness.figures import Figure, Setup, check, in_turns


def run(setup: Setup) -> Iterator[Figure]:
    number = setup.size(50, 2_000)
    with database(setup.engine) as url:
        ways = {"fdatasync": lambda: rate(number, synchronized_writes)}
        if setup.engine == "sqlite":
            path = str(make_url(url).database)
            ways["round trip"] = lambda: rate(number * 10, lambda count: selects_on_sqlite(path, count))
            for level in ("NORMAL", "FULL"):
                ways[f"commit, synchronous {level}"] = lambda level=level: rate(
                    number, lambda count: commits_on_sqlite(path, level, count)
                )
        else:
            address = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
            ways["round trip"] = lambda: rate(number * 2, lambda count: selects_on_postgresql(address, count))
            ways["commit"] = lambda: rate(number, lambda count: commits_on_postgresql(address, count))
        for name, values in in_turns(setup, "limits", ways).items():
            yield Figure(name, "a second", values)


def rate(number: int, work: Callable[[int], float]) -> float:
    """Return how many of `number` steps are done in a second. The work returns its seconds."""
    return number / work(number)


def synchronized_writes(number: int) -> float:
    with tempfile.NamedTemporaryFile(prefix="bookstore-benchmark-") as file:
        began = time.perf_counter()
        for _ in range(number):
            os.write(file.fileno(), b"x" * 4096)
            os.fdatasync(file.fileno())
        return time.perf_counter() - began


def selects_on_sqlite(path: str, number: int) -> float:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        began = time.perf_counter()
        for _ in range(number):
            connection.execute("SELECT 1").fetchone()
        return time.perf_counter() - began


def commits_on_sqlite(path: str, level: str, number: int) -> float:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {level}")
        connection.execute("DROP TABLE IF EXISTS limits")
        connection.execute("CREATE TABLE limits (id INTEGER PRIMARY KEY, at INTEGER)")
        began = time.perf_counter()
        for each in range(number):
            connection.execute("INSERT INTO limits (at) VALUES (?)", (each,))
        seconds = time.perf_counter() - began
        check(
            connection.execute("SELECT count(*) FROM limits").fetchone() == (number,), "commits on SQLite are missing"
        )
    return seconds


def selects_on_postgresql(address: str, number: int) -> float:
    with psycopg.connect(address, autocommit=True, prepare_threshold=None) as connection:
        began = time.perf_counter()
        for _ in range(number):
            connection.execute("SELECT 1").fetchone()
        return time.perf_counter() - began


def commits_on_postgresql(address: str, number: int) -> float:
    with psycopg.connect(address, autocommit=True, prepare_threshold=None) as connection:
        connection.execute("DROP TABLE IF EXISTS limits")
        connection.execute("CREATE TABLE limits (id bigserial PRIMARY KEY, at bigint)")
        began = time.perf_counter()
        for each in range(number):
            connection.execute("INSERT INTO limits (at) VALUES (%s)", (each,))
        seconds = time.perf_counter() - began
        [found] = connection.execute("SELECT count(*) FROM limits").fetchone() or [0]
        check(found == number, "commits on PostgreSQL are missing")
    return seconds
