"""Starts a command as an operator does, reads its output, signals it, and returns its exit code."""

import fcntl
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[2]
PATIENCE = float(os.environ.get("TEST_PATIENCE", "60"))
"""Seconds that a busy machine may take for an event that should happen within one."""

PRODUCTION = {"SECRET_KEY": "of-the-tests-4f1d9a7c3be2", "PUBLIC_URL": "https://localhost"}
"""The settings without which no server of a DATABASE_URL starts."""
WITHOUT_WARNINGS = PRODUCTION | {
    "METRICS_TOKEN": "of-the-tests-9b21c07d5e",
    "MAIL_URL": "smtp://127.0.0.1:9",
    "PROXIES": "1",
}
"""The settings of a server that does not even warn."""

Found = TypeVar("Found")


def margin(seconds: float = 2.0) -> float:
    """Return the seconds that this machine may add to a promised time: `seconds`, or more while it is overloaded."""
    return seconds * max(1.0, os.getloadavg()[0] / (2 * (os.cpu_count() or 1)))


def environment(database_url: str | None = None, **more: object) -> dict[str, str]:
    """Return this environment without the shop's settings, with short heartbeats, and with `more` on top."""
    own = ("FLASK_", "WORKERS_", "WERKZEUG_", "PROBE_", "GUNICORN_", "WEB_", "DATABASE_URL", "LOG_LEVEL", "PRODUCTION")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    ours: dict[str, object] = {
        "FLASK_APP": ROOT / "tests" / "support" / "traced_app.py",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        "FLASK_SKIP_DOTENV": 1,
        "PYTHONUNBUFFERED": 1,
        **PRODUCTION,
        "WORKERS_HEARTBEAT_SECONDS": 0.2,
        "WORKERS_LEASE_SECONDS": 5,
        "WORKERS_SHUTDOWN_SECONDS": 2,
    }
    if database_url is not None:
        ours["DATABASE_URL"] = database_url
    return kept | {name: str(value) for name, value in (ours | more).items()}


def copy_project(folder: Path) -> Path:
    """Copy the project's tracked files to `folder`. Return the folder."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def flask(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "flask", *arguments]


def gunicorn(*arguments: str) -> list[str]:
    """Return the command of gunicorn, which reads the project's own gunicorn.conf.py by itself."""
    return [sys.executable, "-m", "gunicorn", "--no-control-socket", "-b", "127.0.0.1:0", *arguments]


class Process:
    """One started command: its output so far, and its end."""

    def __init__(self, popen: "subprocess.Popen[bytes]", output: int) -> None:
        self._popen, self._output = popen, output
        self._changed = threading.Condition()
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def output(self) -> str:
        with self._changed:
            return "\n".join(self._lines)

    def wait_for(self, pattern: str, times: int = 1, timeout: float = PATIENCE) -> re.Match[str]:
        """Return the `times`th match of `pattern` in the output. Fail with the output if the match does not come."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                matches = [match for line in self._lines if (match := re.search(pattern, line))]
                if len(matches) >= times:
                    return matches[times - 1]
                left = deadline - time.monotonic()
                if left <= 0 or not self._reader.is_alive():
                    raise AssertionError(f"{pattern!r} was not said {times} times in:\n" + "\n".join(self._lines))
                self._changed.wait(min(left, 0.1))

    def signal(self, number: int) -> None:
        """Signal this process only."""
        self._popen.send_signal(number)

    def signal_group(self, number: int) -> None:
        """Signal this process and all processes that it started, as a terminal does on Ctrl-C."""
        os.killpg(self.pid, number)

    def type(self, text: str) -> None:
        """Type the text on the terminal of the process."""
        os.write(self._output, text.encode())

    def wait(self, timeout: float = PATIENCE) -> int:
        """Return the exit code, after the process has ended and all its output is read."""
        try:
            code = self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"It did not end within {timeout} s:\n{self.output}") from None
        self._reader.join(PATIENCE)
        return code

    def end(self) -> None:
        """Kill the process and all processes that it started."""
        with suppress(ProcessLookupError):
            self.signal_group(signal.SIGKILL)
        self._popen.wait()
        self._reader.join(PATIENCE)

    def _read(self) -> None:
        rest = b""
        with suppress(OSError):  # a pseudo-terminal reports a closed other side like this
            while chunk := os.read(self._output, 65_536):
                *lines, rest = (rest + chunk).split(b"\n")
                self._said(lines)
        self._said([rest] if rest else [])
        os.close(self._output)

    def _said(self, lines: list[bytes]) -> None:
        with self._changed:
            self._lines += [line.decode(errors="replace").rstrip("\r") for line in lines]
            self._changed.notify_all()


@contextmanager
def started(
    command: Sequence[str], env: Mapping[str, str], cwd: Path = ROOT, terminal: bool = False, columns: int = 80
) -> Iterator[Process]:
    """Start `command` in a session (and process group) of its own, with `terminal` on a terminal of its own."""
    theirs, ours = _terminal(columns) if terminal else _pipe()
    popen = subprocess.Popen(
        command,
        env=dict(env),
        cwd=cwd,
        stdin=theirs if terminal else subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=_take_terminal if terminal else None,
    )
    os.close(theirs)
    process = Process(popen, ours)
    try:
        yield process
    finally:
        process.end()


def run(command: Sequence[str], env: Mapping[str, str], cwd: Path = ROOT) -> tuple[int, str]:
    """Return the command's exit code and all its output."""
    with started(command, env, cwd) as process:
        return process.wait(), process.output


def eventually(look: Callable[[], Found], timeout: float = PATIENCE, pause: float = 0.05) -> Found:
    """Call `look` until it returns a true value or the time is over. Return its last value."""
    deadline = time.monotonic() + timeout
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(pause)
    return found


def _pipe() -> tuple[int, int]:
    ours, theirs = os.pipe()
    return theirs, ours


def _terminal(columns: int) -> tuple[int, int]:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    return theirs, ours


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
