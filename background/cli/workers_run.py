"""Commands of `flask workers` that run or control a worker: run, trigger, pause, resume, cancel, repair."""

import gc
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from ..errors import UnknownWorker, spelled_out
from ..history.text import moment, second
from ..manager import BackgroundWorkerManager, the_manager
from ..repair.clock_ahead import repaired_text
from ..runs.dry_run import Change
from ..runs.dry_run import dry_run as rolled_back
from ..runs.execution import Execution
from .shared import WrongUsage, checked_manager, manager_of, not_ready, pause_topic, resume_topic, system_user
from .workers import workers_cli

# -- running -------------------------------------------------------------------------------------


@workers_cli.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--once", is_flag=True, help="Run the latest due tick of NAME here, if no instance has, and end.")
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
        click.echo(f"Not run here. {manager.why(name, at).sentence}")
    else:
        _report(manager, execution)


@workers_cli.command()
@click.argument("name")
@click.option("--dry-run", is_flag=True, help="Roll the run back, and show the rows that it would have changed.")
def trigger(name: str, dry_run: bool) -> None:
    """Run NAME now, in this process, outside its schedule.

    Exits with 1 if the run did not succeed. Ctrl-C hands the run back, and another instance runs it.

    --dry-run claims nothing and leaves no row in the history. Effects outside the database are not undone.
    """
    manager = manager_of(name)
    _prepare(manager)
    if dry_run:
        store, at = manager.stores.main, manager.history.clock()
        _print_changes(name, rolled_back(manager.app, manager.db, store, manager.workers[name], at))
        return
    with _handed_back_on_signals(manager, name):
        execution = manager.trigger(name)
    if execution is None:
        click.echo(spelled_out(f"Not run: {_why_not_triggered(manager, name)}"))
        raise click.exceptions.Exit(1)
    _report(manager, execution)


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
    click.echo(manager.why(execution.claim.worker, execution.claim.tick).sentence)
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
        click.echo(manager.why(name, newest[0].tick).sentence if newest else f"{name} was not run.")
        raise click.exceptions.Exit(1) from None
    finally:
        signal.signal(signal.SIGTERM, before)


# -- controlling ---------------------------------------------------------------------------------


@workers_cli.command()
@click.argument("name")
def pause(name: str) -> None:
    """Run no more ticks of NAME until it is resumed.

    The pause holds for every instance. A run in progress goes on. Of a message worker, this pauses the topic.
    """
    if topic := the_manager().topic_of(name):
        pause_topic(topic)
        return
    manager = manager_of(name)
    changed = checked_manager().pause(name)
    state = manager.stores.ledger.look(name)
    since = f", since {second(state.paused_at)}" if state else ""
    click.echo(f"{name} is paused{since}." if changed else f"{name} was paused already{since}.")


@workers_cli.command()
@click.argument("name")
def resume(name: str) -> None:
    """Run NAME again, from its next tick on.

    Of a message worker, this resumes the topic.
    """
    if topic := the_manager().topic_of(name):
        resume_topic(topic)
        return
    manager = manager_of(name)
    changed = checked_manager().resume(name)
    state = manager.stores.ledger.look(name)
    following = f"; its next tick is {moment(state.schedule.next(state.clock))}" if state else ""
    click.echo(f"{name} is resumed{following}." if changed else f"{name} was not paused{following}.")


@workers_cli.command()
@click.argument("name")
def cancel(name: str) -> None:
    """Cancel the run of NAME that is in progress, in any process.

    The run is asked to stop within a heartbeat. After WORKERS_SHUTDOWN_SECONDS it can no longer commit. Its tick does
    not run again, and the next ticks go on.
    """
    manager = manager_of(name)
    if not checked_manager().cancel(name, by=system_user()):
        click.echo(f"{name} is not running.")
        return
    seconds = manager.app.config["WORKERS_SHUTDOWN_SECONDS"]
    click.echo(f"The run of {name} is cancelled: it is asked to stop, and can commit for at most {seconds:g} s.")


@workers_cli.command()
def repair() -> None:
    """Make ticks and messages due again after a wrong clock.

    Use it when the database's clock was ahead and is right again. Ticks and messages in its future become due. A tick
    that ran while the clock was ahead does not run twice.
    """
    manager = checked_manager()
    healed, number = manager.repair()
    clock = second(manager.history.clock())
    if healed or number:
        click.echo(f"Due again, by the database's clock {clock}: {repaired_text(healed, number)}.")
    else:
        click.echo(f"No worker and no message lies in the future of the database's clock, {clock}.")


# -- shared --------------------------------------------------------------------------------------


def _prepare(manager: BackgroundWorkerManager) -> None:
    try:
        manager.prepare()
    except OSError as error:
        raise not_ready(error) from None
