"""Connections that wait for SQLite's write lock, and the question whether one waits.

SQLite does not show this, because a waiting connection only tries again and again. So each connection holds a shared
lock on the database's folder while it takes the write lock. Processes of an older release do not.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

try:
    import fcntl
except ImportError:  # on Windows
    fcntl: Any = None  # type: ignore[no-redef]


@contextmanager
def waiting(folder: str | None) -> Iterator[None]:
    """Show every process that a connection to a database in `folder` takes the write lock in this block."""
    opened = _lock(folder, exclusively=False)
    try:
        yield
    finally:
        if opened is not None:
            os.close(opened)


def is_awaited(folder: str) -> bool:
    """Return whether a connection waits for the write lock. True if this system cannot say."""
    opened = _lock(folder, exclusively=True)
    if opened is not None:
        os.close(opened)
    return opened is None


def _lock(folder: str | None, *, exclusively: bool) -> int | None:
    """Lock the folder without waiting. Return a descriptor, which ends the lock when it is closed, or None."""
    if fcntl is None or folder is None:
        return None
    opened = None
    try:
        opened = os.open(folder, os.O_RDONLY)
        fcntl.flock(opened, (fcntl.LOCK_EX if exclusively else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError:
        if opened is not None:
            os.close(opened)
        return None
    return opened
