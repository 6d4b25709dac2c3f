"""The commands `flask workers` and `flask messages`."""

from . import alerts, workers_run  # noqa: F401 - they add their commands to `workers_cli`
from .messages import messages_cli
from .workers import workers_cli

__all__ = ["messages_cli", "workers_cli"]
