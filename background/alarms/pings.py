"""Pings to a dead-man's switch, such as healthchecks.io or a Sentry monitor: a run started, succeeded or failed.

The switch raises the alarm if no ping arrives. So it also notices a fleet that is gone.
"""

import atexit
import threading
from collections import deque
from functools import partial
from urllib.parse import quote, urlsplit, urlunsplit

from blinker import NamedSignal
from flask import Flask

from .. import signals
from ..errors import first_line
from ..host.forks import ForkSafeLock
from ..host.logs import Outage, logger_of
from ..ledger.claim import Claim
from ..manager import BackgroundWorkerManager
from ..worker import AnyWorker, PeriodicWorker, attempt_after
from .webhook import AlertNotSent, send

log = logger_of(__name__)

STARTED, SUCCEEDED, FAILED = "started", "succeeded", "failed"
_PATHS = {STARTED: "/start", SUCCEEDED: "", FAILED: "/fail"}  # of healthchecks.io
_STATUSES = {STARTED: "in_progress", SUCCEEDED: "ok", FAILED: "error"}  # of Sentry's monitors
_SIGNALS: dict[NamedSignal, str] = {
    signals.execution_started: STARTED,
    signals.execution_succeeded: SUCCEEDED,
    signals.execution_failed: FAILED,
    signals.execution_timed_out: FAILED,
    signals.execution_lost: FAILED,
}
_MOST_WAITING = 1_000
_ATTEMPTS = 3
_LAST_PINGS_SECONDS = 5.0


class Pings:
    """Sends the pings of one process, on a thread of their own. A ping never delays or fails a run."""

    def __init__(self, manager: BackgroundWorkerManager) -> None:
        self._manager, self._url = manager, manager.app.config["PING_URL"]
        self._is_connected = False
        self._waiting: deque[str] = deque(maxlen=_MOST_WAITING)  # the oldest ping is dropped
        self._changing = ForkSafeLock()
        self._thread: threading.Thread | None = None
        self._outage = Outage()

    def follow(self, worker: AnyWorker) -> None:
        """Follow the runs of the worker, if it has a ping_url or the setting PING_URL is for all workers."""
        if self._is_connected or not (issubclass(worker, PeriodicWorker) and self._url_of(worker)):
            return
        self._is_connected = True
        for signal in _SIGNALS:
            signal.connect(partial(self._hear, signal), sender=self._manager.app, weak=False)
        atexit.register(self.wait)

    def _url_of(self, worker: type[PeriodicWorker]) -> str | None:
        return self._url if worker.ping_url is None else worker.ping_url

    def _hear(self, signal: NamedSignal, _app: Flask, claim: Claim, **_: object) -> None:
        worker = self._manager.workers.get(claim.worker)
        if worker is None or (signal is signals.execution_lost and attempt_after(worker, claim.attempt)):
            return  # the next attempt decides
        if url := self._url_of(worker):
            self._put(address(url, claim.worker, _SIGNALS[signal]))

    def _put(self, url: str) -> None:
        with self._changing:
            self._waiting.append(url)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._send_all, name="workers-pings", daemon=True)
                self._thread.start()

    def _send_all(self) -> None:
        while True:
            with self._changing:
                if not self._waiting:
                    self._thread = None
                    return
                url = self._waiting.popleft()
            self._send(url)

    def _send(self, url: str) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                send(url)
            except AlertNotSent as error:
                if attempt == _ATTEMPTS:
                    log.log(self._outage.level(), "A ping was not taken: %s", first_line(error))
            else:
                self._outage.ended()
                return

    def wait(self, seconds: float = _LAST_PINGS_SECONDS) -> None:
        """Wait until no ping waits, at the end of the process."""
        if (thread := self._thread) is not None and thread.is_alive():
            thread.join(seconds)


def address(url: str, worker: str, event: str) -> str:
    """Return the address of a ping: by `{status}` if the URL has it, else by the paths of healthchecks.io."""
    url = url.replace("{worker}", quote(worker.lower().replace(".", "-")))
    if "{status}" in url:
        return url.replace("{status}", _STATUSES[event])
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") + _PATHS[event]))
