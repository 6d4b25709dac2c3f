"""Completes names, topics and states in a shell. It never asks the database, so it is quick while that is away."""

from collections.abc import Callable, Collection

import click
from flask.cli import ScriptInfo

from ..manager import BackgroundWorkerManager

Completion = Callable[[click.Context, click.Parameter, str], list[str]]


def periodic_workers(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    return _starting(manager_in(context).workers, incomplete)


def all_workers(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of all workers that the command line does not have yet."""
    given = context.params.get(parameter.name or "") or ()
    return _starting(manager_in(context).names - set(given), incomplete)


def topics(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    return _starting(manager_in(context).topics, incomplete)


def one_of(states: Collection[str]) -> Completion:
    """Complete a state. It has hyphens for spaces, so that a shell does not split it."""
    return lambda _context, _parameter, incomplete: _starting(
        [state.replace(" ", "-") for state in states], incomplete.lower()
    )


def _starting(names: Collection[str], incomplete: str) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))


def manager_in(context: click.Context) -> BackgroundWorkerManager:
    """Return the manager before a command has an app context."""
    manager: BackgroundWorkerManager = context.ensure_object(ScriptInfo).load_app().extensions["background_workers"]
    return manager
