"""Draws the output of a command again and again, until Ctrl-C, SIGTERM or the end of the pipe."""

import shutil
import signal
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any

import click
from sqlalchemy.exc import DBAPIError

from ..errors import DatabaseNotReady
from .shared import WrongUsage, not_ready
from .terminal import Screen

_LEAST, _MOST = 0.1, 86_400.0

watch_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--watch",
    "watched",
    is_flag=False,
    flag_value="2",
    metavar="[SECONDS]",
    help="Refresh every SECONDS, by default 2, until Ctrl-C.",
)


def seconds_between(text: str) -> float:
    """Read the value of --watch. Raises WrongUsage."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not _LEAST <= seconds <= _MOST:
        raise WrongUsage(f"--watch is {text!r}; expected a number of seconds from {_LEAST:g} to {_MOST:.0f}.")
    return seconds


def watch(draw: Callable[[], str], seconds: float) -> None:
    """Print `draw()` every `seconds`. In a terminal each picture replaces the one before.

    Go on while the database is away, below one line that says so. Only a database that is away at the start is an
    error.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        picture = draw()
        _show(picture)
        while True:
            time.sleep(seconds)
            try:
                picture = draw()
                _show(picture)
            except (DatabaseNotReady, DBAPIError) as error:
                _show_outage(error if isinstance(error, DatabaseNotReady) else not_ready(error), picture)
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def _show_outage(error: DatabaseNotReady, picture: str) -> None:
    now = Screen(datetime.now(UTC), None).at(datetime.now(UTC))
    line = f"{now}: {error.message}"
    _show(f"{line}\n{picture}" if sys.stdout.isatty() else line)


def _show(picture: str) -> None:
    if not sys.stdout.isatty():
        click.echo(f"{picture}\n")
        return
    click.clear()
    click.echo("\n".join(fitting(picture.splitlines())))


def fitting(lines: list[str]) -> list[str]:
    """Return the first lines, as many as the terminal has room for."""
    columns, most = shutil.get_terminal_size()
    rows = list(accumulate(-(-len(click.unstyle(line)) // columns) or 1 for line in lines))
    if not rows or rows[-1] < most:
        return lines
    kept = [line for line, row in zip(lines, rows, strict=True) if row < most - 1]
    return [*kept, f"... and {len(lines) - len(kept)} more lines"]
