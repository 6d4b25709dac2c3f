"""Shared parts of the command groups: their errors, the manager they ask, their options and their JSON."""

import sys
from collections.abc import Collection
from datetime import datetime
from io import TextIOWrapper
from typing import Any

import click
from flask.cli import AppGroup, ScriptInfo
from sqlalchemy.exc import DBAPIError

from ..errors import DatabaseNotReady, first_line, spelled_out
from ..history.text import moment
from ..host import strict_json
from ..manager import BackgroundWorkerManager, the_manager

MOST_ROWS = 10_000


class WorkersGroup(AppGroup):
    """Prints one sentence for an error of the database, and leaves no connection of the engine's open.

    Unlike Click's, its errors do not repeat what would steer a terminal.
    """

    def invoke(self, context: click.Context) -> Any:
        write_anything()
        manager = context.ensure_object(ScriptInfo).load_app().extensions["background_workers"]
        try:
            return super().invoke(context)
        except DBAPIError as error:
            raise not_ready(error) from None
        except click.UsageError as error:
            raise click.UsageError(spelled_out(error.format_message()), error.ctx) from None
        finally:
            if not manager.is_started:
                manager.stop()


def write_anything() -> None:
    """Escape the characters that the terminal's encoding lacks, instead of failing on them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


class WrongUsage(click.ClickException):
    exit_code = 2


as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def checked_manager() -> BackgroundWorkerManager:
    """The manager, if its database is ready; nothing is changed to make it so."""
    manager = the_manager()
    try:
        manager.check()
    except OSError as error:
        raise not_ready(error) from None
    return manager


def not_ready(error: Exception) -> DatabaseNotReady:
    """Convert an error of the database or its file to DatabaseNotReady."""
    return DatabaseNotReady(f"The database cannot be used ({first_line(error)}). `flask workers check` tries again.")


def row_limit(text: str) -> int:
    """The number given to --limit. Raises WrongUsage."""
    if not (text.isascii() and text.isdigit() and len(text) < 1_000 and 1 <= int(text) <= MOST_ROWS):
        raise WrongUsage(f"--limit is {text!r}; expected a whole number from 1 to {MOST_ROWS}.")
    return int(text)


def one_state(text: str | None, states: Collection[str]) -> str | None:
    """The one of `states` that --state names ("handed-back" will do); None without it. Raises WrongUsage."""
    state = text and text.strip().lower().replace("-", " ").replace("_", " ")
    if state is not None and state not in states:
        raise WrongUsage(f"--state is {text!r}; expected one of: {', '.join(states)}.")
    return state


def print_json(value: Any) -> None:
    """With moments in ISO 8601."""
    click.echo(strict_json.dumps(value, indent=2, default=_as_text))


def _as_text(value: object) -> str:
    return moment(value) if isinstance(value, datetime) else str(value)
