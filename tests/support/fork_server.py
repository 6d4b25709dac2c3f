"""Processes of the shop, forked from a process that has imported everything: a fleet starts within a second."""

import atexit
import ctypes
import gc
import json
import logging
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from time import time
from typing import Any

from support.processes import ROOT, Process, environment, eventually, flask

_CLONE_NEWPID = 0x20000000


class Forked:
    """A child process of the nursery, with the interface of `subprocess.Popen`."""

    def __init__(self, pid: int, ending: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ending = ending  # the nursery writes the exit code here
        self._handle: int | None = None
        with suppress(ProcessLookupError):  # the process may have ended by now
            self._handle = os.pidfd_open(pid)

    def send_signal(self, number: int) -> None:
        if self._handle is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._ending], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = int(os.read(self._ending, 10))
            os.close(self._ending)
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None
        return self.returncode


class Member(Process):
    """One process of the fleet."""

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)
        self.wait_until_frozen()

    def wait_until_frozen(self) -> None:
        assert eventually(lambda: self._state() == "T"), self.output

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> float:
        """Kill the process, as a power cut does. Return the time (Unix seconds)."""
        killed = time()
        self.signal(signal.SIGKILL)
        self.wait()
        return killed

    @property
    def is_up(self) -> bool:
        return self._state() not in ("", "Z")

    def _state(self) -> str:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return ""


class Nursery:
    """Forks processes on request, until the tests end. `more` is added to its environment."""

    def __init__(self, **more: object) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno())]
        self._server = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment(**more), cwd=ROOT
        )
        theirs.close()

    @contextmanager
    def started(self, url: str, *arguments: str, alone: bool = False, **more: object) -> Iterator[Member]:
        """Fork `flask` with `arguments`, by default `workers run`.

        With `alone`, the process has its own namespace of process ids, and its id is 1.
        """
        command = flask(*(arguments or ("workers", "run")))
        with self.forked(command, environment(url, **more), alone=alone) as member:
            yield member

    @contextmanager
    def forked(
        self, command: Sequence[str], env: Mapping[str, str], errors: Path | None = None, alone: bool = False
    ) -> Iterator[Member]:
        """Fork a `python -m MODULE ...`, like `processes.started` but faster. `errors` is a file for standard error."""
        assert list(command[:2]) == [sys.executable, "-m"], command
        order = {"env": env, "arguments": command[2:], "errors": errors and str(errors), "alone": alone}
        (ours, output), (ending, end) = os.pipe(), os.pipe()
        socket.send_fds(self._socket, [json.dumps(order).encode()], [output, end])
        os.close(output)
        os.close(end)
        answer = self._socket.recv(100).decode()
        if not answer.isdigit():
            os.close(ours)
            os.close(ending)
            raise PermissionError(answer)
        member = Member(Forked(int(answer), ending), ours)  # type: ignore[arg-type]
        try:
            yield member
        finally:
            member.end()

    def run(self, command: Sequence[str], env: Mapping[str, str], errors: Path | None = None) -> tuple[int, str]:
        """Do the same as `processes.run`."""
        with self.forked(command, env, errors) as member:
            return member.wait(), member.output

    def close(self) -> None:
        self._socket.close()
        self._server.wait()


class Shops:
    """The processes of one test, all on one database. The end of the test ends all of them."""

    def __init__(self, nursery: Nursery, url: str) -> None:
        self._nursery, self._url = nursery, url
        self._stack = ExitStack()

    def start(self, *arguments: str, **more: Any) -> Member:
        """Start a process, as `Nursery.started` does."""
        return self._stack.enter_context(self._nursery.started(self._url, *arguments, **more))

    def join(self, count: int = 1, **more: Any) -> list[Member]:
        """Start `count` processes, and wait until each has joined the fleet."""
        members = [self.start(**more) for _ in range(count)]
        for member in members:
            member.wait_for("joined with")
        return members

    def close(self) -> None:
        self._stack.close()


def main(orders: socket.socket) -> None:
    ending = Ending()  # before all imports, so that it runs after all their exit handlers
    _import_everything()
    gc.collect()
    gc.freeze()
    children: dict[int, tuple[int, int]] = {}  # by its handle: the process id, and the file for the exit code
    while True:
        for ready in select.select([orders, *children], [], [])[0]:
            if ready is not orders:
                _bury(ready, *children.pop(ready))
                continue
            order, files, *_ = socket.recv_fds(orders, 1_000_000, 2)
            if not order:
                return
            output, end = files
            if (pid := os.fork()) == 0:
                for handle, (_, others) in children.items():
                    os.close(handle)
                    os.close(others)
                os.close(end)
                _become(orders, output, ending, **json.loads(order))
                return
            os.close(output)
            children[os.pidfd_open(pid)] = pid, end


class Ending:
    """Ends a process as an interpreter does, but keeps the memory that the process shares with the nursery.

    Freeing this memory would make the system copy all of it first.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        atexit.register(self._leave)

    def run(self, module: str) -> None:
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            self.code = 0
        except SystemExit as end:
            if end.code is None or isinstance(end.code, int):
                self.code = end.code or 0
            raise

    def _leave(self) -> None:
        """End the process as the last step of the exit. The interpreter handles other endings, such as an error."""
        if self.code is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.code)


_LATE = (  # modules that the application imports on demand
    "apscheduler.triggers.date",
    "background.cli.workers",
    "background.process.supervisor",
    "background.cli.messages",
    "encodings.idna",
    "gunicorn.app.wsgiapp",
    "gunicorn.glogging",
    "gunicorn.workers.gthread",
    "gunicorn.workers.sync",
    "sqlalchemy.dialects.postgresql.psycopg",
    "psycopg",
)


def _import_everything() -> None:
    """Import all modules and make a first application before the fork, so that no child needs to."""
    for name in _LATE:
        import_module(name)
    for command in entry_points(group="flask.commands"):
        command.load()
    from support import cached_url_rules as rules  # noqa: F401

    if not find_spec("app"):  # the engine's tests do not need the shop
        return
    nowhere = logging.NullHandler()  # otherwise the log is set up here, and in none of the children
    logging.getLogger().addHandler(nowhere)
    import_module("app").create_app(
        {"DATABASE_URL": "sqlite://", "SECRET_KEY": "of-the-nursery-6b1e0c2d9f", "TESTING": True}
    )
    logging.getLogger().removeHandler(nowhere)


def _bury(handle: int, pid: int, end: int) -> None:
    os.close(handle)
    _, status = os.waitpid(pid, 0)
    with suppress(BrokenPipeError):  # no caller waits for the exit code
        os.write(end, str(os.waitstatus_to_exitcode(status)).encode())
    os.close(end)


def _become(
    orders: socket.socket,
    output: int,
    ending: Ending,
    env: Mapping[str, str],
    arguments: list[str],
    errors: str | None,
    alone: bool,
) -> None:
    if alone:
        _leave_this_world(orders, output)
    os.setsid()
    orders.send(_own_pid().encode())
    orders.close()
    for number in (1, 2):
        os.dup2(output, number)
    os.close(output)
    if errors:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = env["PYTHONPATH"].split(os.pathsep)
    module, *sys.argv[1:] = arguments
    ending.run(module)


def _leave_this_world(orders: socket.socket, output: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWPID):
        orders.send(f"no namespace of process ids: {os.strerror(ctypes.get_errno())}".encode())
        os._exit(1)
    if child := os.fork():
        orders.close()
        os.close(output)
        os.waitpid(child, 0)
        os._exit(0)


def _own_pid() -> str:
    """Return the process id in the outer namespace."""
    return os.readlink("/proc/self")  # the outer namespace mounted /proc


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
