"""Hears SIGTERM and SIGINT before the server's own handlers, in whichever order they were set.

Servers set their handlers at different times: before the application is made, after it, or around each start. So the
engine's handler stays in place, and calls the one that would be there without it. It does nothing else in a process
without workers.
"""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any, Protocol
from weakref import WeakSet

from werkzeug.serving import is_running_from_reloader

from .logs import logger_of

log = logger_of(__name__)

_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_LAST_WAIT_SECONDS = 0.3


class Stoppable(Protocol):
    """What a signal stops: the manager of one application."""

    @property
    def is_started(self) -> bool:
        """True while its workers run in this process."""

    def tell(self) -> None:
        """Tell its runs to stop."""

    def hurry(self) -> None:
        """Tell its runs to stop, and wait for them no longer."""

    def stop(self, timeout: float | None = None) -> None:
        """Stop it within so many seconds."""


_set, _get = signal.signal, signal.getsignal
_held = threading.local()
_others: dict[int, Any] = {}
"""For each signal, the handler that would be there without the engine's."""


def listen() -> None:
    """Hear the signals from now on, whatever handler is set later. Outside the main thread, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        return
    signal.signal, signal.getsignal = _set_others, _get_others
    for number in _NUMBERS:
        before = _get(number)
        if before is _hear or before is None or before == signal.SIG_IGN:  # None: not set by Python
            continue
        _others[number] = before
        _set(number, _hear)
        # A server that has a handler expects its system calls to go on.
        signal.siginterrupt(number, before in (signal.SIG_DFL, signal.default_int_handler))


def is_heard(number: int) -> bool:
    """Return whether the runs of this process are told of the signal `number` before it ends the process."""
    return _get(number) in (_hear, signal.SIG_IGN)


def stop_when_told(manager: Stoppable) -> None:
    """Stop `manager` before the process exits. On a signal tell the runs first, whatever else the server does then."""
    global _audience
    if _audience is None or _audience.process != os.getpid():
        _audience = _Audience()
    _audience.managers.add(manager)
    listen()
    if not is_heard(signal.SIGTERM):
        log.warning(
            "SIGTERM is not heard in this process, so its runs are not told to stop: the application was made in the "
            "thread %r, or the server handles the signal outside Python. Make the application in the main thread, or "
            "run `flask workers run` beside the server with WORKERS_ENABLED=false",
            threading.current_thread().name,
        )


def give_up(why: str, seconds: float) -> None:
    """Hand back everything, within `seconds`. Call this in a signal handler, before the process is killed."""
    if _audience is not None and _audience.process == os.getpid() and _audience.is_attentive:
        done = threading.Event()
        _audience.calls.put(lambda: _audience.give_up(why, done))
        done.wait(seconds)


def hold_back() -> None:
    """Keep the signals waiting until `let_through`, in this thread: Python forgets one that comes amid a fork."""
    _held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)


def let_through() -> None:
    """Let the signals through again, and those that came since `hold_back`."""
    signal.pthread_sigmask(signal.SIG_SETMASK, _held.mask)


def let_through_in_a_child(is_in_a_run: bool) -> None:
    """Let the signals through in a forked child. If its parent runs workers, they end it as any process of Python's.

    The server's handlers are of no use there: they may only note the signal, or tell the parent by a shared pipe.
    """
    is_of_workers = is_in_a_run or (_audience is not None and _audience.process != os.getpid())
    if is_of_workers:
        signal.set_wakeup_fd(-1)
        for number in _NUMBERS:
            _set(number, signal.SIG_DFL)
    let_through()
    if is_of_workers:  # a KeyboardInterrupt amid the fork would be lost
        _set(signal.SIGINT, signal.default_int_handler)


class _Audience:
    """The managers of this process, and the thread that tells them of signals.

    A handler interrupts its thread anywhere, while that holds any lock. So the handler takes no lock: another thread
    tells.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self.managers: WeakSet[Stoppable] = WeakSet()
        self.heard = 0
        self.is_ending = False
        self.calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        atexit.register(self._stop)
        threading.Thread(target=self._call, name="signals", daemon=True).start()

    @property
    def is_attentive(self) -> bool:
        """True while workers run here, or the exit waits for them."""
        return self.is_ending or any(manager.is_started for manager in self.managers)

    def tell(self) -> None:
        for manager in self._started():
            manager.tell()

    def hurry(self) -> None:
        for manager in self._started():
            manager.hurry()

    def give_up(self, why: str, done: threading.Event) -> None:
        log.warning("%s: what runs here is handed back", why)
        self.tell()
        for manager in self._started():
            manager.stop(_LAST_WAIT_SECONDS)
        done.set()

    def _stop(self) -> None:
        """Stop the managers at the exit of the process, but not at the exit of its forked child."""
        if self.process == os.getpid():
            self.is_ending = True
            for manager in self._started():
                manager.stop()

    def _started(self) -> list[Stoppable]:
        return [manager for manager in self.managers if manager.is_started]

    def _call(self) -> None:
        while True:
            call = self.calls.get()
            try:
                call()
            except Exception:  # the thread must live on for the next signal
                log.exception("Could not do what a signal asked for")


_audience: _Audience | None = None


def _hear(number: int, frame: FrameType | None) -> None:
    """Tell the runs, then call the handler that would be there without the engine."""
    follows, audience = _others[number], _audience
    if audience is None or audience.process != os.getpid() or not audience.is_attentive:
        _leave_to(follows, number, frame)
        return
    is_default = follows in (signal.SIG_DFL, signal.default_int_handler)
    if is_default:  # a server that has a handler may raise the signal again, once it has shut down
        audience.heard += 1
    # Count the signals here: `stop` may have told the runs before the first call is made.
    insists = is_default and (audience.heard > 1 or audience.is_ending)
    audience.calls.put(audience.hurry if insists else audience.tell)
    if is_default and (audience.is_ending or audience.heard == 2):  # another exit would disturb the first
        return
    if follows == signal.SIG_DFL:
        sys.exit(0)
    follows(number, frame)


def _leave_to(follows: Any, number: int, frame: FrameType | None) -> None:
    if getattr(follows, "__module__", None) == "werkzeug._reloader" and _pass_on(number):
        return
    if callable(follows):
        follows(number, frame)
        return
    _set(number, follows)
    signal.raise_signal(number)


def _pass_on(number: int) -> bool:
    """Pass a signal on to the debug reloader's child, which the reloader would kill at once. Both end by it."""
    if is_running_from_reloader():  # this process is the child
        return False
    lists = [each.read_text() for each in Path("/proc/self/task").glob("*/children")]  # Linux has them
    for child in map(int, " ".join(lists).split()):
        os.kill(child, number)
    return any(lists)


def _set_others(signalnum: int, handler: Any) -> Any:
    """Stand in for `signal.signal`, also in its parameters: the caller's handler follows the engine's."""
    if signalnum not in _NUMBERS:
        return _set(signalnum, handler)
    before = _get_others(signalnum)
    _set(signalnum, handler)  # raises its own errors for a wrong handler, and outside the main thread
    if handler != signal.SIG_IGN:
        _others[signalnum] = handler
        _set(signalnum, _hear)
    return before


def _get_others(signalnum: int) -> Any:
    """Stand in for `signal.getsignal`: return the caller's handler, never the engine's."""
    found = _get(signalnum)
    return _others[signalnum] if found is _hear else found
