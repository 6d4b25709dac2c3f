"""Ctrl-C and SIGTERM in mid-run: the run gets a stop request, the process ends in time, and another takes over."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from flask import Flask
from support.fork_server import Nursery
from support.processes import Process, environment, eventually, flask, gunicorn, margin, started
from support.run_traces import Effects

from background import PeriodicWorker, WorkerContext

FLASK_RUN = flask("run", "--port", "0")
WORKERS_RUN = flask("workers", "run")
GUNICORN = gunicorn("-w", "1", "support.traced_app:create_app()")
GTHREAD = gunicorn("-w", "1", "-k", "gthread", "--threads", "2", "support.traced_app:create_app()")


@contextmanager
def another_instance(nursery: Nursery, url: str, **more: object) -> Iterator[Process]:
    """Start a second process of the fleet, and wait until it has joined."""
    with nursery.forked(FLASK_RUN, environment(url, **more)) as process:
        process.wait_for("joined")
        yield process


def ends_within(process: Process, seconds: float, stop: Callable[[], None]) -> str:
    """Call `stop`, and check that the process ends in time. Return its output."""
    began = time.monotonic()
    stop()
    process.wait()
    assert time.monotonic() - began < seconds + margin(5)
    return process.output


@pytest.mark.parametrize(
    ("engine", "command", "number", "group"),
    [
        ("sqlite", FLASK_RUN, signal.SIGINT, True),
        ("postgresql", FLASK_RUN, signal.SIGTERM, False),
        ("postgresql", GUNICORN, signal.SIGTERM, False),
        ("sqlite", GTHREAD, signal.SIGTERM, True),
        ("sqlite", GUNICORN, signal.SIGINT, True),
        ("sqlite", WORKERS_RUN, signal.SIGTERM, False),
        ("postgresql", WORKERS_RUN, signal.SIGINT, True),
    ],
    ids=[
        "flask-run-ctrl-c",
        "flask-run-term",
        "gunicorn-term",
        "gthread-term-to-all",
        "gunicorn-ctrl-c",
        "workers-run-term",
        "workers-run-ctrl-c",
    ],
)
def test_a_stopping_run_is_handed_back_and_another_instance_runs_it_as_the_same_attempt(
    engine: str, command: list[str], number: int, group: bool, request: pytest.FixtureRequest, nursery: Nursery
) -> None:
    effects = Effects(request.getfixturevalue(f"{engine}_url"))
    with started(command, environment(effects.url, PROBE_WORKERS="listener", WORKERS_SHUTDOWN_SECONDS=20)) as first:
        first.wait_for("The listener began")
        with another_instance(nursery, effects.url, PROBE_WORKERS="listener", PROBE_SECONDS="0.1"):
            said = ends_within(first, 1, lambda: (first.signal_group if group else first.signal)(number))
            assert eventually(lambda: effects.ticks("listener"))
    assert "The listener was told" in said
    assert "Handed the tick" in said
    assert "Traceback" not in said
    mine, theirs = effects.all("listener", "began")
    assert (mine.tick, mine.attempt, mine.key) == (theirs.tick, theirs.attempt, theirs.key)
    assert mine.pid != theirs.pid
    assert effects.states("listener") == [("handed back", 1), ("succeeded", 1)]
    effects.check_once("listener")


@pytest.mark.parametrize(
    ("engine", "command"),
    [("postgresql", FLASK_RUN), ("sqlite", GUNICORN), ("postgresql", GTHREAD)],
    ids=["flask-run", "gunicorn", "gthread"],
)
def test_a_run_that_ignores_a_stop_request_is_handed_back_in_time_and_its_late_commit_is_refused(
    engine: str, command: list[str], request: pytest.FixtureRequest, tmp_path: Path, nursery: Nursery
) -> None:
    effects = Effects(request.getfixturevalue(f"{engine}_url"))
    release = tmp_path / "release"
    env = environment(effects.url, PROBE_WORKERS="deaf", PROBE_LINGERS="yes", WORKERS_SHUTDOWN_SECONDS=1)
    with nursery.forked(command, env | {"PROBE_UNTIL": str(release)}) as first:
        first.wait_for("The deaf one began")
        with another_instance(nursery, effects.url, PROBE_WORKERS="deaf", PROBE_SECONDS=0):
            stopped = time.monotonic()
            first.signal(signal.SIGTERM)
            first.wait_for("Not every run ended in time: the remaining runs are handed back")
            assert time.monotonic() - stopped < 1 + margin(5)
            assert eventually(lambda: effects.ticks("deaf"))
            release.touch()
            first.wait_for("The deaf one was refused")
            first.wait()
    assert effects.states("deaf") == [("handed back", 1), ("succeeded", 1)]
    assert len(effects.check_once("deaf")) == 1


@pytest.mark.parametrize("command", [FLASK_RUN, GUNICORN], ids=["flask-run", "gunicorn"])
def test_a_run_that_holds_the_write_lock_of_sqlite_does_not_delay_the_exit(
    command: list[str], sqlite_url: str, nursery: Nursery
) -> None:
    effects = Effects(sqlite_url)
    env = environment(sqlite_url, PROBE_WORKERS="holder,ticker", WORKERS_SHUTDOWN_SECONDS=1)
    with nursery.forked(command, env) as first:
        first.wait_for("The holder holds")
        ends_within(first, 1, lambda: first.signal(signal.SIGTERM))
        assert effects.instances(alive=True) == set()
    assert effects.all("holder") == []
    with another_instance(nursery, sqlite_url, PROBE_WORKERS="holder", PROBE_SECONDS=0):
        assert eventually(lambda: effects.ticks("holder"))
    assert effects.states("holder") == [("handed back", 1), ("succeeded", 1)]


@pytest.mark.parametrize(
    ("command", "hurry"),
    [
        (FLASK_RUN, signal.SIGTERM),
        (FLASK_RUN, signal.SIGINT),
        (GUNICORN, signal.SIGQUIT),
        (WORKERS_RUN, signal.SIGTERM),
    ],
    ids=["flask-run-term", "flask-run-ctrl-c", "gunicorn-quit", "workers-run-term"],
)
def test_a_second_signal_ends_the_wait(command: list[str], hurry: int, sqlite_url: str, nursery: Nursery) -> None:
    effects = Effects(sqlite_url)
    env = environment(sqlite_url, PROBE_WORKERS="listener,deaf", WORKERS_SHUTDOWN_SECONDS=25)
    with nursery.forked(command, env) as first:
        first.wait_for("The deaf one began")
        first.wait_for("The listener began")
        first.signal(signal.SIGTERM)
        first.wait_for("The listener was told")
        said = ends_within(first, 0, lambda: first.signal(hurry))
        assert effects.instances(alive=True) == set()
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_reaches_every_process_of_gunicorn_does_not_shorten_the_wait(
    number: int, sqlite_url: str, nursery: Nursery
) -> None:
    """Signal all processes, as a service manager or a terminal does. The master then signals its workers again."""
    effects = Effects(sqlite_url)
    env = environment(sqlite_url, PROBE_WORKERS="deaf", PROBE_SECONDS=1.5, WORKERS_SHUTDOWN_SECONDS=20)
    with nursery.forked(GUNICORN, env) as server:
        server.wait_for("The deaf one began")
        server.signal_group(number)
        assert server.wait() == 0
    assert effects.states("deaf") == [("succeeded", 1)], server.output


@pytest.mark.parametrize("kind", ["sync", "gthread"])
def test_when_slow_clients_block_every_process_runs_are_handed_back_without_counting_an_attempt(
    kind: str, effects: Effects, nursery: Nursery
) -> None:
    """Check a process with one thread and a slow client, which gunicorn kills after its timeout."""
    env = environment(effects.url, PROBE_WORKERS="listener,deaf", PROBE_SECONDS=60, WORKERS_SHUTDOWN_SECONDS=1)
    command = gunicorn("-w", "2", "-k", kind, "--timeout", "2", "support.traced_app:create_app()")
    with nursery.forked(command, env) as server, ExitStack() as clients:
        address = "127.0.0.1", int(server.wait_for(r"Listening at: http://127\.0\.0\.1:(\d+)")[1])
        server.wait_for("joined", times=2)
        server.wait_for("The listener began")
        server.wait_for("The deaf one began")
        if kind == "gthread":  # its main thread responds whatever its clients do. The test makes it hang
            for pid in effects.instances(alive=True):
                os.kill(pid, signal.SIGABRT)
        else:
            for _ in range(2):
                slow = clients.enter_context(socket.create_connection(address))
                slow.sendall(b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n")
        server.wait_for("so this process ends: all runs of this process are handed back", times=2)
        server.wait_for("The listener began", times=2)
        server.wait_for("The deaf one began", times=2)
        clients.close()
        server.signal(signal.SIGTERM)
        server.wait()
        assert "SIGKILL" not in server.output
        assert "Traceback" not in server.output
    for worker in ("listener", "deaf"):
        *earlier, last = effects.states(worker)  # a process may take a run over before its own end
        assert set(earlier) == {("handed back", 1)}, server.output
        assert last in [("handed back", 1), ("running", 1)], "no instance was there to see it handed back"


def test_ctrl_c_in_a_terminal_lets_the_reloaders_child_end_its_run(sqlite_url: str) -> None:
    effects = Effects(sqlite_url)
    env = environment(sqlite_url, PROBE_WORKERS="deaf", PROBE_SECONDS=1.5, WORKERS_SHUTDOWN_SECONDS=20)
    with started(flask("run", "--debug", "--port", "0"), env, terminal=True) as server:
        server.wait_for("The deaf one began")
        server.type("\x03")
        assert server.wait() == 0
    assert effects.states("deaf") == [("succeeded", 1)], server.output


def test_ctrl_c_without_a_terminal_tells_the_reloaders_child_first(postgresql_url: str) -> None:
    effects = Effects(postgresql_url)
    env = environment(postgresql_url, PROBE_WORKERS="listener")
    with started(flask("run", "--debug", "--port", "0"), env) as server:
        server.wait_for("The listener began")
        server.signal(signal.SIGSTOP)  # otherwise it kills the child after 0.25 s: too soon on a busy machine
        server.signal_group(signal.SIGINT)
        server.wait_for("The listener was told")
        assert eventually(lambda: effects.instances(alive=True) == set())
        server.signal(signal.SIGCONT)
        server.wait()
    assert effects.states("listener") == [("handed back", 1)]


def test_a_stop_before_the_workers_have_joined_is_quick_and_quiet(sqlite_url: str) -> None:
    with started(GUNICORN, environment(sqlite_url, WORKERS_SHUTDOWN_SECONDS=20, PROBE_SAYS="loading")) as server:
        server.wait_for("loading")  # gunicorn loses a signal right after the fork
        said = ends_within(server, 1, lambda: server.signal(signal.SIGTERM))
    assert "Traceback" not in said, said


def test_a_run_that_is_claimed_while_its_process_stops_does_not_begin(app: Flask) -> None:
    ran: list[str] = []

    class Eager(PeriodicWorker):
        period = timedelta(days=1)
        run_on_first_start = True

        def do_work(self, context: WorkerContext) -> None:
            ran.append(context.worker)

    workers = app.extensions["background_workers"]
    workers.add(Eager)
    ledger = workers.stores.ledger
    state = workers.recovery.look(Eager)
    instance = workers.presence.sign_on()
    claim = ledger.claim_manual("eager", state.clock, (instance.id, instance.name))
    workers.tell()
    assert workers.runs.run(Eager, claim, ledger, instance).state == "handed back"
    assert ran == []
    state = workers.recovery.look(Eager)
    assert (state.running, state.pending_tick) == (None, claim.tick)
    workers.stop()
