"""The audit: the changes by admins and by operators' commands, each with its actor and its outcome."""

import json
import logging
import socket
from collections.abc import Callable, Iterable, Mapping, Set
from copy import copy
from functools import wraps
from pathlib import Path
from typing import Any, cast

import click
from flask import Flask, current_app, g, request
from flask.cli import with_appcontext
from flask_login import current_user
from sqlalchemy import update
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.wrappers import Response

from background.cli.shared import system_user
from background.database.dialects.encodings import storable
from background.errors import spelled_out
from models import AuditEntry, db

log = logging.getLogger(__name__)

MOST_FIELDS = 20  # the fields of a form that an entry keeps
LONGEST_FIELD = 200
READING = ("GET", "HEAD", "OPTIONS")

# The command that is recorded once it is done. On SQLite, the run that it cancels may hold the write lock.
AFTERWARDS = "flask workers cancel"

# The commands that change something.
COMMANDS: dict[str, Iterable[str]] = {
    "": ("init-db", "reset-password", "demo"),
    "workers": ("trigger", "pause", "resume", "cancel", "reschedule", "repair"),
    "messages": ("enqueue", "pause", "resume", "retry", "discard"),
}


def register(app: Flask, guards: Set[Callable[..., Any]]) -> None:
    """Record the commands, and the requests to the blueprints that `guards` guard. Call this after both exist."""
    app.after_request(lambda response: answered(response, guards))
    app.teardown_request(ended)
    for name, changing in COMMANDS.items():
        group = own_copy(app.cli, name) if name else app.cli
        for each in changing:
            group.commands[each] = recorded(f"flask {name} {each}".replace("  ", " "), group.commands[each])


def own_copy(cli: click.Group, name: str) -> click.Group:
    """Give the application its own copy of a group. The engine's groups serve all applications of the process."""
    group: Any = copy(cli.commands[name])
    group.commands = dict(group.commands)
    cli.commands[name] = group
    return cast(click.Group, group)


# ---- The admin's pages


def begin_request() -> None:
    """Record this request, and commit the entry, so that an attempt that fails is recorded too."""
    named = [(name or "", value) for name, value in request.form.items()]  # a part of a form may have no name
    fields = [(name, value) for name, value in named if not is_secret(name)]
    details = dict(fields[:MOST_FIELDS])
    if (more := len(fields) - MOST_FIELDS) > 0:
        details["..."] = f"{more} more fields"
    # Last, so that a field of a form cannot replace a part of the address.
    details |= request.view_args or {}
    g.audit_entry = begin(str(request.endpoint), details, request.remote_addr or "", user_id=current_user.id)


def is_secret(name: str) -> bool:
    return any(part in name.lower() for part in ("password", "token", "secret", "repeated"))


def answered(response: Response, guards: Set[Callable[..., Any]]) -> Response:
    """Remember the status. Also record an admin's change that was refused before its view was called."""
    g.audit_outcome = response.status
    if request.method in READING or "audit_entry" in g or guards.isdisjoint(own_guards()):
        return response
    # An admin who keeps asking gets no further entry.
    is_throttled = response.status_code == 429 and g.get("is_first_refusal", True)
    asks_for_password = response.status_code in range(300, 400)
    if (is_throttled or asks_for_password) and current_user.is_authenticated and current_user.is_admin:
        begin_request()
        g.audit_outcome = f"refused: {response.status if is_throttled else 'no recent login'}"
    return response


def own_guards() -> list[Callable[..., Any]]:
    return current_app.before_request_funcs.get(request.blueprint, [])


def ended(error: BaseException | None) -> None:
    """Write the outcome of this request into its entry."""
    if (entry := g.pop("audit_entry", None)) is None:
        return
    outcome = f"500 {type(error).__name__}" if error else g.audit_outcome
    try:
        finish(entry, outcome)
    except SQLAlchemyError:  # the action is done, so the visitor gets the response
        log.exception("The outcome %r of the audit's entry %s could not be written", outcome, entry)


# ---- The commands


def recorded(name: str, command: click.Command) -> click.Command:
    """Return a copy of the command that records its calls."""
    command = copy(command)
    call: Any = command.callback

    @with_appcontext
    @wraps(call)
    def audited(**given: Any) -> Any:
        if given.get("dry_run"):  # changes nothing
            return call(**given)
        entry = None if name == AFTERWARDS else begin_command(name, given)
        try:
            result = call(**given)
        except BaseException as error:
            if entry is not None:
                finish(entry, in_words(error))
            raise
        if entry is None:
            entry = begin_command(name, given, is_ready=True)
        finish(entry, "done")
        return result

    command.callback = audited
    return command


def begin_command(name: str, given: Mapping[str, Any], is_ready: bool = False) -> int | None:
    """Record a command. Return None if the database is not ready: the command prepares it, or says why it cannot."""
    database = db.engine.url.database
    if db.engine.dialect.name == "sqlite" and not Path(str(database)).is_file():
        return None  # a connection would make an empty file
    texts = {name: " ".join(value) if isinstance(value, tuple) else value for name, value in given.items()}
    details = {name: value for name, value in texts.items() if value not in (None, "", False)}
    try:
        return begin(name, details, socket.gethostname(), operator=system_user())
    except SQLAlchemyError:
        db.session.rollback()
        if is_ready:
            raise
        return None


def in_words(error: BaseException) -> str:
    if isinstance(error, click.exceptions.Exit):
        return f"exit code {error.exit_code}" if error.exit_code else "done"
    if isinstance(error, click.ClickException):
        return f"exit code {error.exit_code}: {spelled_out(error.format_message())}"
    return type(error).__name__


# ---- The table


def begin(action: str, details: Mapping[str, Any], address: str, **who: Any) -> int:
    texts = {name[:LONGEST_FIELD]: str(value)[:LONGEST_FIELD] for name, value in details.items()}
    entry = AuditEntry(action=action[:100], details=json.dumps(texts), address=address[:45], **who)
    db.session.add(entry)
    db.session.commit()
    return entry.id


def finish(entry: int | None, outcome: str) -> None:
    """Write the outcome. First roll back the uncommitted writes of the action, as they were never committed."""
    db.session.rollback()
    written = storable(outcome, db.engine.dialect)[:200]
    db.session.execute(update(AuditEntry).where(AuditEntry.id == entry).values(outcome=written))
    db.session.commit()
