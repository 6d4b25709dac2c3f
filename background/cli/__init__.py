"""The commands `flask workers` and `flask messages`."""

from . import workers_run  # noqa: F401 - it adds its commands to `workers_cli`
from .messages import messages_cli
from .workers import workers_cli

__all__ = ["messages_cli", "workers_cli"]
