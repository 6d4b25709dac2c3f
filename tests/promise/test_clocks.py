"""Hosts whose clocks are wrong, are set, or stand still: the database's clock decides."""

import glob
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.pool import NullPool
from support.fleet import PATIENCE, Fleet, Hourly, effect, wait_until
from support.fork_server import Nursery
from support.processes import Process, environment, eventually, flask
from support.run_traces import Effect, Effects

from background import ClaimLost, WorkerContext
from background.database import tables

PERIOD = timedelta(seconds=1)
MINUTES = timedelta(minutes=2)
FAKE: dict[str, object] = {
    "FAKETIME_NO_CACHE": 1,
    "FAKETIME_DONT_FAKE_MONOTONIC": 1,
    "FAKETIME_FORCE_MONOTONIC_FIX": 0,  # otherwise every wait of several threads for Python's lock spins
    "NO_FAKE_STAT": 1,
}
LIBFAKETIME = next(iter(glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")), None)
# Not `flask workers run`, which may sleep: Debian's libfaketime fails Python's time.sleep (its issue 426).
SERVE = flask("run", "--port", "0")

Host = Callable[..., AbstractContextManager[Process]]


@pytest.fixture(scope="module")
def faked() -> Iterator[Nursery]:
    """Fork processes whose clocks follow a file, which may change."""
    if LIBFAKETIME is None:
        pytest.skip("needs Debian's libfaketime")
    nursery = Nursery(LD_PRELOAD=LIBFAKETIME, **FAKE)
    yield nursery
    nursery.close()


@pytest.fixture
def host(faked: Nursery) -> Host:
    """Start a process on a host whose clock follows the file."""

    def host(url: str, clock: Path, **more: object) -> AbstractContextManager[Process]:
        more |= {"PROBE_PERIOD": PERIOD.total_seconds(), "FAKETIME_TIMESTAMP_FILE": clock}
        return faked.forked(SERVE, environment(url, **FAKE | more))

    return host


def set_clock(clock: Path, ahead: timedelta) -> None:
    new = clock.with_suffix(".new")
    new.write_text(f"{ahead.total_seconds():+f}\n")
    new.replace(clock)


def clock_ahead(folder: Path, seconds: float) -> Path:
    clock = folder / f"{seconds:+}"
    set_clock(clock, timedelta(seconds=seconds))
    return clock


def test_a_lost_tick_waits_until_a_clock_that_was_set_back_reaches_it_again(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    tick = manager.recovery.look(Hourly).clock + timedelta(seconds=1)
    fleet.set("hourly", mark=tick, pending_tick=tick, pending_attempt=2, pending_trigger="schedule")
    assert manager.ticks.run_pending(Hourly, tick) is None
    manager.start()
    (row,) = wait_until(lambda: [row for row in fleet.executions() if row.state == "succeeded"], "the run")
    assert (row.tick, row.attempt) == (tick, 2)
    assert row.started_at >= tick


def test_a_manual_run_does_not_wait_for_a_clock_that_was_set_back(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    manager.tick("hourly", datetime.now(UTC))
    assert manager.request("hourly")
    fleet.set("hourly", pending_tick=datetime.now(UTC) + MINUTES)
    manager.start()
    wait_until(lambda: fleet.states() == ["succeeded", "succeeded"], "the run")


def test_after_a_mark_was_lowered_no_tick_overtakes_the_pending_tick(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    tick = manager.recovery.look(Hourly).clock + MINUTES
    fleet.set("hourly", mark=None, pending_tick=tick, pending_attempt=2, pending_trigger="schedule")
    assert manager.tick("hourly", datetime.now(UTC)) is None
    assert fleet.executions() == []


def end(process: Process) -> None:
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    assert "Traceback" not in process.output


def ticks_on(effects: Effects, more: int) -> None:
    count = len(effects.ticks())
    wait_until(lambda: len(effects.ticks()) >= count + more, f"{more} more ticks")


def seconds_late(found: list[Effect]) -> list[float]:
    return [(effect.at - effect.tick).total_seconds() for effect in found]


def shown(url: str) -> list[int]:
    """Return how many seconds the database's clock is ahead, as each instance reports it."""
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return sorted(round(offset) for offset in connection.scalars(select(tables.instances.c.clock_offset)))


@pytest.mark.parametrize("offsets", [(1, -1), (7, -7), (60, -60), (3600, -3600, 0)], ids=lambda them: f"{them[0]}s")
def test_hosts_with_wrong_clocks_run_every_tick_once_and_on_time_together_and_alone(
    postgresql_url: str, offsets: tuple[int, ...], tmp_path: Path, host: Host
) -> None:
    effects = Effects(postgresql_url)
    with ExitStack() as stack:
        hosts = {offset: stack.enter_context(host(postgresql_url, clock_ahead(tmp_path, offset))) for offset in offsets}
        for process in hosts.values():
            process.wait_for("joined")
        since = datetime.now(UTC)
        ticks_on(effects, 2)
        wait_until(lambda: shown(postgresql_url) == sorted(-offset for offset in offsets), "a heartbeat of each")
        for offset, process in hosts.items():
            if abs(offset) > 1:
                warned = process.wait_for(r"This host's clock is ([+-]\d+\.\d) s off the database's")
                assert abs(float(warned[1]) - offset) < 1
        for offset in offsets[:-1]:
            end(hosts[offset])
        ticks_on(effects, 2)
        end(hosts[offsets[-1]])
    found = effects.check_consecutive(PERIOD, since)
    assert statistics.median(seconds_late(found)) < 0.9


def test_a_whole_fleet_that_is_a_fifth_of_a_second_ahead_begins_on_time_and_not_early(
    postgresql_url: str, tmp_path: Path, host: Host
) -> None:
    effects, clock = Effects(postgresql_url), clock_ahead(tmp_path, 0.2)
    with host(postgresql_url, clock) as one, host(postgresql_url, clock) as other:
        for process in (one, other):
            process.wait_for("joined")
        since = datetime.now(UTC)
        ticks_on(effects, 4)
        # If the database's time were rounded down, every tick would be late by 0.8 s.
        assert eventually(lambda: min(seconds_late(effects.all())) < 0.05)
        for process in (one, other):
            end(process)
    late = seconds_late(effects.check_consecutive(PERIOD, since))
    print(f"\n{len(late)} ticks; seconds late: median {statistics.median(late):.3f}, worst {max(late):.3f}")


def test_clocks_that_are_set_forward_and_back_in_mid_run_move_no_tick(
    postgresql_url: str, tmp_path: Path, host: Host
) -> None:
    effects, clock = Effects(postgresql_url), clock_ahead(tmp_path, 0)
    with host(postgresql_url, clock) as one, host(postgresql_url, clock) as other:
        for process in (one, other):
            process.wait_for("joined")
        since = datetime.now(UTC)
        ticks_on(effects, 2)
        for ahead in (MINUTES, -MINUTES, timedelta()):
            set_clock(clock, ahead)
            ticks_on(effects, 2)
        for process in (one, other):
            end(process)
            assert "begins as a new instance" not in process.output
    found = effects.check_consecutive(PERIOD, since)
    assert statistics.median(seconds_late(found)) < 0.9


def test_on_sqlite_a_clock_that_is_set_forward_and_back_repeats_no_tick(
    sqlite_url: str, tmp_path: Path, host: Host
) -> None:
    effects, clock = Effects(sqlite_url), clock_ahead(tmp_path, 0)
    with host(sqlite_url, clock) as one, host(sqlite_url, clock) as other:
        for process in (one, other):
            process.wait_for("joined")
        ticks_on(effects, 2)
        set_clock(clock, MINUTES)
        ticks_on(effects, 2)
        set_clock(clock, MINUTES - timedelta(seconds=2))
        before = effects.ticks()
        ticks_on(effects, 2)
        for process in (one, other):
            end(process)
    assert effects.ticks()[: len(before)] == before
    assert effects.ticks()[2] - effects.ticks()[1] <= MINUTES + 10 * PERIOD
    effects.check_once()
    assert {state for state, _ in effects.states("ticker")} <= {"succeeded", "missed", "skipped", "handed back"}


def test_a_run_during_which_clocks_are_set_is_neither_taken_over_nor_refused(
    database_url: str, tmp_path: Path, host: Host
) -> None:
    """Check both engines: on SQLite these clocks measure a lease, on PostgreSQL they only wake the hosts up."""
    effects, clock, release = Effects(database_url), clock_ahead(tmp_path, 0), tmp_path / "release"
    more = {"PROBE_WORKERS": "deaf", "PROBE_UNTIL": release, "WORKERS_LEASE_SECONDS": 10}
    with host(database_url, clock, **more) as one, host(database_url, clock, **more) as other:
        for process in (one, other):
            process.wait_for("joined")
        wait_until(lambda: effects.states("deaf") == [("running", 1)], "the run")
        for ahead in (MINUTES, timedelta(), -MINUTES, MINUTES):
            set_clock(clock, ahead)
            for _ in range(4):
                heard = effects.heartbeats()
                wait_until(lambda: not heard.items() & effects.heartbeats().items(), "a heartbeat of both")  # noqa: B023
        release.touch()
        wait_until(lambda: effects.ticks("deaf"), "the end of the run")
        for process in (one, other):
            end(process)
            assert "begins as a new instance" not in process.output
    assert effects.states("deaf") == [("succeeded", 1)]
    assert len(effects.all("deaf")) == 1


def test_a_host_that_slept_past_its_lease_commits_nothing_and_begins_as_a_new_instance(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    working, refused = threading.Event(), threading.Event()

    class Asleep(Hourly):
        period = timedelta(days=366)  # no other tick falls due

        def do_work(self, context: WorkerContext) -> None:
            effect(context, context.attempt)
            if context.attempt > 1:
                return
            working.set()
            assert slept.wait(PATIENCE)
            try:
                context.commit()
            except ClaimLost:
                refused.set()
                raise

    manager, slept, read = fleet.manager(Asleep), threading.Event(), time.clock_gettime
    manager.start()
    assert working.wait(PATIENCE)
    instance = manager.presence.instance
    # A suspended host wakes up like this. Its other clocks stood still, so no thread was notified.
    monkeypatch.setattr(time, "clock_gettime", lambda clock: read(clock) + 3600 * (clock == time.CLOCK_BOOTTIME))
    slept.set()
    assert refused.wait(PATIENCE)
    wait_until(lambda: fleet.effects() == ["2"], "the second attempt")
    assert fleet.states() == ["lost", "succeeded"]
    assert manager.presence.instance is not instance
