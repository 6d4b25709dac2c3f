"""The work of each peer's handler: one row, committed at once. Peers import nothing else of this project."""

import os
import sqlite3
import sys
import threading
import time
from typing import Any

DATABASE, REDIS = os.environ["PEERS_DATABASE"], os.environ.get("PEERS_REDIS", "")
IS_SQLITE = not DATABASE.startswith("postgresql")
STATEMENT = "INSERT INTO peer_effects (message, at) VALUES ({0}, {0})".format("?" if IS_SQLITE else "%s")
_local = threading.local()


def connection() -> Any:
    """Return this thread's connection, which commits each statement and prepares a repeated one."""
    if not hasattr(_local, "connection"):
        if IS_SQLITE:
            _local.connection = sqlite3.connect(DATABASE, isolation_level=None, timeout=30)
            _local.connection.execute("PRAGMA synchronous = NORMAL")
        else:
            import psycopg

            _local.connection = psycopg.connect(DATABASE, autocommit=True)
    return _local.connection


def write(message: int) -> None:
    connection().execute(STATEMENT, (message, time.time()))


def order() -> tuple[str, int]:
    """Return what this process must do, "enqueue" or "work", and the number of messages."""
    return sys.argv[1], int(sys.argv[2])
