"""Blinker signals for the application. Each is sent after its event is committed.

The sender is the Flask app. A receiver is called in an app context of its own. It runs in the thread of the run, or in
the thread that found the run lost. An error of a receiver is logged and has no other effect. An instance that dies
right after a commit sends nothing. For a reaction that must not be lost, enqueue a message within the run.
"""

from contextvars import Context
from typing import Any

from blinker import NamedSignal, Namespace
from flask import Flask

from .host.forks import ended_in_a_fork
from .host.logs import logger_of

log = logger_of(__name__)

_signals = Namespace()

execution_started = _signals.signal("execution started", "`claim`: the Claim whose run begins now.")
execution_succeeded = _signals.signal("execution succeeded", "`claim`.")
execution_failed = _signals.signal("execution failed", "`claim`, and the `error` that the worker raised.")
execution_lost = _signals.signal(
    "execution lost", "`claim` and `reason`. The instance that found the run lost sends it."
)
execution_handed_back = _signals.signal("execution handed back", "`claim`, and the `reason`, if there is one.")
execution_timed_out = _signals.signal("execution timed out", "`claim`, and the `reason`.")
execution_cancelled = _signals.signal("execution cancelled", "`claim`, and the `reason`, if there is one.")
message_buried = _signals.signal("message buried", "`message` (its id), `topic`, and its last `error` (a text).")

of_state: dict[str, NamedSignal] = {
    "succeeded": execution_succeeded,
    "failed": execution_failed,
    "lost": execution_lost,
    "handed back": execution_handed_back,
    "timed out": execution_timed_out,
    "cancelled": execution_cancelled,
}


def send(app: Flask, signal: NamedSignal, **details: Any) -> None:
    """Call each receiver of `signal` with `details`, outside the run of this thread."""
    for receiver in signal.receivers_for(app):
        Context().run(_call, app, signal, receiver, details)


def _call(app: Flask, signal: NamedSignal, receiver: Any, details: dict[str, Any]) -> None:
    try:
        with app.app_context(), ended_in_a_fork(f"A receiver of the signal {signal.name!r}"):
            receiver(app, **details)
    except KeyboardInterrupt:
        raise
    except BaseException:  # neither an error nor a SystemExit of a receiver may end the run
        log.exception("A receiver of the signal %r failed", signal.name)
