"""Handles SIGTERM and SIGINT before the server's own handlers, in whichever order they were set.

Servers set their handlers at different times: before the application is made, after it, or around each start. So the
engine's handler stays in place, and calls the handler that the server set. In a process without workers it does
nothing else.
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
    """The manager of one application, which a signal stops."""

    @property
    def is_started(self) -> bool:
        """True while the manager's workers run in this process."""

    def tell(self) -> None:
        """Tell the manager's runs to stop."""

    def hurry(self) -> None:
        """Tell the manager's runs to stop, and no longer wait for them."""

    def stop(self, timeout: float | None = None) -> None:
        """Stop the manager within `timeout` seconds."""


_set, _get = signal.signal, signal.getsignal
_blocked = threading.local()
_handlers: dict[int, Any] = {}
"""For each signal, the handler that the server set, or Python's default."""


def listen() -> None:
    """Handle the signals from now on, also if another handler is set later. Outside the main thread, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        return
    signal.signal, signal.getsignal = _set_handler, _get_handler
    for number in _NUMBERS:
        before = _get(number)
        if before is _handle or before is None or before == signal.SIG_IGN:  # None: other code than Python set it
            continue
        _handlers[number] = before
        _set(number, _handle)
        # A server with its own handler expects that a signal does not interrupt its system calls.
        if hasattr(signal, "siginterrupt"):  # not on Windows
            signal.siginterrupt(number, before in (signal.SIG_DFL, signal.default_int_handler))


def is_heard(number: int) -> bool:
    """Return whether the runs of this process are told to stop before the signal `number` ends it."""
    return _get(number) in (_handle, signal.SIG_IGN)


def stop_when_told(manager: Stoppable) -> None:
    """Stop `manager` before the process exits. On a signal, tell its runs before the server's handler is called."""
    global _notifier
    if _notifier is None or _notifier.process != os.getpid():
        _notifier = _Notifier()
    _notifier.managers.add(manager)
    listen()
    if not is_heard(signal.SIGTERM):
        log.warning(
            "SIGTERM is not heard in this process, so its runs are not told to stop: the application was made in the "
            "thread %r, or the server handles the signal outside Python. Make the application in the main thread, or "
            "run `flask workers run` beside the server with WORKERS_ENABLED=false",
            threading.current_thread().name,
        )


def give_up(why: str, seconds: float) -> None:
    """Hand back all runs of this process, within `seconds`. Call this in a signal handler, before a kill."""
    if _notifier is not None and _notifier.process == os.getpid() and _notifier.is_needed:
        done = threading.Event()
        _notifier.calls.put(lambda: _notifier.give_up(why, done))
        done.wait(seconds)


def hold_back() -> None:
    """Block the signals in this thread until `let_through`. Python loses a signal that comes during a fork."""
    _blocked.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)


def let_through() -> None:
    """Unblock the signals. A signal that came since `hold_back` is delivered now."""
    signal.pthread_sigmask(signal.SIG_SETMASK, _blocked.mask)


def let_through_in_a_child(is_in_a_run: bool) -> None:
    """Unblock the signals in a forked child. If its parent runs workers, a signal ends the child by Python's default.

    A server's handler would not end the child. It may only note the signal, or notify the parent by a shared pipe.
    """
    is_of_workers = is_in_a_run or (_notifier is not None and _notifier.process != os.getpid())
    if is_of_workers:
        signal.set_wakeup_fd(-1)
        for number in _NUMBERS:
            _set(number, signal.SIG_DFL)
    let_through()
    if is_of_workers:
        try:  # not earlier, because Python drops a KeyboardInterrupt in a hook of a fork
            _set(signal.SIGINT, signal.default_int_handler)
        except KeyboardInterrupt:  # the signal came during this call
            _set(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)


class _Notifier:
    """The managers of this process, and the thread that passes signals on to them.

    A handler may interrupt its thread while the thread holds a lock. So the handler takes no lock, and leaves the calls
    to another thread.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self.managers: WeakSet[Stoppable] = WeakSet()
        self.signals = 0
        self.is_ending = False
        self.calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        atexit.register(self._stop)
        threading.Thread(target=self._call, name="signals", daemon=True).start()

    @property
    def is_needed(self) -> bool:
        """True while workers run in this process, or its exit waits for them."""
        return self.is_ending or any(manager.is_started for manager in self.managers)

    def tell(self) -> None:
        for manager in self._started():
            manager.tell()

    def hurry(self) -> None:
        for manager in self._started():
            manager.hurry()

    def give_up(self, why: str, done: threading.Event) -> None:
        log.warning("%s: all runs of this process are handed back", why)
        self.tell()
        for manager in self._started():
            manager.stop(_LAST_WAIT_SECONDS)
        done.set()

    def _stop(self) -> None:
        """Stop the managers at the exit of the process, but not at the exit of a forked child."""
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
            except Exception:  # the thread must go on for the next signal
                log.exception("A call for a signal failed")


_notifier: _Notifier | None = None


def _handle(number: int, frame: FrameType | None) -> None:
    """Tell the runs to stop, then call the server's handler."""
    handler, notifier = _handlers[number], _notifier
    if notifier is None or notifier.process != os.getpid() or not notifier.is_needed:
        _leave_to(handler, number, frame)
        return
    is_default = handler in (signal.SIG_DFL, signal.default_int_handler)
    if is_default:  # a server with its own handler may raise the signal again after it has shut down
        notifier.signals += 1
    # Count the signals here, as `stop` may tell the runs before the first call is made.
    is_second = is_default and (notifier.signals > 1 or notifier.is_ending)
    notifier.calls.put(notifier.hurry if is_second else notifier.tell)
    if is_default and (notifier.is_ending or notifier.signals == 2):  # a second exit would disturb the first
        return
    if handler == signal.SIG_DFL:
        sys.exit(0)
    handler(number, frame)


def _leave_to(handler: Any, number: int, frame: FrameType | None) -> None:
    if getattr(handler, "__module__", None) == "werkzeug._reloader" and _pass_on(number):
        return
    if callable(handler):
        handler(number, frame)
        return
    _set(number, handler)
    signal.raise_signal(number)


def _pass_on(number: int) -> bool:
    """Pass a signal on to the debug reloader's child, which the reloader would kill. The signal ends both processes."""
    if is_running_from_reloader():  # this process is the child
        return False
    lists = [each.read_text() for each in Path("/proc/self/task").glob("*/children")]  # these files exist on Linux
    for child in map(int, " ".join(lists).split()):
        os.kill(child, number)
    return any(lists)


def _set_handler(signalnum: int, handler: Any) -> Any:
    """Replace `signal.signal`, with its parameters. The engine's handler then calls `handler`."""
    if signalnum not in _NUMBERS:
        return _set(signalnum, handler)
    before = _get_handler(signalnum)
    _set(signalnum, handler)  # raises an error for a wrong handler, and outside the main thread
    if handler != signal.SIG_IGN:
        _handlers[signalnum] = handler
        _set(signalnum, _handle)
    return before


def _get_handler(signalnum: int) -> Any:
    """Replace `signal.getsignal`. Return the caller's handler, never the engine's."""
    found = _get(signalnum)
    return _handlers[signalnum] if found is _handle else found
