"""Processes of the shop, forked from one that has imported everything: a fleet of them is up in a second."""

import ctypes
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import time
from typing import Any

from processes import ROOT, Process, environment, eventually

_CLONE_NEWPID = 0x20000000


class Forked:
    """A process that is not our child, as if it were a `subprocess.Popen`; how it ended is not known."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._handle: int | None = None
        with suppress(ProcessLookupError):  # it may have ended by now
            self._handle = os.pidfd_open(pid)

    def send_signal(self, number: int) -> None:
        if self._handle is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)

    def wait(self, timeout: float | None = None) -> int:
        if self._handle is not None:
            if not select.select([self._handle], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            os.close(self._handle)
            self._handle = None
        return 0


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
        """As a power cut does; returns when that was (Unix seconds)."""
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
    """Forks what it is asked for; ends with the tests."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno())]
        self._server = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment(), cwd=ROOT)
        theirs.close()

    @contextmanager
    def started(self, url: str, *arguments: str, alone: bool = False, **more: object) -> Iterator[Member]:
        """`flask` with `arguments`, by default `workers run`; `alone` in its world, its process id is 1."""
        ours, output = os.pipe()
        order = {"env": environment(url, **more), "arguments": arguments or ("workers", "run"), "alone": alone}
        socket.send_fds(self._socket, [json.dumps(order).encode()], [output])
        os.close(output)
        answer = self._socket.recv(100).decode()
        if not answer.isdigit():
            os.close(ours)
            raise PermissionError(answer)
        member = Member(Forked(int(answer)), ours)  # type: ignore[arg-type]
        try:
            yield member
        finally:
            member.end()

    def close(self) -> None:
        self._socket.close()
        self._server.wait()


class Shops:
    """The processes of one test, all on one database; none is left behind."""

    def __init__(self, nursery: Nursery, url: str) -> None:
        self._nursery, self._url = nursery, url
        self._stack = ExitStack()

    def start(self, *arguments: str, **more: Any) -> Member:
        """See `Nursery.started`."""
        return self._stack.enter_context(self._nursery.started(self._url, *arguments, **more))

    def join(self, count: int = 1, **more: Any) -> list[Member]:
        """So many, which have all joined the fleet."""
        members = [self.start(**more) for _ in range(count)]
        for member in members:
            member.wait_for("joined with")
        return members

    def close(self) -> None:
        self._stack.close()


def main(orders: socket.socket) -> None:
    import app  # noqa: F401 - whatever an import brings is there before the fork
    import background.membership  # noqa: F401

    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        order, outputs, *_ = socket.recv_fds(orders, 1_000_000, 1)
        if not order:
            return
        if os.fork() == 0:
            _become(orders, outputs[0], **json.loads(order))
            return
        os.close(outputs[0])


def _become(orders: socket.socket, output: int, env: Mapping[str, str], arguments: list[str], alone: bool) -> None:
    if alone:
        _leave_this_world(orders)
    os.setsid()
    orders.send(_own_pid().encode())
    orders.close()
    for number in (1, 2):
        os.dup2(output, number)
    os.close(output)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["flask", *arguments]

    from flask.cli import main as flask

    flask()


def _leave_this_world(orders: socket.socket) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWPID):
        orders.send(f"no namespace of process ids: {os.strerror(ctypes.get_errno())}".encode())
        os._exit(1)
    if os.fork():
        os._exit(0)


def _own_pid() -> str:
    """As those outside know it."""
    return os.readlink("/proc/self")  # of a /proc that was mounted outside


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
