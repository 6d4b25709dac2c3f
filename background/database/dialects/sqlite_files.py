"""Keeps the files of a SQLite database private, and notices in each process that a file was replaced.

SQLite continues to write into a file that was deleted or moved away. A later process opens another file at the same
path. The two processes would then be two fleets.
"""

import os
import sqlite3
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import InvalidatePoolError, OperationalError

from ...host.forks import ForkSafeLock
from ...host.logs import logger_of

log = logger_of(__name__)

_COMPANIONS = ("-wal", "-shm")
_EXPECTED, _OPENED = "expected_files", "opened_files"
_logged: set[tuple[str, int, int]] = set()


@dataclass(frozen=True, eq=False)
class Opened:
    """A database file as a connection opened it, with its write-ahead log."""

    path: str
    file: os.stat_result
    log_path: str
    log: os.stat_result | None

    @property
    def change(self) -> str | None:
        """The change that took the file from its path. None while the file is there.

        SQLite itself keeps the log for as long as a connection is open.
        """
        if not _is_file(self.path, self.file):
            return "was replaced" if os.path.exists(self.path) else "was deleted"
        if self.log is not None and not _is_file(self.log_path, self.log):
            return "lost its write-ahead log"
        return None

    def set_log_aside(self) -> None:
        """Rename the log of a replaced file, which SQLite would apply to the new file.

        Concurrency: each process that has the old file open may do the same. It renames only the log that it had open.
        """
        if self.log is None or _is_file(self.path, self.file):
            return
        with suppress(FileNotFoundError):
            if _is_file(self.log_path, self.log):
                aside = f"{self.log_path}.replaced"
                os.replace(self.log_path, aside)
                log.warning("The last commits of the file that was replaced are in its write-ahead log, now %s", aside)
                os.unlink(f"{self.log_path.removesuffix('-wal')}-shm")


# The files of open connections only. After a close the log may be deleted, and another file may get its number.
_in_use: WeakSet[Opened] = WeakSet()
_adding = ForkSafeLock()


def watch(engine: Engine) -> None:
    """Refuse to use or commit a connection of `engine` after one of its files was replaced."""
    event.listen(engine, "checkout", _renew)
    event.listen(engine, "commit", _refuse_commit)
    event.listen(engine, "close", _forget)


def expect(record: Any, path: str) -> None:
    """Remember the file at `path`, which the connection of the pool's `record` will open."""
    with _adding:
        known = [each for each in _in_use if each.path == path]
    for each in known:
        each.set_log_aside()
        _log_once(each)
    record.info.setdefault(_EXPECTED, []).append((path, os.stat(path)))


def note(record: Any) -> None:
    """Note that the connection of the pool's `record` has opened the expected files."""
    for path, file in record.info.pop(_EXPECTED, []):
        log_path = f"{os.path.realpath(path)}-wal"  # SQLite follows links and puts the log beside the file itself
        found = os.stat(log_path) if os.path.exists(log_path) else None
        opened = Opened(path, file, log_path, found)
        record.info.setdefault(_OPENED, []).append(opened)
        with _adding:
            _in_use.add(opened)


def is_replaced(connection: Connection) -> bool:
    """Return whether a file that the connection has open is no longer at its path."""
    return any(each.change for each in connection.connection.info.get(_OPENED, []))


def folder(connection: Connection) -> str | None:
    """Return the folder of the file that the connection has open. None if the file is not known."""
    files: list[Opened] = connection.connection.info.get(_OPENED, [])
    return os.path.dirname(files[0].log_path) if files else None


def make_private(path: str, like: str | None = None) -> None:
    """Make a missing file at `path`. Give it and its companions no more rights than `like` has.

    A new file has the mode and the owner of the file `like`. Without that file, only this user may read it. If `like`
    is None, an existing file stays as it is. Raises no error, as SQLite's own error is clearer.
    """
    with suppress(OSError):
        model = os.stat(like) if like is not None and os.path.exists(like) else None
        mode = 0o600 if model is None else stat.S_IMODE(model.st_mode) & 0o666
        with suppress(FileExistsError):
            _make(path, mode, model)
        allowed = mode if like is not None else stat.S_IMODE(os.stat(path).st_mode)
        for each in (path, *(path + suffix for suffix in _COMPANIONS)):
            with suppress(OSError):  # the file is missing, or belongs to another user
                _narrow(each, allowed)


def _make(path: str, mode: int, model: os.stat_result | None) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL, mode)
    try:
        if hasattr(os, "fchmod"):  # not on Windows
            os.fchmod(descriptor, mode)  # whatever the umask is
        if model is not None and hasattr(os, "fchown"):
            os.fchown(descriptor, model.st_uid, model.st_gid)
    finally:
        os.close(descriptor)


def _narrow(path: str, allowed: int) -> None:
    found = stat.S_IMODE(os.stat(path).st_mode)
    if found & ~allowed:
        os.chmod(path, found & allowed)


def _is_file(path: str, opened: os.stat_result) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), opened)
    return False


def _forget(_connection: Any, record: Any) -> None:
    record.info.pop(_OPENED, None)


def _renew(_connection: Any, record: Any, _proxy: Any) -> None:
    """Have the pool open new connections if a file of this connection was replaced."""
    files: list[Opened] = record.info.get(_OPENED, [])
    if any(each.change for each in files):
        for each in files:
            each.set_log_aside()
            _log_once(each)
        raise InvalidatePoolError("A database file was replaced")


def _refuse_commit(connection: Connection) -> None:
    """Raise OperationalError instead of a commit into a file that was replaced."""
    files: list[Opened] = connection.connection.info.get(_OPENED, [])
    for each in files:
        if change := each.change:
            _log_once(each)
            error = sqlite3.OperationalError(
                f"The database file {each.path} {change} after this transaction had begun. "
                "Expected the same file until its end, so nothing was committed: try again."
            )
            raise OperationalError("COMMIT", None, error, connection_invalidated=True)


def _log_once(gone: Opened) -> None:
    """Log a change once in this process, even if many connections had the file open."""
    key, change = (gone.path, gone.file.st_dev, gone.file.st_ino), gone.change
    if change is None or key in _logged:
        return
    _logged.add(key)
    log.warning(
        "The database file %s %s while this process had it open. Nothing more is written into the old file: "
        "this process opens the file at that path now",
        gone.path,
        change,
    )
