"""A forked child of a run: it is not the engine, and its parent's connections are not its own."""

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakSet

from flask import has_app_context
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Engine, event
from sqlalchemy.pool import Pool

from ..errors import first_line
from .logs import logger_of

log = logger_of(__name__)

_CHILDS_PATIENCE_SECONDS = 1.0

_sockets: WeakSet[Any] = WeakSet()
_of_parents: list[object] = []
"""Kept in the child for ever: a freed connection would send a last packet on the socket that the parent uses."""


@contextmanager
def ended_in_a_fork(what: str) -> Iterator[None]:
    """Run the user's code in this block. A forked child that leaves the block ends there, at once.

    The child must not go on as the engine: its parent does. `os._exit` runs no handler and closes no connection.
    """
    began_in = os.getpid()
    try:
        yield
    except BaseException as error:
        if os.getpid() != began_in:
            _end(what, error)
        raise
    if os.getpid() != began_in:
        _end(what, None)


def _end(what: str, error: BaseException | None) -> None:
    code = 0 if error is None else 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    came_back = f"raised {type(error).__name__}: {first_line(error)}" if error else "returned"
    try:
        log.warning(
            "%s forked, and the child process %d came back (%s). It ends here, and nothing that it did is committed. "
            "End such a child with os._exit(), or start a process with subprocess or multiprocessing",
            what,
            os.getpid(),
            came_back,
        )
    finally:
        os._exit(code & 0xFF)


def watch_sockets() -> None:
    """Note each socket to a database server from now on, of all engines of this process."""
    if not event.contains(Pool, "connect", _connected):
        event.listen(Pool, "connect", _connected)


def _connected(connection: Any, _record: Any) -> None:
    if hasattr(connection, "fileno"):  # SQLite's connections have no socket
        _sockets.add(connection)


def begin_anew(db: SQLAlchemy, engines: Iterable[Engine], *kept: object) -> None:
    """Give a forked child a session and connections of its own. Keep its parent's, and `kept`."""
    _of_parents.extend(kept)
    for engine in engines:
        _of_parents.append(engine.pool)
        engine.dispose(close=False)
    if has_app_context() and db.session.registry.has():
        _of_parents.append(db.session())
        db.session.registry.clear()


def cut_off(engines: Iterable[Engine]) -> None:
    """Replace each inherited socket by an unconnected one, in a forked child of a run.

    Nothing that the child does with a connection of its parent's reaches the database server. When the parent dies, its
    connections end, though the child lives on.
    """
    for connection in list(_sockets):
        with suppress(Exception), socket.socket() as unconnected:  # the connection may be closed by now
            os.dup2(unconnected.fileno(), connection.fileno(), inheritable=False)
    _sockets.clear()
    for engine in engines:
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _be_impatient)


def _be_impatient(connection: Any, _record: Any) -> None:
    """Wait only briefly for a lock.

    SQLite keeps its locks in memory too. A lock that the parent held at the fork stays held in the child for ever.
    """
    connection.execute(f"PRAGMA busy_timeout = {_CHILDS_PATIENCE_SECONDS * 1000:.0f}")
