"""Parts that the command groups share: errors, the checked manager, options and JSON."""

import os
import sys
from collections.abc import Callable, Collection
from datetime import datetime
from io import TextIOWrapper
from typing import Any

import click
from flask.cli import AppGroup
from sqlalchemy.exc import DBAPIError

from ..errors import DatabaseNotReady, UnknownWorker, first_line, spelled_out
from ..history.text import moment, whole_number
from ..host import strict_json
from ..manager import BackgroundWorkerManager, the_manager
from .completion import manager_in, one_of

MOST_ROWS = 10_000


class WorkersGroup(AppGroup):
    """Prints one sentence for a database error, and closes the engine's connections after the command.

    Click repeats arguments in its usage errors. This group escapes their control characters.
    """

    def invoke(self, context: click.Context) -> Any:
        escape_unencodable()
        manager = manager_in(context)
        try:
            return super().invoke(context)
        except DBAPIError as error:
            raise not_ready(error) from None
        except click.UsageError as error:
            raise click.UsageError(spelled_out(error.format_message()), error.ctx) from None
        finally:
            if not manager.is_started:
                manager.stop()


def escape_unencodable() -> None:
    """Escape the characters that the terminal's encoding lacks, instead of failing on them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


class WrongUsage(click.ClickException):
    exit_code = 2


as_json_option = click.option("--json", "with_json", is_flag=True, help="Print JSON, complete and in UTC.")
limit_option = click.option(
    "--limit", default="20", show_default=True, metavar="INTEGER", help="Show at most this many."
)


def examples(*lines: str) -> str:
    """Return the end of a help text: one example of the command per line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def manager_of(name: str) -> BackgroundWorkerManager:
    """Return the manager if it has a periodic worker of that name. Raises UnknownWorker."""
    manager = the_manager()
    if name not in manager.workers:
        raise UnknownWorker(name, manager.names, manager.topic_of(name))
    return manager


def checked_manager() -> BackgroundWorkerManager:
    """Return the manager if its database is ready. Change nothing to make it ready. Raises DatabaseNotReady."""
    manager = the_manager()
    try:
        manager.check()
    except OSError as error:
        raise not_ready(error) from None
    return manager


def pause_topic(topic: str) -> None:
    """Pause the topic, and print the outcome. Raises UnknownTopic."""
    changed = checked_manager().messages.pause(topic)
    click.echo(f"{topic} is paused: its messages wait." if changed else f"{topic} was paused already.")


def resume_topic(topic: str) -> None:
    """Resume the topic, and print the outcome. Raises UnknownTopic."""
    changed = checked_manager().messages.resume(topic)
    click.echo(f"{topic} is resumed: its messages are handled." if changed else f"{topic} was not paused.")


def not_ready(error: Exception) -> DatabaseNotReady:
    """Convert an error of the database or its file to DatabaseNotReady."""
    return DatabaseNotReady(f"The database cannot be used ({first_line(error)}). `flask workers check` tries again.")


def row_limit(text: str, option: str = "--limit") -> int:
    """Convert the value of `option` to a number of rows. Raises WrongUsage."""
    number = whole_number(text)
    if number is None or not 1 <= number <= MOST_ROWS:
        raise WrongUsage(f"{option} is {text!r}; expected a whole number from 1 to {MOST_ROWS}.")
    return number


def state_option(states: Collection[str], rows: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the option --state, for one of `states`. Also written as "handed-back". Raises WrongUsage."""

    def read(_context: click.Context, _parameter: click.Parameter, text: str | None) -> str | None:
        state = text and text.strip().lower().replace("-", " ").replace("_", " ")
        if state is not None and state not in states:
            raise WrongUsage(f"--state is {text!r}; expected one of: {', '.join(states)}.")
        return state

    text = f"Show only {rows} in this state: {', '.join(states)}."
    return click.option("--state", metavar="STATE", shell_complete=one_of(states), callback=read, help=text)


def system_user() -> str:
    """Return the name of the operating system's user. A variable of the environment could name any user."""
    try:
        import pwd
    except ImportError:  # on Windows
        import getpass

        return getpass.getuser()
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's user has no name
        return f"user {os.getuid()}"


def print_json(value: Any) -> None:
    click.echo(as_json(value))


def as_json(value: Any) -> str:
    """Return `value` as JSON, with moments in ISO 8601."""
    return strict_json.dumps(value, indent=2, default=_as_text)


def _as_text(value: object) -> str:
    return moment(value) if isinstance(value, datetime) else str(value)
