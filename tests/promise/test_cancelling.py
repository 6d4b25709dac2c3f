"""Runs that a user cancels from another process: told within a heartbeat, fenced after a while, never run again."""

import signal
import sys
import time
from pathlib import Path

import pytest
from support.fork_server import Nursery
from support.processes import environment, eventually, flask, margin, run
from support.run_traces import Effects

HEARTBEAT, LEASE = 0.2, 5  # seconds, of `environment`
WORKERS_RUN = flask("workers", "run")


def cancel(nursery: Nursery, url: str, worker: str, **more: object) -> None:
    """Cancel the run as an operator does, in a process of its own."""
    with nursery.forked(flask("workers", "cancel", worker), environment(url, PROBE_WORKERS=worker, **more)) as command:
        command.wait_for(f"The run of {worker} is cancelled")
        assert command.wait() == 0


def test_a_run_in_another_process_is_told_within_a_heartbeat_and_its_tick_is_decided(
    effects: Effects, nursery: Nursery
) -> None:
    with nursery.forked(WORKERS_RUN, environment(effects.url, PROBE_WORKERS="listener,quick")) as process:
        process.wait_for("The listener began")
        cancel(nursery, effects.url, "listener")
        process.wait_for("The listener was told")
        process.wait_for("Cancelled at the tick")
        [row] = effects.history("listener")
        assert (row["state"], row["reason"]) == ("cancelled", None)
        assert (row["finished_at"] - row["cancelled_at"]).total_seconds() <= HEARTBEAT + margin()
        assert row["cancelled_by"]
        assert effects.notes("listener") == ["began"]
        before = len(effects.all("quick"))
        assert eventually(lambda: len(effects.all("quick")) > before), "the other workers go on"
        assert effects.states("listener") == [("cancelled", 1)]


def test_a_run_that_ignores_the_request_cannot_commit_and_is_told_apart(
    effects: Effects, nursery: Nursery, tmp_path: Path
) -> None:
    until = tmp_path / "until"
    more = {"PROBE_WORKERS": "deaf", "PROBE_UNTIL": until, "WORKERS_SHUTDOWN_SECONDS": 1}
    with nursery.forked(WORKERS_RUN, environment(effects.url, **more)) as process:
        process.wait_for("The deaf one began")
        cancel(nursery, effects.url, "deaf", WORKERS_SHUTDOWN_SECONDS=1)
        process.wait_for("Hung at the cancelled tick")
        assert reason(effects, "deaf") == "it did not end within 1 s, so its thread may still run"
        until.touch()
        process.wait_for("The deaf one was refused")
        assert eventually(lambda: "Its thread ended later, at" in reason(effects, "deaf"))
        assert effects.states("deaf") == [("cancelled", 1)]
        assert effects.notes("deaf") == []


def reason(effects: Effects, worker: str) -> str:
    [row] = effects.history(worker)
    return str(row["reason"])


# Not the shop's command, whose entry in the audit would wait for the run's lock, too.
CANCEL = """
from support.traced_app import create_app
create_app().extensions["background_workers"].cancel("holder", "ada")
"""


def test_a_run_that_holds_its_locks_to_the_end_is_cancelled(effects: Effects, nursery: Nursery, tmp_path: Path) -> None:
    """On SQLite, the run holds the only write lock, and only its own instance can write that it was cancelled."""
    until = tmp_path / "until"
    more = {"PROBE_WORKERS": "holder", "PROBE_UNTIL": until, "WORKERS_SHUTDOWN_SECONDS": 60}
    with nursery.forked(WORKERS_RUN, environment(effects.url, **more)) as process:
        process.wait_for("The holder holds")
        code, _ = run([sys.executable, "-c", CANCEL], environment(effects.url, **more))
        assert code == 0
        until.touch()
        assert eventually(lambda: effects.states("holder") == [("cancelled", 1)])
        assert effects.history("holder")[0]["cancelled_by"] == "ada"
        assert effects.notes("holder") == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_cancelled_run_whose_process_is_gone_ends_as_cancelled(
    effects: Effects, nursery: Nursery, tmp_path: Path, number: signal.Signals
) -> None:
    until = tmp_path / "until"
    more = {"PROBE_WORKERS": "deaf", "PROBE_UNTIL": until, "WORKERS_SHUTDOWN_SECONDS": 60}
    with nursery.forked(WORKERS_RUN, environment(effects.url, **more)) as first:
        first.wait_for("The deaf one began")
        with nursery.forked(WORKERS_RUN, environment(effects.url, **more)) as second:
            second.wait_for("joined")
            first.signal(number)
            gone_at = time.monotonic()
            cancel(nursery, effects.url, "deaf")  # within the lease
            assert effects.states("deaf") == [("running", 1)]
            second.wait_for("the cancelled run of the tick .* is over")
            assert time.monotonic() - gone_at <= LEASE + 1 + margin()
            assert effects.states("deaf") == [("cancelled", 1)]
            if number == signal.SIGSTOP:
                until.touch()
                first.signal(signal.SIGCONT)
                first.wait_for("The deaf one was refused")
            assert effects.notes("deaf") == []
            assert effects.states("deaf") == [("cancelled", 1)]
