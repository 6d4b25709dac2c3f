"""Commands of `flask workers` that only read: list, instances, check, preview, history, why."""

import sys
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
from ..history.text import ahead, cancelled, clipped, done_of, moment_in, progress, silent, span
from ..ledger.claim import WorkerState
from ..manager import BackgroundWorkerManager, the_manager
from ..registry import declared_schedule, schedule_in_force
from .completion import periodic_workers
from .shared import (
    WorkersGroup,
    WrongUsage,
    as_json,
    as_json_option,
    checked_manager,
    examples,
    limit_option,
    manager_of,
    not_ready,
    print_json,
    row_limit,
    state_option,
)
from .terminal import Screen, coloured, localised, say, screen_of, shown_zone, utc_option, zone_name
from .unmigrated import unmigrated
from .watch import seconds_between, watch, watch_option

workers_cli = WorkersGroup(
    "workers",
    help="""See and control the background workers.

    Times are local, or in UTC with --utc. A pipe gets them in ISO 8601. --json always has UTC.

    \b
    Exit codes:
      0  success
      1  failure, or the answer is no: a run that did not succeed, a tick that did not
         run, a problem that was found, a database that is not ready
      2  wrong usage, or a name that no worker has
    """,
    epilog=examples("flask workers list", "flask workers history NAME --state failed", "flask workers why NAME"),
)


@workers_cli.command(
    "list", epilog=examples("flask workers list", "flask workers list --watch", "flask workers list --watch 10 --utc")
)
@watch_option
@utc_option
@as_json_option
def list_workers(watched: str | None, with_json: bool) -> None:
    """Show every worker, its next tick and its last tick.

    STATE is the state of the last tick, or of the tick that runs now. If no instance is alive, the first line says so.
    """
    seconds = seconds_between(watched) if watched is not None else None

    def draw() -> str:
        manager = checked_manager()
        rows = overview(manager.stores, manager.workers)
        return as_json(rows) if with_json else _listed(manager, rows)

    if seconds is None:
        click.echo(draw())
    else:
        watch(draw, seconds)


def _listed(manager: BackgroundWorkerManager, rows: list[dict[str, Any]]) -> str:
    screen, silence = screen_of(manager), manager.instance_history.silence()
    headers = ("name", "schedule", "next tick", "last tick", "state", "took", "note")
    text = _with_topics(screen, headers, [_cells(screen, row) for row in rows], spare=("took", "schedule"))
    return f"{coloured(localised(silent(silence)), 'red')}\n{text}" if silence else text


def _cells(screen: Screen, row: dict[str, Any]) -> list[str]:
    last, running = row["last"], row["running"]
    notes = [
        _running(running) if running else "",
        "" if row["in_this_release"] else "not in this release",
        "disabled" if row["enabled"] is False else "",
        cancelled(running["cancelled_at"], running["cancelled_by"]) if running else "",
        f"overdue since {screen.at(row['overdue_since'])}" if row["overdue_since"] else "",
        f"stuck: {row['stuck']}" if row["stuck"] else "",
        f"paused since {screen.at(row['paused_at'])}" if row["paused_at"] else "",
        _pending(screen, row),
        f"declared: {row['declared']}" if row["declared"] not in (None, row["schedule"]) else "",
    ]
    cells = [row["name"], row["schedule"] or "a schedule that this release cannot read", screen.next(row["next_tick"])]
    return [*cells, *_newest(screen, last, running), localised("; ".join(filter(None, notes)))]


def _pending(screen: Screen, row: dict[str, Any]) -> str:
    """Return the tick that comes before any other, or the moment of the next attempt at a failed tick."""
    if row["retry_at"]:
        return f"failed, next attempt at {screen.at(row['retry_at'])}"
    return f"{screen.tick(row['pending_tick'])} runs first" if row["pending_tick"] else ""


def _running(running: dict[str, Any]) -> str:
    """Return the progress of a run, and its instance."""
    done = done_of(running["progress_done"], running["progress_total"])
    gone = ", which is gone" if running["is_gone"] else ""
    return f"{done + ' ' if done else ''}on {running['instance']}{gone}"


def _newest(screen: Screen, last: dict[str, Any] | None, running: dict[str, Any] | None) -> list[str]:
    """Return the tick, the state and the duration of the run, or else of the last tick."""
    if running:
        lasts = screen.clock - running["started_at"] if running["started_at"] else None
        return [screen.next(running["tick"]), "running", span(lasts) if lasts is not None else "-"]
    if last is None:
        return ["-"] * 3
    took = span(timedelta(seconds=last["seconds"])) if last["seconds"] is not None else "-"
    return [screen.next(last["through"] or last["tick"]), last["state"], took]


def _with_topics(screen: Screen, headers: tuple[str, ...], rows: list[list[str]], spare: tuple[str, ...] = ()) -> str:
    """Return the periodic workers as a table, and the message workers in one line."""
    parts = [screen.table(headers, rows, spare=spare)] if rows else []
    if topics := ", ".join(f"{topic} ({worker.name})" for topic, worker in the_manager().topics.items()):
        parts.append(f"Messages: {topics}; see `flask messages stats`.")
    return "\n".join(parts) or "There is no worker. Write workers.add(MyWorker) in create_app."


@workers_cli.command(epilog=examples("flask workers instances"))
@utc_option
@as_json_option
def instances(with_json: bool) -> None:
    """Show the instances that are alive, or left within a day.

    Shows their runs too, and how far their clocks are off.
    """
    manager = checked_manager()
    states, seen = manager.stores.ledger.states().values(), manager.instance_history.seen()
    holds = {each.id: [state.name for state in states if state.instance == each.id] for each in seen}
    if with_json:
        print_json([{**asdict(each), "holds": holds[each.id]} for each in seen])
    elif seen:
        screen, headers = screen_of(manager), ("instance", "state", "release", "started", "heartbeat", "clock", "holds")
        rows = [_instance_cells(screen, each, holds[each.id]) for each in seen]
        click.echo(screen.table(headers, rows, elastic=("release",), spare=("clock",)))
    else:
        click.echo("No instance has been alive for a day. `flask workers run` starts an instance.")


def _instance_cells(screen: Screen, seen: InstanceRecord, holds: list[str]) -> list[str]:
    return [
        seen.name,
        seen.state,
        seen.release or "",
        screen.since(seen.started_at),
        screen.since(seen.heartbeat_at),
        ahead(seen.clock_ahead),
        ", ".join(holds),
    ]


@workers_cli.command(epilog=examples("flask workers check"))
@utc_option
@as_json_option
def check(with_json: bool) -> None:
    """Validate settings, workers, database and fleet.

    Changes nothing. Exits with 1 if there is a problem. Problems are: no instance is alive, a worker is overdue or
    stuck, threads are used up, a model has no migration, a server would refuse the settings. The application validates
    settings and workers when it starts.
    """
    manager = the_manager()
    states: dict[str, WorkerState] = {}
    problems, unseen, alive = [], list(_NEVER_LOOKED_AT), 0
    try:
        checked_manager().stores.refuse_old_tables()
        states = manager.stores.ledger.states()
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
    clock = datetime.now(UTC)
    rows = [_next_ticks(manager, name, states.get(name), clock) for name in manager.workers]
    if with_json:
        print_json({"workers": rows, "problems": problems, "warnings": warnings, "not_looked_at": unseen})
    else:
        _print_checked(rows, problems, warnings, alive, unseen, clock)
    if problems:
        raise click.exceptions.Exit(1)


@workers_cli.command(epilog=examples("flask workers preview NAME", "flask workers preview NAME --count 366 --utc"))
@click.argument("name", shell_complete=periodic_workers)
@click.option("--count", default="20", show_default=True, metavar="INTEGER", help="The number of ticks to show.")
@utc_option
def preview(name: str, count: str) -> None:
    """Show the next ticks of NAME, by its declared schedule.

    Each tick is in the local time zone, and in the schedule's own. A note marks each tick that a change of the clocks
    affects. A schedule that a user set is not read: `flask workers list` shows it.
    """
    screen, schedule = Screen.of(datetime.now(UTC)), declared_schedule(manager_of(name).workers[name])
    ticks = schedule.following(screen.clock, row_limit(count, "--count"))
    rows = [[screen.tick(at), f"{schedule.local(at):%a %Y-%m-%d %H:%M:%S %Z}", schedule.oddity(at)] for at in ticks]
    click.echo(f"The release declares that {name} runs {schedule.in_words()}.")
    click.echo(screen.table(("tick", "in its own zone", "note"), rows))


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
    rows: list[dict[str, Any]], problems: list[str], warnings: list[str], alive: int, unseen: list[str], clock: datetime
) -> None:
    screen, headers = Screen.of(clock), ("name", "schedule", "next tick", "then", "then", "note")
    click.echo(_with_topics(screen, headers, [_checked_cells(screen, row) for row in rows], spare=("then",)))
    for problem in problems:
        click.echo(f"{coloured('Problem:', 'red', sys.stderr)} {localised(spelled_out(problem))}", err=True)
    for warning in warnings:
        click.echo(f"{coloured('Warning:', 'yellow', sys.stderr)} {localised(spelled_out(warning))}", err=True)
    click.echo(f"Not looked at: {'; '.join(unseen)}.")
    if not problems:
        workers, fleet = _count(len(the_manager().names), "worker"), _count(alive, "instance")
        fine = f"the settings, {workers}, the database, its migrations, and the fleet of {fleet}."
        click.echo(f"{coloured('Fine:', 'green')} {fine}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _checked_cells(screen: Screen, row: dict[str, Any]) -> list[str]:
    paused = f"paused since {screen.at(row['paused_at'])}" if row["paused_at"] else ""
    return [
        row["name"],
        row["schedule"],
        *map(screen.next, row["next_ticks"]),
        paused or ("" if row["enabled"] else "disabled"),
    ]


@workers_cli.command(
    epilog=examples("flask workers history NAME", "flask workers history NAME --state timed-out --limit 5")
)
@click.argument("name", shell_complete=periodic_workers)
@limit_option
@state_option(STATES, "executions")
@utc_option
@as_json_option
def history(name: str, limit: str, state: str | None, with_json: bool) -> None:
    """Show the executions of NAME, newest first.

    --json shows every traceback in full.
    """
    number = row_limit(limit)
    manager = checked_manager()
    _stored(manager, name)
    records = manager.history.executions(name, number, state)
    if with_json:
        print_json([record.as_dict() for record in records])
    elif records:
        screen, headers = screen_of(manager), ("tick", "state", "attempt", "started", "took", "instance", "note")
        rows = [_history_cells(screen, record) for record in records]
        click.echo(screen.table(headers, rows, spare=("attempt", "instance")))
    else:
        click.echo(f"{name} has no executions{f' that are {state}' if state else ' yet'}.")


def _history_cells(screen: Screen, record: Record) -> list[str]:
    tick = screen.tick(record.tick)
    if record.through and record.through != record.tick:
        tick += f" to {screen.tick(record.through)}"
    took = span(record.duration) if record.duration is not None else "-"
    note = clipped(record.last_line or "") or progress(record).strip(" ()")
    if record.is_gone:
        note = f"running on {record.instance_name}, which is gone: will be taken over"
    note = "; ".join(filter(None, (cancelled(record.cancelled_at, record.cancelled_by), note)))
    if record.trigger != "schedule":
        note = f"{record.trigger}; {note}" if note else record.trigger
    started, on = screen.at(record.started_at), record.instance_name or "-"
    return [tick, record.state, str(record.attempt or "-"), started, took, on, localised(note)]


@workers_cli.command(epilog=examples("flask workers why NAME", "flask workers why NAME --at 2026-11-20T14:05"))
@click.argument("name", shell_complete=periodic_workers)
@click.option(
    "--at",
    "text",
    metavar="TIME",
    help="A moment in ISO 8601. Without a zone, it is in the zone that the output shows.",
)
@utc_option
@as_json_option
def why(name: str, text: str | None, with_json: bool) -> None:
    """Explain why a tick of NAME ran, or did not run.

    The answer is about the latest tick at or before TIME. TIME is now by default. Exits with 0 if the tick succeeded,
    is running, or is not due yet. Otherwise exits with 1.
    """
    at = _moment(text) if text is not None else None
    manager = checked_manager()
    _stored(manager, name)
    answer = manager.why(name, at)
    if with_json:
        records = [record.as_dict() for record in answer.records]
        print_json({**vars(answer), "is_fine": answer.is_fine, "records": records})
    else:
        say(answer.sentence)
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
        if shown_zone() is None:
            at = at.replace(tzinfo=None).astimezone(UTC)  # a moment without a zone is on this machine's clock
        click.echo(f"{text} names no time zone, so it is taken as {zone_name(at)}.", err=True)
    return at
