"""Forked children: a child is not the engine, and has locks and connections of its own."""

import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakSet

from flask import has_app_context
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Engine, event
from sqlalchemy.pool import Pool

from ..errors import first_line
from .listeners import is_new
from .logs import logger_of

log = logger_of(__name__)

_sockets: WeakSet[Any] = WeakSet()
_of_parents: list[object] = []
"""Objects that a child keeps for ever. A freed connection would send a last packet on the parent's socket."""
_locks: "WeakSet[ForkSafeLock]" = WeakSet()


class ForkSafeLock:
    """A lock that is free in a forked child, even if a thread of the parent held it during the fork."""

    def __init__(self, kind: Callable[[], Any] = threading.Lock) -> None:
        self._kind, self._lock = kind, kind()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def renew(self) -> None:
        self._lock = self._kind()


def _renew_locks() -> None:
    for lock in _locks:
        lock.renew()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_renew_locks)


@contextmanager
def ended_in_a_fork(what: str) -> Iterator[Callable[[], None]]:
    """Run the user's code in this block. A forked child that leaves the block ends there.

    The parent goes on as the engine, so the child must not. `os._exit` runs no handler and closes no connection.
    The block may call the yielded function, which ends a child at once.
    """
    began_in = os.getpid()

    def end_child() -> None:
        if os.getpid() != began_in:
            _end(what, None)

    try:
        yield end_child
    except BaseException as error:
        if os.getpid() != began_in:
            _end(what, error)
        raise
    end_child()


def _end(what: str, error: BaseException | None) -> None:
    code = 0 if error is None else 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    came_back = f"raised {type(error).__name__}: {first_line(error)}" if error else "returned"
    try:
        log.warning(
            "%s forked, and the child process %d returned (%s). It ends here, and nothing that it did is committed. "
            "End such a child with os._exit(), or start a process with subprocess or multiprocessing",
            what,
            os.getpid(),
            came_back,
        )
    finally:
        os._exit(code & 0xFF)


def watch_sockets() -> None:
    """Note each later socket to a database server, of all engines of this process."""
    if is_new(Pool, _connected):
        event.listen(Pool, "connect", _connected)


def _connected(connection: Any, _record: Any) -> None:
    if hasattr(connection, "fileno"):  # SQLite's connections have no socket
        _sockets.add(connection)


def begin_anew(db: SQLAlchemy, engines: Iterable[Engine], *kept: object) -> None:
    """Give a forked child a session and connections of its own. Keep the parent's, and the `kept` objects."""
    _of_parents.extend(kept)
    for engine in engines:
        _of_parents.append(engine.pool)
        engine.dispose(close=False)
    if has_app_context() and db.session.registry.has():
        _of_parents.append(db.session())
        db.session.registry.clear()


def cut_off() -> None:
    """Replace each inherited socket by an unconnected one, in a forked child of a run.

    The child can then send nothing to the database server on its parent's connections. When the parent dies, its
    connections end, even if the child still runs.
    """
    for connection in list(_sockets):
        with suppress(Exception), socket.socket() as unconnected:  # the connection may be closed
            os.dup2(unconnected.fileno(), connection.fileno(), inheritable=False)
    _sockets.clear()
