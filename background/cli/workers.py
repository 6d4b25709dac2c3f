"""Commands of `flask workers` that only read: list, instances, check, preview, history, why."""

from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

import click
from sqlalchemy.exc import DBAPIError

from ..errors import BackgroundError, UnknownWorker, spelled_out
from ..history.condition import condition
from ..history.overview import overview
from ..history.records import STATES, InstanceRecord, Record
from ..history.text import ahead, cancelled, moment, moment_in, progress, second, silent, span, table
from ..ledger.claim import WorkerState
from ..manager import BackgroundWorkerManager, the_manager
from ..registry import declared_schedule, schedule_in_force
from .shared import (
    WorkersGroup,
    WrongUsage,
    as_json_option,
    checked_manager,
    manager_of,
    not_ready,
    one_state,
    print_json,
    row_limit,
)
from .unmigrated import unmigrated

workers_cli = WorkersGroup(
    "workers",
    help="""See and control the background workers. Times are ISO 8601, in UTC.

    \b
    Exit codes:
      0  success
      1  failure, or the answer is no: a run that did not succeed, a tick that did not
         run, a problem that was found, a database that is not ready
      2  wrong usage, or a name that no worker has
    """,
)


@workers_cli.command("list")
@as_json_option
def list_workers(as_json: bool) -> None:
    """Show every worker, its next tick and its last tick.

    If no instance is alive, the first line says so.
    """
    manager = checked_manager()
    rows = overview(manager.stores, manager.workers)
    if as_json:
        print_json(rows)
    else:
        if silence := manager.instance_history.silence():
            click.echo(silent(silence))
        headers = ("name", "schedule", "next tick", "last tick", "became", "running on", "note")
        _print_workers(headers, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> list[str]:
    last, running = row["last"], row["running"]
    tick = moment(last["through"] or last["tick"]) if last else "-"
    outcome = last["state"] if last else "-"
    if last and last["seconds"] is not None:
        outcome += f" in {span(timedelta(seconds=last['seconds']))}"
    on = running["instance"] + (", which is gone" if running["is_gone"] else "") if running else "-"
    notes = [
        "" if row["in_this_release"] else "not in this release",
        "disabled" if row["enabled"] is False else "",
        f"paused since {second(row['paused_at'])}" if row["paused_at"] else "",
        cancelled(running["cancelled_at"], running["cancelled_by"]) if running else "",
        f"overdue since {second(row['overdue_since'])}" if row["overdue_since"] else "",
        f"stuck: {row['stuck']}" if row["stuck"] else "",
        f"{moment(row['pending_tick'])} runs first" if row["pending_tick"] else "",
        f"declared: {row['declared']}" if row["declared"] not in (None, row["schedule"]) else "",
    ]
    schedule = row["schedule"] or "a schedule that this release cannot read"
    return [row["name"], schedule, moment(row["next_tick"]), tick, outcome, on, "; ".join(filter(None, notes))]


def _print_workers(headers: tuple[str, ...], rows: list[list[str]]) -> None:
    """Print the periodic workers as a table, and the message workers in one line."""
    parts = [table(headers, rows)] if rows else []
    if topics := ", ".join(f"{topic} ({worker.name})" for topic, worker in the_manager().topics.items()):
        parts.append(f"Messages: {topics}; see `flask messages stats`.")
    click.echo("\n".join(parts) or "There is no worker. Write workers.add(MyWorker) in create_app.")


@workers_cli.command()
@as_json_option
def instances(as_json: bool) -> None:
    """Show the instances that are alive, or left within a day.

    Also their runs, and how far their clocks are off.
    """
    manager = checked_manager()
    states, seen = manager.stores.ledger.states().values(), manager.instance_history.seen()
    holds = {each.id: [state.name for state in states if state.instance == each.id] for each in seen}
    if as_json:
        print_json([{**asdict(each), "holds": holds[each.id]} for each in seen])
    elif seen:
        headers = ("instance", "state", "release", "started", "heartbeat", "clock", "holds")
        click.echo(table(headers, [_instance_cells(each, holds[each.id]) for each in seen]))
    else:
        click.echo("No instance has been alive for a day. `flask workers run` starts an instance.")


def _instance_cells(seen: InstanceRecord, holds: list[str]) -> list[str]:
    return [
        seen.name,
        seen.state,
        seen.release or "",
        second(seen.started_at),
        second(seen.heartbeat_at),
        ahead(seen.clock_ahead),
        ", ".join(holds),
    ]


@workers_cli.command()
@as_json_option
def check(as_json: bool) -> None:
    """Validate settings, workers, database and fleet.

    Changes nothing. Exits with 1 if there is a problem. Problems are: no instance is alive, a worker is overdue or
    stuck, threads are used up, a model has no migration, a server would refuse the settings. The application validates
    settings and workers when it starts.
    """
    manager = the_manager()
    states: dict[str, WorkerState] = {}
    problems, unseen, alive = [], list(_NEVER_LOOKED_AT), 0
    try:
        states = checked_manager().stores.ledger.states()
        found = condition(manager.stores, manager.workers)
        problems, alive = found.problems(), found.alive
        lacking = unmigrated(manager.app, manager.db)
    except (BackgroundError, DBAPIError) as error:
        unseen.insert(0, "the fleet")
        if not (lacking := _lacking(manager, error)):
            problems.append(str((error if isinstance(error, BackgroundError) else not_ready(error)).message))
    if lacking is None:
        unseen.insert(-len(_NEVER_LOOKED_AT), "whether a model has no migration")
    of_application, warnings = manager.look()
    problems += (lacking or []) + of_application
    rows = [_next_ticks(manager, name, states.get(name), datetime.now(UTC)) for name in manager.workers]
    if as_json:
        print_json({"workers": rows, "problems": problems, "warnings": warnings, "not_looked_at": unseen})
    else:
        _print_checked(rows, problems, warnings, alive, unseen)
    if problems:
        raise click.exceptions.Exit(1)


@workers_cli.command()
@click.argument("name")
@click.option("--count", default="20", show_default=True, help="The number of ticks to show.")
def preview(name: str, count: str) -> None:
    """Show the next ticks of NAME, by its declared schedule.

    In UTC, and in the schedule's own time zone. A note marks each tick that a change of the clocks affects. A schedule
    that an admin set on the dashboard is not read: `flask workers list` shows it.
    """
    schedule = declared_schedule(manager_of(name).workers[name])
    ticks = schedule.following(datetime.now(UTC), row_limit(count, "--count"))
    rows = [[moment(at), f"{schedule.local(at):%a %Y-%m-%d %H:%M:%S %Z}", schedule.oddity(at)] for at in ticks]
    click.echo(f"{name} runs {schedule.in_words()}.")
    click.echo(table(("utc", "local", "note"), rows))


_NEVER_LOOKED_AT = (
    "whether a run would succeed",
    "workers that only another release has",
    "messages (see `flask messages stats`)",
    "systems outside the database, such as a mail server",
)


def _lacking(manager: BackgroundWorkerManager, error: Exception) -> list[str] | None:
    """Return a sentence for each thing that the database lacks, as the cause of `error`. None if it was not compared.

    A BackgroundError has its own sentence about that.
    """
    if isinstance(error, DBAPIError):
        with suppress(DBAPIError):  # the database does not answer
            return unmigrated(manager.app, manager.db)
    return None


def _next_ticks(manager: BackgroundWorkerManager, name: str, state: WorkerState | None, at: datetime) -> dict[str, Any]:
    schedule = schedule_in_force(manager.workers[name], state if state and state.overridden else None)
    return {
        "name": name,
        "schedule": schedule.describe(),
        "next_ticks": schedule.following(at, 3),
        "enabled": manager.workers[name].enabled,
        "paused_at": state.paused_at if state else None,
    }


def _print_checked(
    rows: list[dict[str, Any]], problems: list[str], warnings: list[str], alive: int, unseen: list[str]
) -> None:
    headers = ("name", "schedule", "next tick", "then", "then", "note")
    _print_workers(headers, [_checked_cells(row) for row in rows])
    for problem in problems:
        click.echo(f"Problem: {spelled_out(problem)}", err=True)
    for warning in warnings:
        click.echo(f"Warning: {spelled_out(warning)}", err=True)
    click.echo(f"Not looked at: {'; '.join(unseen)}.")
    if not problems:
        workers, fleet = _count(len(the_manager().names), "worker"), _count(alive, "instance")
        click.echo(f"Fine: the settings, {workers}, the database, its migrations, and the fleet of {fleet}.")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _checked_cells(row: dict[str, Any]) -> list[str]:
    note = f"paused since {second(row['paused_at'])}" if row["paused_at"] else "" if row["enabled"] else "disabled"
    return [row["name"], row["schedule"], *map(moment, row["next_ticks"]), note]


@workers_cli.command()
@click.argument("name")
@click.option("--limit", default="20", show_default=True, help="Show at most this many.")
@click.option("--state", help=f"Show only executions in this state: {', '.join(STATES)}.")
@as_json_option
def history(name: str, limit: str, state: str | None, as_json: bool) -> None:
    """Show the executions of NAME, newest first.

    With --json every traceback is shown in full.
    """
    number, state = row_limit(limit), one_state(state, STATES)
    manager = checked_manager()
    _stored(manager, name)
    records = manager.history.executions(name, number, state)
    if as_json:
        print_json([record.as_dict() for record in records])
    elif records:
        headers = ("tick", "state", "attempt", "started", "took", "instance", "note")
        click.echo(table(headers, map(_history_cells, records)))
    else:
        click.echo(f"{name} has no executions{f' that are {state}' if state else ' yet'}.")


def _history_cells(record: Record) -> list[str]:
    tick = moment(record.tick)
    if record.through and record.through != record.tick:
        tick += f" to {moment(record.through)}"
    took = span(record.duration) if record.duration is not None else "-"
    note = record.last_line or progress(record).strip(" ()")
    if record.is_gone:
        note = f"running on {record.instance_name}, which is gone: will be taken over"
    note = "; ".join(filter(None, (cancelled(record.cancelled_at, record.cancelled_by), note)))
    if record.trigger != "schedule":
        note = f"{record.trigger}; {note}" if note else record.trigger
    started, on = second(record.started_at), record.instance_name or "-"
    return [tick, record.state, str(record.attempt or "-"), started, took, on, note]


@workers_cli.command()
@click.argument("name")
@click.option("--at", "text", metavar="T", help="A moment in ISO 8601, in UTC unless it names a zone. Default: now.")
@as_json_option
def why(name: str, text: str | None, as_json: bool) -> None:
    """Explain why a tick of NAME ran, or did not run.

    It is the latest tick at or before T. Exits with 0 if it succeeded, is running, or is not due yet. Else exits with
    1.
    """
    at = _moment(text) if text is not None else None
    manager = checked_manager()
    _stored(manager, name)
    answer = manager.why(name, at)
    if as_json:
        records = [record.as_dict() for record in answer.records]
        print_json({**vars(answer), "is_fine": answer.is_fine, "records": records})
    else:
        click.echo(answer.sentence)
    if not answer.is_fine:
        raise click.exceptions.Exit(1)


def _stored(manager: BackgroundWorkerManager, name: str) -> None:
    """Raise UnknownWorker if neither this release nor the database has this name."""
    is_text = name.isascii() or name.isprintable()  # false for bytes of a terminal in another encoding
    if name not in manager.workers and not (is_text and manager.stores.ledger.look(name)):
        known = manager.names | manager.stores.ledger.states().keys()
        raise UnknownWorker(name, known, manager.topic_of(name))


def _moment(text: str) -> datetime:
    try:
        at = moment_in(text)
    except ValueError as error:
        raise WrongUsage(f"--at: {error}") from None
    if datetime.fromisoformat(text.strip()).tzinfo is None:
        click.echo(f"{text} names no time zone, so it is taken as UTC.", err=True)
    return at
