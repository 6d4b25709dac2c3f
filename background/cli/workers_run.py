"""Commands of `flask workers` that run or control a worker: run, trigger, pause, cancel, reschedule, repair."""

import gc
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from ..errors import InvalidSchedule, UnknownWorker, spelled_out
from ..history.text import moment, second, silent
from ..history.why import if_it_fails
from ..manager import BackgroundWorkerManager, the_manager
from ..repair.clock_ahead import repaired_text
from ..runs.dry_run import Change
from ..runs.dry_run import dry_run as rolled_back
from ..runs.execution import Execution
from ..schedule.parsing import as_arguments, typed_schedule
from .completion import all_workers, periodic_workers
from .shared import WrongUsage, checked_manager, examples, manager_of, not_ready, pause_topic, resume_topic, system_user
from .terminal import say, utc_option
from .workers import workers_cli

# -- running -------------------------------------------------------------------------------------


@workers_cli.command(
    epilog=examples(
        "flask workers run", "flask workers run FIRST_NAME SECOND_NAME", "flask workers run NAME --once  # for cron"
    )
)
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=all_workers)
@click.option("--once", is_flag=True, help="Run the latest due tick of NAME here, if no instance has, and end.")
@utc_option
def run(names: tuple[str, ...], once: bool) -> None:
    """Run all workers, or only the named ones, in this process.

    The process serves nothing else, and ends on SIGINT or SIGTERM. The web processes can run with
    WORKERS_ENABLED=false beside it. This command ignores that setting. A stop waits at most WORKERS_SHUTDOWN_SECONDS
    for the runs, and hands the rest back. A second signal ends the wait.

    --once is made for cron. It exits with 1 if the run failed, and with 0 if the run succeeded or was not needed.
    """
    manager = the_manager()
    if unknown := set(names) - manager.names:
        raise UnknownWorker(min(unknown), manager.names)
    if not once:
        _run_until_signal(manager, names)
    elif len(names) == 1:
        _run_once(manager_of(names[0]), names[0])
    else:
        raise WrongUsage("--once expects the name of one worker: write `flask workers run NAME --once`.")


def _run_until_signal(manager: BackgroundWorkerManager, names: tuple[str, ...]) -> None:
    _prepare(manager)
    manager.start(names)
    gc.freeze()  # otherwise a full collection visits all imported objects, and stops every thread for 0.1 s
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        while True:
            receiver.recv(1)  # a signal wakes this thread, even if another thread receives it
    except KeyboardInterrupt:
        pass
    finally:
        signal.set_wakeup_fd(-1)  # a second signal may come after the sockets are closed


def _run_once(manager: BackgroundWorkerManager, name: str) -> None:
    _prepare(manager)
    if not manager.workers[name].enabled:
        click.echo(f"Not run: {name} is disabled in this release (enabled = False).")
        return
    at = manager.history.clock()
    with _handed_back_on_signals(manager, name):
        execution = manager.tick(name, at)
    if execution is None:
        say(f"Not run here. {manager.why(name, at).sentence}")
    else:
        _report(manager, execution)


@workers_cli.command(
    epilog=examples(
        "flask workers trigger NAME", "flask workers trigger NAME --fleet", "flask workers trigger NAME --dry-run"
    )
)
@click.argument("name", shell_complete=periodic_workers)
@click.option("--fleet", "in_fleet", is_flag=True, help="Leave the run to an instance of the fleet, and do not wait.")
@click.option("--dry-run", is_flag=True, help="Roll the run back, and show the rows that it would have changed.")
@utc_option
def trigger(name: str, in_fleet: bool, dry_run: bool) -> None:
    """Run NAME now, outside its schedule.

    It runs in this process. Exits with 1 if the run did not succeed. Ctrl-C hands the run back, and another instance
    runs it.

    --fleet leaves the run to an instance of the fleet. It exits with 1 if NAME runs already, or will run next.

    --dry-run claims nothing and leaves no row in the history. It cannot undo effects outside the database.
    """
    if in_fleet and dry_run:
        raise WrongUsage("--fleet was given with --dry-run; expected one of them: a dry run runs in this process.")
    manager = manager_of(name)
    _prepare(manager)
    if in_fleet:
        _request(manager, name)
        return
    if dry_run:
        store, at = manager.stores.main, manager.history.clock()
        _print_changes(name, rolled_back(manager.app, manager.db, store, manager.workers[name], at))
        return
    click.echo(f"Running {name} in this terminal's process, not in the fleet. Ctrl-C hands the run back.")
    with _handed_back_on_signals(manager, name):
        execution = manager.trigger(name)
    if execution is None:
        say(f"Not run: {_why_not_triggered(manager, name)}")
        raise click.exceptions.Exit(1)
    _report(manager, execution)


def _request(manager: BackgroundWorkerManager, name: str) -> None:
    if not manager.request(name):
        click.echo(f"{name} is running already, or will run next: see `flask workers list`.")
        raise click.exceptions.Exit(1)
    once = if_it_fails(manager.workers[name], manager.stores.ledger.look(name))
    if silence := manager.instance_history.silence():
        say(f"{name} will run as soon as an instance is alive. {silent(silence)}{once}")
    else:
        within = f"{manager.app.config['WORKERS_HEARTBEAT_SECONDS']:g} s"
        click.echo(f"An instance will run {name} within {within}. `flask workers why {name}` says how it ended.{once}")


def _print_changes(name: str, changes: Sequence[Change]) -> None:
    click.echo(f"{name} would change {'these rows' if changes else 'no row'}. The run was rolled back.")
    for change in changes:
        click.echo(spelled_out(f"{change.table}: {change.number:,} {change.kind}"))
        for example in change.examples:
            click.echo(spelled_out(f"  {example}"))
        if change.number > len(change.examples) > 0:
            click.echo(f"  and {change.number - len(change.examples):,} more")


def _why_not_triggered(manager: BackgroundWorkerManager, name: str) -> str:
    state = manager.stores.ledger.look(name)
    if state and state.running:
        tick = moment(state.running.tick)
        return f"{name} is running already, the tick {tick} on {state.instance_name}; try again when it has ended."
    if state and state.pending_tick:
        held_up = "the worker is paused" if state.paused_at else "the database's clock was set back"
        return f"the tick {moment(state.pending_tick)} of {name} must run first, and {held_up}."
    return f"{name} was running at that moment; try again."


def _report(manager: BackgroundWorkerManager, execution: Execution) -> None:
    say(manager.why(execution.claim.worker, execution.claim.tick).sentence)
    if execution.state != "succeeded":
        raise click.exceptions.Exit(1)


@contextmanager
def _handed_back_on_signals(manager: BackgroundWorkerManager, name: str) -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C. After either signal, print the outcome of the run, and exit with 1."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        newest = manager.history.executions(name, limit=1)
        say(manager.why(name, newest[0].tick).sentence if newest else f"{name} was not run.")
        raise click.exceptions.Exit(1) from None
    finally:
        signal.signal(signal.SIGTERM, before)


# -- controlling ---------------------------------------------------------------------------------


@workers_cli.command(epilog=examples("flask workers pause NAME"))
@click.argument("name", shell_complete=all_workers)
@utc_option
def pause(name: str) -> None:
    """Pause NAME: no instance runs its ticks until you resume it.

    The pause holds across restarts and releases. A run in progress goes on. For a message worker, this pauses its
    topic.
    """
    if topic := the_manager().topic_of(name):
        pause_topic(topic)
        return
    manager = manager_of(name)
    changed = checked_manager().pause(name)
    state = manager.stores.ledger.look(name)
    since = f", since {second(state.paused_at)}" if state else ""
    say(f"{name} is paused{since}." if changed else f"{name} was paused already{since}.")


@workers_cli.command(epilog=examples("flask workers resume NAME"))
@click.argument("name", shell_complete=all_workers)
@utc_option
def resume(name: str) -> None:
    """Run NAME again, from its next tick on.

    For a message worker, this resumes its topic.
    """
    if topic := the_manager().topic_of(name):
        resume_topic(topic)
        return
    manager = manager_of(name)
    changed = checked_manager().resume(name)
    following = _following(manager, name)
    say(f"{name} is resumed{following}." if changed else f"{name} was not paused{following}.")


def _following(manager: BackgroundWorkerManager, name: str) -> str:
    state = manager.stores.ledger.look(name)
    return f"; its next tick is {moment(state.schedule.next(state.clock))}" if state else ""


@workers_cli.command(epilog=examples("flask workers cancel NAME"))
@click.argument("name", shell_complete=periodic_workers)
def cancel(name: str) -> None:
    """Cancel the run of NAME that is in progress, in any process.

    The run gets a stop request within a heartbeat. After WORKERS_SHUTDOWN_SECONDS it can no longer commit. Its tick
    does not run again, and the next ticks go on.
    """
    manager = manager_of(name)
    if not checked_manager().cancel(name, by=system_user()):
        click.echo(f"{name} is not running.")
        return
    seconds = manager.app.config["WORKERS_SHUTDOWN_SECONDS"]
    click.echo(f"The run of {name} is cancelled: it is asked to stop, and can commit for at most {seconds:g} s.")


@workers_cli.command(
    epilog=examples(
        "flask workers reschedule NAME '10 min'",
        "flask workers reschedule NAME '30 6 * * MON-FRI' --timezone Europe/Berlin",
        "flask workers reschedule NAME --reset",
    )
)
@click.argument("name", shell_complete=periodic_workers)
@click.argument("schedule", required=False)
@click.option("--timezone", metavar="ZONE", default="", help="The time zone of a cron. Default: UTC.")
@click.option("--reset", is_flag=True, help="Restore the schedule that the release declares.")
@utc_option
def reschedule(name: str, schedule: str | None, timezone: str, reset: bool) -> None:
    """Give NAME another schedule in the whole fleet.

    The schedule holds across restarts and releases. SCHEDULE is a period such as 90s, 10 min or 1h30m, or a cron.
    Write it in quotes.
    """
    manager = manager_of(name)
    if (schedule is None) != reset or (reset and timezone):
        raise WrongUsage("Expected a SCHEDULE such as '10 min', or --reset alone for the declared schedule.")
    try:
        given = as_arguments(typed_schedule(schedule, timezone)) if schedule is not None else {}
    except InvalidSchedule as error:
        raise WrongUsage(str(error.message)) from None
    changed = checked_manager().reschedule(name, **given)
    state = manager.stores.ledger.look(name)
    runs = f"{name} runs {state.schedule.describe() if state else 'as declared'}"
    say(f"{runs} {'from now on' if changed else 'already'}{_following(manager, name)}.")


@workers_cli.command(epilog=examples("flask workers repair"))
@utc_option
def repair() -> None:
    """Make ticks and messages due again after a wrong clock.

    Use it when the database's clock was ahead and is right again. Ticks and messages in its future become due. A tick
    that ran while the clock was ahead does not run twice.
    """
    manager = checked_manager()
    healed, number = manager.repair()
    clock = second(manager.history.clock())
    if healed or number:
        say(f"Due again, by the database's clock {clock}: {repaired_text(healed, number)}.")
    else:
        say(f"No worker and no message lies in the future of the database's clock, {clock}.")


# -- shared --------------------------------------------------------------------------------------


def _prepare(manager: BackgroundWorkerManager) -> None:
    try:
        manager.prepare()
    except OSError as error:
        raise not_ready(error) from None
