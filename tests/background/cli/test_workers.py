"""`flask workers ...`: its output, its exit codes, and its side effects."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from flask import Flask
from sqlalchemy import Engine, event, insert, text, update
from support.databases import close, on_sqlite
from support.fleet import FLASK_APP, make_app, statements
from support.fork_server import Nursery
from support.processes import ROOT, Process, environment

from background import (
    BackgroundWorkerManager,
    Message,
    MessageWorker,
    PeriodicWorker,
    PruneHistoryWorker,
    WorkerContext,
)
from background.cli.shared import system_user
from background.cli.terminal import table
from background.database.tables import executions, instances
from background.schedule.cron import Cron

MINUTE = timedelta(minutes=1)

Command = Callable[..., subprocess.CompletedProcess[str]]
Running = Callable[..., AbstractContextManager[Process]]


class Greet(PeriodicWorker):
    period = 10 * MINUTE
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        pass


class Weekly(Greet):
    """A worker for tests that read its latest tick twice: no tick falls due in between."""

    period = timedelta(days=7)


class Stumble(PeriodicWorker):
    cron = "*/5 * * * *"
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        raise ValueError("no such\x1b[31m book")


class Rest(Greet):
    enabled = False


class Tidy(Greet):
    pass


class Count(MessageWorker):
    topic = "orders"

    def handle(self, message: Message, context: WorkerContext) -> None:
        pass


class Post(Count):
    topic = "mail"


class Interrupted(Greet):
    """Its first run sends itself a Ctrl-C. Later runs do not."""

    runs = 0

    def do_work(self, context: WorkerContext) -> None:
        Interrupted.runs += 1
        if Interrupted.runs == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)


class InterruptedAsync(PeriodicWorker):
    period = 10 * MINUTE
    run_on_first_start = True

    async def do_work(self, context: WorkerContext) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(10)


@pytest.fixture
def app(database_url: str) -> Iterator[Flask]:
    app = make_app(
        database_url, Greet, Stumble, Rest, Tidy, PruneHistoryWorker, Count, Post, WORKERS_HEARTBEAT_SECONDS=0.2
    )
    yield app
    close(app)


@pytest.fixture
def flask(app: Flask) -> Callable[..., Result]:
    """Run `flask workers` with these arguments."""

    def flask(*arguments: str, code: int = 0) -> Result:
        result = app.test_cli_runner().invoke(args=["workers", *arguments])
        assert result.exit_code == code, result.output + repr(result.exception)
        assert "Traceback" not in result.stderr
        return result

    return flask


@pytest.fixture
def write(manager: BackgroundWorkerManager) -> Callable[..., None]:
    """Write a row of an execution."""

    def write(name: str, state: str, tick: datetime, **columns: Any) -> None:
        row = {"worker": name, "state": state, "tick": tick, "trigger": "schedule", **columns}
        with manager.stores.main.engine.begin() as connection:
            connection.execute(insert(executions).values(row))

    return write


def leave_behind(manager: BackgroundWorkerManager, name: str, tick: datetime, lease: float = -60) -> None:
    """Insert a run of the tick, on an instance that lost its power a minute ago and has this much of its lease left."""
    manager.recovery.look(manager.workers[name])
    clock = manager.history.clock()
    expires_at = clock + timedelta(seconds=lease)
    long_ago = min(clock, expires_at)
    with manager.stores.leases.engine.begin() as connection:
        row = {"id": "dead", "host": "far", "pid": 7, "started_at": long_ago, "heartbeat_at": long_ago}
        connection.execute(insert(instances).values(**row, expires_at=expires_at))
    assert manager.stores.ledger.claim(
        name, tick, manager.recovery.look(manager.workers[name]).schedule_text, ("dead", "far:7")
    )


def due(manager: BackgroundWorkerManager, name: str) -> datetime:
    state = manager.recovery.look(manager.workers[name])
    return state.schedule.previous(state.clock)


# -- instances -----------------------------------------------------------------------------------


def test_the_instances_are_shown_with_their_runs_and_their_clocks(
    flask: Callable[..., Result], manager: BackgroundWorkerManager
) -> None:
    assert "No instance has been alive" in flask("instances").stdout
    leave_behind(manager, "greet", due(manager, "greet"))
    instance = manager.presence.sign_on()
    instance.clock_offset = timedelta(seconds=-7)
    manager.stores.leases.beat(instance)
    header, ours, theirs = flask("instances").stdout.splitlines()
    assert header.split() == ["INSTANCE", "STATE", "RELEASE", "STARTED", "HEARTBEAT", "CLOCK", "HOLDS"]
    assert re.match(rf"{re.escape(instance.name)} +alive .*\+7.000 s$", ours)
    assert re.match(r"far:7 +lost .* greet$", theirs)
    (row,) = [row for row in json.loads(flask("instances", "--json").stdout) if row["is_alive"]]
    assert (row["pid"], row["clock_ahead"], row["holds"]) == (instance.pid, 7, [])


# -- list ----------------------------------------------------------------------------------------


def test_a_fresh_database_lists_every_worker_of_the_release(flask: Callable[..., Result]) -> None:
    silence, *lines, messages = flask("list").stdout.splitlines()
    assert silence == "No instance is alive, and none is known: no worker runs. `flask workers run` starts one."
    assert messages.startswith("Messages: mail (post), orders (count)")
    assert lines[0].split("  ")[0] == "NAME"
    assert [line.split()[0] for line in lines[1:]] == [
        "greet",
        "prune_history_worker",
        "rest",
        "stumble",
        "tidy",
    ]
    assert "every 10 minutes" in lines[1]
    assert lines[3].endswith("disabled")
    assert "at */5 * * * * (UTC)" in lines[4]


@on_sqlite
def test_the_list_shows_how_the_last_tick_ended_and_where_each_worker_runs(
    flask: Callable[..., Result], manager: BackgroundWorkerManager
) -> None:
    assert manager.tick("stumble", manager.history.clock())
    leave_behind(manager, "greet", due(manager, "greet"))
    manager.pause("tidy")
    rows = {row["name"]: row for row in json.loads(flask("list", "--json").stdout)}
    assert rows["stumble"]["last"]["state"] == "failed"
    assert rows["stumble"]["last"]["seconds"] < 60
    assert rows["greet"]["running"]["instance"] == "far:7"
    assert rows["greet"]["running"]["is_gone"]
    assert rows["greet"]["last"] is None
    assert rows["tidy"]["paused_at"]
    assert rows["tidy"]["next_tick"] is None
    lines = {line.split()[0]: line for line in flask("list").stdout.splitlines()}
    assert "far:7, which is gone" in lines["greet"]
    assert "paused since 20" in lines["tidy"]
    assert re.search(r"failed +\d\.\d{3} s", lines["stumble"])
    assert re.search(r" running +\S+ s +on far:7", lines["greet"])


@on_sqlite
def test_the_list_shows_workers_that_another_release_left(
    flask: Callable[..., Result], manager: BackgroundWorkerManager
) -> None:
    manager.tick("greet", manager.history.clock())
    manager.remove("greet")
    assert flask("list").stdout.splitlines()[2].endswith("not in this release")


@on_sqlite
def test_the_list_shows_the_schedule_in_force_and_the_declared_one(
    flask: Callable[..., Result], manager: BackgroundWorkerManager
) -> None:
    manager.reschedule("greet", period=7 * MINUTE)
    line = flask("list").stdout.splitlines()[2]
    assert "every 7 minutes" in line
    assert line.endswith("declared: every 10 minutes")


@on_sqlite
def test_the_list_shows_a_row_with_an_unreadable_schedule_of_a_newer_release(
    flask: Callable[..., Result], manager: BackgroundWorkerManager
) -> None:
    manager.recovery.look(Greet)
    with manager.stores.main.engine.begin() as connection:
        connection.execute(text("UPDATE background_workers SET schedule = 'on full moons'"))
    assert "a schedule that this release cannot read" in flask("list").stdout.splitlines()[2]
    assert "The stored schedule 'on full moons' cannot be used" in flask("why", "greet", code=1).stderr


def test_the_list_costs_the_same_queries_with_any_number_of_workers(
    flask: Callable[..., Result], manager: BackgroundWorkerManager, write: Callable[..., None]
) -> None:
    counts = []
    for number in range(3):
        for more in range(number * 20):
            worker = type(f"Extra{number}x{more}", (Greet,), {})
            manager.add(worker)
            leave_behind_one(manager, worker)
            write("greet", "succeeded", datetime(2026, 1, 1, tzinfo=UTC) + (more + number * 50) * MINUTE)
        with statements(Engine) as asked:
            flask("list")
        counts.append(len(asked))
    assert counts[1] == counts[2] == 7, counts


def leave_behind_one(manager: BackgroundWorkerManager, worker: type[PeriodicWorker]) -> None:
    state = manager.recovery.look(worker)
    tick = state.schedule.previous(state.clock)
    assert manager.stores.ledger.claim(worker.name, tick, state.schedule_text, (worker.name, "far:7"))


def test_every_statement_on_executions_reads_only_a_range_of_an_index(
    flask: Callable[..., Result], manager: BackgroundWorkerManager
) -> None:
    engine = manager.stores.main.engine
    manager.tick("greet", manager.history.clock())
    asked: list[tuple[str, Any]] = []

    def remember(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_more: Any) -> None:
        if statement.startswith("SELECT") and "background_executions" in statement:
            asked.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", remember)
    flask("list")
    flask("history", "greet")
    flask("why", "greet", "--at", "2020-01-01T00:00Z", code=1)
    event.remove(engine, "before_cursor_execute", remember)
    assert len(asked) >= 5
    is_sqlite = engine.dialect.name == "sqlite"
    with engine.connect() as connection:
        if not is_sqlite:  # a few rows are read faster without the index
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        for statement, parameters in asked:
            explain = "EXPLAIN QUERY PLAN " if is_sqlite else "EXPLAIN "
            plan = "\n".join(str(row[-1]) for row in connection.exec_driver_sql(explain + statement, parameters))
            assert not re.search(r"SCAN background_executions|Seq Scan on background_executions", plan), plan


# -- check ---------------------------------------------------------------------------------------


@on_sqlite
def test_check_prints_the_next_three_ticks_of_every_worker_and_writes_nothing(
    flask: Callable[..., Result], manager: BackgroundWorkerManager
) -> None:
    before = datetime.now(UTC)
    manager.presence.sign_on()
    result = json.loads(flask("check", "--json").stdout)
    assert result["problems"] == []
    greet = result["workers"][0]
    ticks = [datetime.fromisoformat(each) for each in greet["next_ticks"]]
    assert before < ticks[0] == ticks[1] - 10 * MINUTE == ticks[2] - 20 * MINUTE
    *_, unseen, fine = flask("check").stdout.splitlines()
    assert fine == "Fine: the settings, 7 workers, the database, its migrations, and the fleet of 1 instance."
    assert unseen == f"Not looked at: {'; '.join(result['not_looked_at'])}."
    assert manager.stores.ledger.states() == {}


def test_a_wrong_setting_is_one_sentence(sqlite_url: str, command: Command) -> None:
    result = command("check", DATABASE_URL=sqlite_url, WORKERS_THREADS="many")
    assert result.returncode == 1
    assert result.stderr.startswith("Error: WORKERS_THREADS is 'many'; expected a whole number")
    assert result.stderr.count("\n") == 1


# -- run --once, trigger -------------------------------------------------------------------------


def test_run_once_runs_the_latest_due_tick_once(flask: Callable[..., Result], manager: BackgroundWorkerManager) -> None:
    manager.add(Weekly)
    assert re.search(r"weekly ran at .* and succeeded in ", flask("run", "weekly", "--once").stdout)
    second = flask("run", "weekly", "--once").stdout
    assert second.startswith("Not run here. The tick 20")
    assert " succeeded in " in second


@on_sqlite
def test_run_once_of_a_failing_worker_says_its_error_and_exits_with_1(flask: Callable[..., Result]) -> None:
    output = flask("run", "stumble", "--once", code=1).stdout
    assert re.search(r" failed after \S+ s: ValueError: no such\\x1b\[31m book\.\n$", output)


def test_run_once_takes_over_a_lost_tick_and_says_so(
    flask: Callable[..., Result], manager: BackgroundWorkerManager
) -> None:
    manager.add(Weekly)
    leave_behind(manager, "weekly", due(manager, "weekly"))
    output = flask("run", "weekly", "--once").stdout
    assert not output.startswith("Not run here")
    assert "(attempt 2; the one before was lost on far:7 (far:7 stopped renewing its lease))" in output


@on_sqlite
def test_run_once_leaves_a_paused_and_a_disabled_worker_alone(
    flask: Callable[..., Result], manager: BackgroundWorkerManager
) -> None:
    manager.pause("greet")
    assert "was skipped, as the worker was paused since" in flask("run", "greet", "--once").stdout
    assert flask("run", "rest", "--once").stdout == "Not run: rest is disabled in this release (enabled = False).\n"


@on_sqlite
def test_run_once_needs_one_name(flask: Callable[..., Result]) -> None:
    assert "`flask workers run NAME --once`" in flask("run", "--once", code=2).stderr


def test_trigger_runs_a_worker_now_and_prints_the_outcome(flask: Callable[..., Result]) -> None:
    for _ in range(2):
        first, outcome = flask("trigger", "greet").stdout.splitlines()
        assert first == "Running greet in this terminal's process, not in the fleet. Ctrl-C hands the run back."
        assert outcome.startswith("The manual run of greet asked for at 20")
    assert " failed after " in flask("trigger", "stumble", code=1).stdout


@on_sqlite
def test_trigger_of_a_running_worker_says_where_it_runs(
    flask: Callable[..., Result], manager: BackgroundWorkerManager
) -> None:
    leave_behind(manager, "greet", due(manager, "greet"), lease=60)
    assert re.search(
        r"Not run: greet is running already, the tick \S+ on far:7", flask("trigger", "greet", code=1).stdout
    )


@pytest.mark.parametrize("worker", [Interrupted, InterruptedAsync])
def test_a_signal_during_a_manual_run_hands_it_back(
    flask: Callable[..., Result], manager: BackgroundWorkerManager, worker: type[PeriodicWorker]
) -> None:
    Interrupted.runs = 0
    manager.add(worker)
    handler = signal.getsignal(signal.SIGTERM)
    assert "was handed back by" in flask("trigger", worker.name, code=1).stdout
    assert signal.getsignal(signal.SIGTERM) is handler
    state = manager.recovery.look(worker)
    assert state.running is None
    assert state.pending_tick == manager.history.executions(worker.name)[0].tick


# -- run -----------------------------------------------------------------------------------------

SHOP = """
    import os, sys, time
    from datetime import timedelta

    from support.fleet import from_environment
    from background import MessageWorker, PeriodicWorker


    class Loud(MessageWorker):
        topic = "loud"

        def handle(self, message, context):
            sys.stdout.write(f"{self.topic}: {message.payload}\\n")


    class Silent(Loud):
        topic = "silent"


    class Busy(PeriodicWorker):
        period = timedelta(seconds=1)

        def do_work(self, context):
            sys.stdout.write("busy\\n")
            context.stopping.wait(60)
            if os.environ.get("STUBBORN"):
                sys.stdout.write("told\\n")
                time.sleep(60)
            context.raise_if_stopping()


    class Quick(PeriodicWorker):
        period = timedelta(seconds=1)

        def do_work(self, context):
            sys.stdout.write("quick\\n")


    def create_app():
        return from_environment(Busy, Quick, Loud, Silent)
"""


@pytest.fixture
def command(nursery: Nursery, tmp_path: Path) -> Command:
    """Run `flask workers` in a process of its own."""

    def command(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        call, errors = [sys.executable, "-m", "flask", "workers", *arguments], tmp_path / "errors"
        code, output = nursery.run(call, environment(**{"FLASK_APP": FLASK_APP, **more}), errors)
        return subprocess.CompletedProcess(call, code, output, errors.read_text())

    return command


@pytest.fixture
def running(nursery: Nursery, tmp_path: Path) -> Running:
    """Run `flask workers run NAMES` in a process of its own until the block ends. A file has its errors."""
    (tmp_path / "shop.py").write_text(textwrap.dedent(SHOP))

    def running(database_url: str, *names: str, **more: str) -> AbstractContextManager[Process]:
        call = [sys.executable, "-m", "flask", "workers", "run", *names]
        more = {
            "WORKERS_ENABLED": "false",
            "FLASK_APP": "shop",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}{os.pathsep}{tmp_path}",
            **more,
        }
        return nursery.forked(call, environment(database_url, **more), tmp_path / "errors")

    return running


def states(database_url: str, name: str) -> list[str]:
    app = make_app(database_url)
    result = app.test_cli_runner().invoke(args=["workers", "history", name, "--json"])
    close(app)
    return [row["state"] for row in json.loads(result.stdout)]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@on_sqlite
def test_run_serves_the_named_workers_until_a_stop_request(
    database_url: str, tmp_path: Path, running: Running, signum: signal.Signals
) -> None:
    with running(database_url, "busy") as process:
        process.wait_for("busy")
        process.signal(signum)
        code, errors = process.wait(), (tmp_path / "errors").read_text()
        assert (code, process.output) == (0, "busy"), errors
        assert "with 1 worker" in errors
        assert "Traceback" not in errors
    assert "handed back" in states(database_url, "busy")


def test_run_without_names_serves_all_of_them(sqlite_url: str, tmp_path: Path, running: Running) -> None:
    with running(sqlite_url) as process:
        process.wait_for("busy")
        process.wait_for("quick")
        process.signal(signal.SIGTERM)
        assert process.wait() == 0, (tmp_path / "errors").read_text()


def test_run_serves_only_the_named_message_workers(database_url: str, tmp_path: Path, running: Running) -> None:
    app = make_app(database_url)
    workers: BackgroundWorkerManager = app.extensions["background_workers"]
    for topic in ("silent", "loud"):
        workers.add(type(topic, (MessageWorker,), {"topic": topic, "handle": lambda *_: None}))
    with app.app_context():
        workers.enqueue("silent", "no")
        workers.enqueue("loud", "yes")
        workers.db.session.commit()
    with running(database_url, "loud") as process:
        process.wait_for("loud")
        process.signal(signal.SIGTERM)
        code, errors = process.wait(), (tmp_path / "errors").read_text()
        assert (code, process.output) == (0, "loud: yes"), errors
        assert "with 1 worker" in errors
    assert [letter.state for letter in workers.messages.letters()] == ["done", "waiting"]
    close(app)


@on_sqlite
def test_a_second_signal_ends_a_run_that_ignores_the_first(database_url: str, tmp_path: Path, running: Running) -> None:
    with running(database_url, "busy", STUBBORN="1", WORKERS_SHUTDOWN_SECONDS="50") as process:
        process.wait_for("busy")
        process.signal(signal.SIGTERM)
        process.wait_for("told")  # two signals at once would count as one
        with pytest.raises(AssertionError, match="It did not end"):
            process.wait(0.5)
        process.signal(signal.SIGTERM)
        assert process.wait() == 0, (tmp_path / "errors").read_text()
    app = make_app(database_url)
    result = app.test_cli_runner().invoke(args=["workers", "history", "busy"])
    close(app)
    assert "which is gone: will be taken over" in result.stdout


# -- trigger in the fleet, reschedule ------------------------------------------------------------


def test_a_trigger_in_the_fleet_is_run_by_an_instance(
    flask: Callable[..., Result], manager: BackgroundWorkerManager
) -> None:
    ran = threading.Event()

    class Telling(Weekly):
        def do_work(self, context: WorkerContext) -> None:
            ran.set()

    manager.add(Telling)
    alone = flask("trigger", "telling", "--fleet").stdout
    assert alone.startswith("telling will run as soon as an instance is alive. No instance is alive, and none is known")
    again = flask("trigger", "telling", "--fleet", code=1).stdout
    assert again == "telling is running already, or will run next: see `flask workers list`.\n"
    assert not ran.is_set()
    manager.start()
    assert ran.wait(30)


@on_sqlite
def test_a_trigger_in_a_living_fleet_says_when_it_runs(
    flask: Callable[..., Result], manager: BackgroundWorkerManager
) -> None:
    manager.presence.sign_on()
    assert flask("trigger", "greet", "--fleet").stdout == (
        "An instance will run greet within 0.2 s. `flask workers why greet` says how it ended.\n"
    )
    assert (
        "--fleet was given with --dry-run; expected one of them"
        in flask("trigger", "greet", "--fleet", "--dry-run", code=2).stderr
    )


@on_sqlite
def test_the_list_shows_the_progress_of_a_run(flask: Callable[..., Result], manager: BackgroundWorkerManager) -> None:
    leave_behind(manager, "greet", due(manager, "greet"), lease=60)
    with manager.stores.main.engine.begin() as connection:
        connection.execute(update(executions).values(progress_done=3, progress_total=60))
    line = next(line for line in flask("list").stdout.splitlines() if line.startswith("greet"))
    assert re.search(r" running +\S+ s +3 of 60 on far:7$", line)


def test_reschedule_changes_the_schedule_and_resets_it(
    flask: Callable[..., Result], manager: BackgroundWorkerManager
) -> None:
    changed = flask("reschedule", "greet", "7 min").stdout
    assert re.fullmatch(r"greet runs every 7 minutes from now on; its next tick is \S+Z\.\n", changed)
    assert flask("reschedule", "greet", "420").stdout.startswith("greet runs every 7 minutes already")
    cron = flask("reschedule", "greet", "30 6 * * MON-FRI", "--timezone", "Asia/Tokyo").stdout
    assert cron.startswith("greet runs at 30 6 * * MON-FRI (Asia/Tokyo) from now on")
    assert flask("reschedule", "greet", "--reset").stdout.startswith("greet runs every 10 minutes from now on")
    assert flask("reschedule", "greet", "--reset").stdout.startswith("greet runs every 10 minutes already")
    assert str(manager.recovery.look(Greet).schedule) == "every 600s"


@on_sqlite
def test_a_wrong_schedule_is_one_sentence_and_changes_nothing(
    flask: Callable[..., Result], manager: BackgroundWorkerManager
) -> None:
    for arguments in (
        [],
        ["7 min", "--reset"],
        ["--reset", "--timezone", "Asia/Tokyo"],
        ["7 min", "--timezone", "Asia/Tokyo"],
        ["each morning"],
        ["99 6 * * *"],
        ["0 6 * * *", "--timezone", "Asia/Tokio"],
    ):
        assert flask("reschedule", "greet", *arguments, code=2).stderr.count("\n") == 1, arguments
    assert manager.stores.ledger.look("greet") is None


# -- pause, resume, history, why -----------------------------------------------------------------


@on_sqlite
def test_pause_and_resume_print_their_changes(flask: Callable[..., Result], manager: BackgroundWorkerManager) -> None:
    assert flask("resume", "greet").stdout.startswith("greet was not paused; its next tick is 20")
    assert re.fullmatch(r"greet is paused, since \S+Z\.\n", flask("pause", "greet").stdout)
    assert manager.recovery.look(Greet).paused_at
    assert re.fullmatch(r"greet was paused already, since \S+Z\.\n", flask("pause", "greet").stdout)
    assert flask("resume", "greet").stdout.startswith("greet is resumed; its next tick is 20")
    assert manager.recovery.look(Greet).paused_at is None


@on_sqlite
def test_cancel_says_whether_anything_runs_and_names_the_user(
    flask: Callable[..., Result], manager: BackgroundWorkerManager
) -> None:
    assert flask("cancel", "greet").stdout == "greet is not running.\n"
    leave_behind(manager, "greet", due(manager, "greet"))
    assert flask("cancel", "greet").stdout == (
        "The run of greet is cancelled: it is asked to stop, and can commit for at most 10 s.\n"
    )
    by = f"cancelled by {system_user()} at 20"
    assert by in flask("list").stdout
    assert by in flask("history", "greet").stdout
    assert f"was {by}" in flask("why", "greet").stdout


@on_sqlite
def test_history_prints_every_moment_in_one_format(flask: Callable[..., Result], write: Callable[..., None]) -> None:
    tick = datetime(2026, 1, 1, tzinfo=UTC)
    write("greet", "skipped", tick, reason=f"still running the tick {(tick - MINUTE).isoformat()} on a:1")
    assert flask("history", "greet").stdout.rstrip().endswith("still running the tick 2025-12-31T23:59:00Z on a:1")


@on_sqlite
def test_history_is_newest_first_and_ends_a_failure_with_its_last_line(
    flask: Callable[..., Result], manager: BackgroundWorkerManager, write: Callable[..., None]
) -> None:
    old = datetime(2026, 1, 1, tzinfo=UTC)
    write("stumble", "missed", old, through=old + 15 * MINUTE, reason="no instance came to run it in time")
    assert manager.tick("stumble", manager.history.clock())
    lines = flask("history", "stumble").stdout.splitlines()
    assert lines[0].split() == ["TICK", "STATE", "ATTEMPT", "STARTED", "TOOK", "INSTANCE", "NOTE"]
    assert lines[1].endswith("ValueError: no such\\x1b[31m book")
    assert lines[-1].startswith("2026-01-01T00:00:00Z to 2026-01-01T00:15:00Z  missed")
    assert len(flask("history", "stumble", "--limit", "1").stdout.splitlines()) == 2
    assert flask("history", "stumble", "--state", "handed-back").stdout == (
        "stumble has no executions that are handed back.\n"
    )
    newest = json.loads(flask("history", "stumble", "--json", "--state", "failed").stdout)[0]
    assert newest["reason"].startswith("Traceback (most recent call last)")


@on_sqlite
def test_history_marks_a_running_row_whose_instance_is_gone(
    flask: Callable[..., Result], manager: BackgroundWorkerManager
) -> None:
    leave_behind(manager, "greet", due(manager, "greet"))
    assert flask("history", "greet").stdout.rstrip().endswith("running on far:7, which is gone: will be taken over")


@on_sqlite
def test_history_of_a_worker_that_never_ran_says_so(flask: Callable[..., Result]) -> None:
    assert flask("history", "greet").stdout == "greet has no executions yet.\n"


@on_sqlite
def test_why_exits_with_0_when_it_ran_and_with_1_when_it_did_not(
    flask: Callable[..., Result], manager: BackgroundWorkerManager
) -> None:
    manager.add(Weekly)
    assert "no instance has ever started the worker" in flask("why", "weekly", code=1).stdout
    flask("run", "weekly", "--once")
    assert " succeeded in " in flask("why", "weekly").stdout
    assert json.loads(flask("why", "weekly", "--json").stdout)["records"][0]["state"] == "succeeded"
    assert "is not due yet" in flask("why", "weekly", "--at", "2999-01-01").stdout


@on_sqlite
def test_why_reads_a_moment_without_a_zone_as_utc_and_says_so(flask: Callable[..., Result]) -> None:
    naive = flask("why", "greet", "--at", "2999-01-01T12:34")
    assert naive.stderr == "2999-01-01T12:34 names no time zone, so it is taken as UTC.\n"
    assert "The tick 2999-01-01T12:30:00Z" in naive.stdout
    aware = flask("why", "greet", "--at", "2999-01-01T12:34+05:30")
    assert aware.stderr == ""
    assert "The tick 2999-01-01T07:00:00Z" in aware.stdout


def test_why_answers_for_a_worker_that_only_the_database_knows(
    flask: Callable[..., Result], manager: BackgroundWorkerManager
) -> None:
    manager.add(Weekly)
    assert manager.tick("weekly", manager.history.clock())
    manager.remove("weekly")
    assert " succeeded in " in flask("why", "weekly").stdout
    assert len(flask("history", "weekly").stdout.splitlines()) == 2


def test_a_host_name_cannot_control_the_terminal(app: Flask, manager: BackgroundWorkerManager) -> None:
    manager.add(Weekly)
    assert manager.tick("weekly", manager.history.clock())
    with manager.stores.main.engine.begin() as connection:
        connection.execute(update(executions).values(instance_name="evil\x1b[2J:7"))
    for arguments in (["why", "weekly"], ["history", "weekly"], ["history", "weekly", "--json"]):
        result = app.test_cli_runner().invoke(args=["workers", *arguments], color=True)
        assert (result.exit_code, "evil" in result.stdout, "\x1b" in result.stdout) == (0, True, False)


WRONG = [
    ("why", "greet", "--at", "yesterday"),
    ("why", "greet", "--at", "0001-01-01"),
    ("why", "greet", "--at", "9999-12-31T23:59:59-23:00"),
    ("history", "greet", "--limit", "0"),
    ("history", "greet", "--limit", "many"),
    ("history", "greet", "--limit", "99999999999"),
    ("history", "greet", "--limit", "9" * 5_000),
    ("history", "greet", "--limit", "00000099999"),
    ("history", "greet", "--limit", "0000000001" + "9" * 5_000),
    ("history", "greet", "--state", "fine"),
]


@on_sqlite
def test_a_wrong_option_is_one_sentence(flask: Callable[..., Result]) -> None:
    for arguments in WRONG:
        result = flask(*arguments, code=2)
        assert result.stderr.count("\n") == 1
        assert repr(arguments[-1]) in result.stderr
        assert "expected" in result.stderr


@on_sqlite
def test_an_unknown_name_is_refused_with_the_closest_name(flask: Callable[..., Result]) -> None:
    for command in ("run", "run --once", "trigger", "pause", "resume", "history", "why"):
        result = flask(*command.split(), "gret", code=2)
        assert result.stderr == "Error: There is no worker named 'gret'. Did you mean 'greet'?\n", command


@pytest.mark.parametrize("group", [["workers"], ["messages"]])
def test_the_help_of_a_group_shows_whole_sentences(app: Flask, group: list[str]) -> None:
    _, _, commands = app.test_cli_runner().invoke(args=[*group, "--help"]).stdout.partition("Commands:")
    assert commands
    assert "..." not in commands


def test_a_usage_error_cannot_control_the_terminal(app: Flask) -> None:
    for arguments in (["\x1b[2J"], ["list", "\x1b[2J"], ["list", "--\x1b[2J"]):
        result = app.test_cli_runner().invoke(args=["workers", *arguments], color=True)
        assert (result.exit_code, "\x1b" in result.stderr) == (2, False)


@pytest.mark.parametrize("command", ["history", "why"])
def test_a_name_that_is_not_text_is_unknown(flask: Callable[..., Result], command: str) -> None:
    assert "no worker named '\\udcff'" in flask(command, os.fsdecode(b"\xff"), code=2).stderr


# -- the commands' own manners -------------------------------------------------------------------


@pytest.mark.promise
def test_flask_help_imports_no_scheduler_and_opens_no_database(tmp_path: Path) -> None:
    path = tmp_path / "shop.sqlite"
    probe = (
        "import sys; from flask.cli import main\n"
        "for arguments in (['--help'], ['workers', 'list', '--help']):\n"
        "    sys.argv = ['flask', *arguments]\n"
        "    try: main()\n"
        "    except SystemExit: pass\n"
        "    print('imported:', *{'apscheduler', 'cronsim'} & sys.modules.keys())"
    )
    call, env = [sys.executable, "-c", probe], environment(f"sqlite:///{path}", FLASK_APP=FLASK_APP)
    result = subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.count("Usage: flask") == 2
    assert [line for line in result.stdout.splitlines() if "imported" in line] == ["imported:"] * 2
    assert list(tmp_path.iterdir()) == []


@on_sqlite
def test_help_documents_the_exit_codes(flask: Callable[..., Result]) -> None:
    output = flask("--help").stdout
    assert "Exit codes:" in output
    assert re.search(r"^\s+2  wrong usage", output, re.MULTILINE)


@on_sqlite
def test_a_command_in_a_process_that_runs_the_workers_leaves_them_running(
    flask: Callable[..., Result], manager: BackgroundWorkerManager
) -> None:
    ran = threading.Event()

    class Telling(Greet):
        def do_work(self, context: WorkerContext) -> None:
            ran.set()

    manager.add(Telling)
    manager.start()
    assert ran.wait(30)
    flask("list")
    assert manager.is_started


def test_a_table_that_disappears_meanwhile_is_reported_in_one_sentence(
    flask: Callable[..., Result], manager: BackgroundWorkerManager
) -> None:
    with manager.stores.main.engine.begin() as connection:
        connection.execute(text("DROP TABLE background_executions"))
    result = flask("history", "greet", code=1)
    assert result.stderr.startswith("Error: The database cannot be used (")
    assert result.stderr.count("\n") == 1


def test_a_table_omits_empty_columns() -> None:
    assert table(("a", "note", "b"), [["long one", "", "x"], ["y", "", ""]]) == "A         B\nlong one  x\ny"


# -- preview ---------------------------------------------------------------------------------------


def _previewed(app: Flask, *arguments: str) -> list[str]:
    result = app.test_cli_runner().invoke(args=["workers", "preview", *arguments])
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


@on_sqlite
def test_preview_shows_the_next_ticks_in_the_workers_zone_and_the_cron_in_words(app: Flask) -> None:
    class Morning(Greet):
        cron, period = "30 6 * * MON-FRI", None
        timezone = "Asia/Tokyo"

    app.extensions["background_workers"].add(Morning)
    lines = _previewed(app, "morning", "--count", "3")
    assert lines[0] == "The release declares that morning runs at 06:30 on Monday through Friday (Asia/Tokyo)."
    assert len(lines) == 5
    assert all(re.search(r"T21:30:00Z +\w{3} \d{4}-\d\d-\d\d 06:30:00 JST", line) for line in lines[2:])


@on_sqlite
def test_preview_marks_the_ticks_at_which_the_clocks_change(app: Flask) -> None:
    class Nightly(Greet):
        cron, period = "30 2 * * *", None
        timezone = "Europe/Berlin"

    app.extensions["background_workers"].add(Nightly)
    lines = _previewed(app, "nightly", "--count", "366")
    assert sum("the clocks skip its time, so it runs right after the gap" in line for line in lines) == 1
    assert sum("the clocks show this time twice, and it runs the first time" in line for line in lines) == 1


def test_a_cron_that_follows_the_clock_is_marked_at_both_of_its_times() -> None:
    schedule = Cron("*/30 * * * *", "Europe/Berlin")
    autumn = datetime(2026, 10, 25, tzinfo=UTC)
    notes = [schedule.oddity(autumn + minutes * MINUTE) for minutes in (0, 30, 60, 90)]
    assert notes == ["the clocks show this time twice, and it runs both times"] * 4
    assert schedule.oddity(autumn + 120 * MINUTE) == ""


@on_sqlite
def test_preview_ends_with_the_calendar(app: Flask) -> None:
    class Leap(Greet):
        cron, period = "0 0 29 2 *", None
        timezone = "Europe/Berlin"

    app.extensions["background_workers"].add(Leap)
    assert "9996-02-29 00:00:00 CET" in _previewed(app, "leap", "--count", "10000")[-1]


@on_sqlite
def test_preview_of_a_period_is_in_utc_and_a_wrong_count_is_one_sentence(flask: Callable[..., Result]) -> None:
    assert flask("preview", "greet").output.splitlines()[0] == "The release declares that greet runs every 10 minutes."
    refused = flask("preview", "greet", "--count", "none", code=2)
    assert refused.output == "Error: --count is 'none'; expected a whole number from 1 to 10000.\n"
    assert "Did you mean 'greet'?" in flask("preview", "gret", code=2).output
