"""Helpers for the tests of your own workers. `background.testing.plugin` has fixtures for pytest."""

from .clock import Clock
from .messages import Drained, assert_enqueued, assert_not_enqueued, drain
from .runs import TickNotRun, run_worker, running, worker_context

__all__ = [
    "Clock",
    "Drained",
    "TickNotRun",
    "assert_enqueued",
    "assert_not_enqueued",
    "drain",
    "run_worker",
    "running",
    "worker_context",
]
