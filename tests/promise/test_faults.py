"""Processes that die, freeze and wake up at the worst moments: each tick still runs once.

A process freezes itself at a point of its run (see traced_app.py). The test then kills or thaws it, while other
processes run.
"""

import socket
import time
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import create_engine, delete
from sqlalchemy.pool import NullPool
from support.databases import on_postgresql, on_sqlite
from support.fork_server import Member, Shops
from support.processes import eventually, margin
from support.run_traces import Effects

from background.database import tables

RARELY = timedelta(days=366).total_seconds()


def freeze_one(shops: Shops, at: str, **more: Any) -> Member:
    """Start a process that freezes `at` a point of the only tick, with a lease of a second."""
    settings = {"PROBE_PERIOD": RARELY, "WORKERS_LEASE_SECONDS": 1}
    victim = shops.start(PROBE_FREEZES_AT=at, **settings | more)
    victim.wait_until_frozen()
    return victim


def others(shops: Shops, count: int = 2, **more: Any) -> list[Member]:
    return shops.join(count, **{"PROBE_PERIOD": RARELY} | more)


def test_a_forking_process_keeps_its_locks_and_its_connections_whatever_its_child_does(
    shops: Shops, effects: Effects
) -> None:
    (parent,) = shops.join(PROBE_WORKERS="forker,ticker", WORKERS_HEARTBEAT_SECONDS=1)
    parent.wait_for(r"The child holds its own and its parent's: \[True, False\]")
    parent.wait_for("The parent holds its lock: True")
    ticks = len(effects.ticks())
    assert eventually(lambda: len(effects.ticks()) >= ticks + 3)
    effects.check_once()
    assert effects.states("forker") == [("succeeded", 1)]
    assert "WARNING" not in parent.output


# -- killed ----------------------------------------------------------------------------------------


def test_a_process_killed_before_its_claim_commits_leaves_no_trace_of_the_claim(shops: Shops, effects: Effects) -> None:
    victim = freeze_one(shops, "claim")
    others(shops)
    victim.kill()
    assert eventually(effects.ticks)
    assert effects.states("ticker") == [("succeeded", 1)]
    assert victim.pid not in {effect.pid for effect in effects.check_once()}


@pytest.mark.parametrize("at", ["claimed", "effect", "commit"])
def test_a_run_whose_process_is_killed_is_taken_over_within_the_lease_and_a_second(
    shops: Shops, effects: Effects, at: str
) -> None:
    victim = freeze_one(shops, at, WORKERS_LEASE_SECONDS=2)
    others(shops)
    killed = victim.kill()
    assert eventually(effects.ticks)
    (effect,) = effects.check_once()
    assert effect.at.timestamp() - killed <= 2 + 1 + margin()
    assert effect.attempt == 2
    assert effect.pid != victim.pid
    assert effects.states("ticker") == [("lost", 1), ("succeeded", 2)]


def test_work_committed_before_its_process_was_killed_does_not_run_again(shops: Shops, effects: Effects) -> None:
    victim = freeze_one(shops, "committed", PROBE_PERIOD=0.5)
    others(shops, PROBE_PERIOD=0.5)
    victim.kill()
    assert eventually(lambda: len(effects.ticks()) >= 5)  # longer than the victim's lease
    first, *_ = effects.check_once()
    assert (first.pid, first.attempt) == (victim.pid, 1)
    history = effects.history("ticker")
    assert [row["state"] for row in history if row["tick"] == first.tick] == ["succeeded"]
    # On a busy machine the victim may have claimed the next tick, and lost it. The other processes lose no tick.
    others_states = {row["state"] for row in history if not str(row["instance_name"]).endswith(f":{victim.pid}")}
    assert others_states <= {"succeeded", "missed", "skipped", "running"}


def test_a_worker_that_kills_its_process_is_given_up_and_the_last_process_survives(
    shops: Shops, effects: Effects
) -> None:
    fleet = [shops.start(PROBE_WORKERS="killer,ticker", PROBE_PERIOD=0.5, WORKERS_LEASE_SECONDS=1) for _ in range(4)]
    assert eventually(lambda: effects.states("killer") == [("lost", 1), ("lost", 2), ("lost", 3)])
    (survivor,) = [member for member in fleet if member.is_up]
    ran = len(effects.all())
    assert eventually(lambda: len(effects.all()) >= ran + 2)
    assert effects.check_once()[-1].pid == survivor.pid
    assert effects.all("killer") == []
    assert survivor.is_up


ALL_SLICES = [f"slice {number}" for number in range(40)]


def test_each_slice_is_done_once_though_its_process_is_killed_again_and_again(shops: Shops, effects: Effects) -> None:
    settings = {"PROBE_WORKERS": "slicer", "PROBE_TAKES": 0.05, "WORKERS_LEASE_SECONDS": 1}
    fleet = shops.join(2, **settings)
    for kill in range(4):
        assert eventually(lambda least=8 * (kill + 1): len(effects.notes("slicer")) >= least)
        holder = str(effects.history("slicer")[-1]["instance_name"])
        next(member for member in fleet if holder.endswith(f":{member.pid}")).kill()
        fleet += shops.join(1, **settings)
    assert eventually(lambda: len(effects.notes("slicer")) >= 40)
    assert effects.notes("slicer") == ALL_SLICES
    assert eventually(lambda: effects.states("slicer")[-1] == ("succeeded", 5))
    assert effects.states("slicer")[:-1] == [("lost", attempt) for attempt in (1, 2, 3, 4)]


def test_a_process_that_wakes_after_its_lease_stores_no_cursor(shops: Shops, effects: Effects) -> None:
    zombie = freeze_one(shops, "slice", PROBE_WORKERS="slicer")
    others(shops, PROBE_WORKERS="slicer")
    assert eventually(lambda: len(effects.notes("slicer")) >= 40)
    zombie.thaw()
    lost_the_tick(zombie)
    assert effects.notes("slicer") == ALL_SLICES
    assert [row["cursor"] for row in effects.history("slicer")] == ["5", "40"]


# -- frozen, and woken up again --------------------------------------------------------------------


def lost_the_tick(zombie: Member) -> None:
    """Wait until the process logs that it lost the tick, and goes on as another instance."""
    zombie.wait_for("Lost the tick")
    zombie.wait_for("begins as a new instance")
    assert "Traceback" not in zombie.output


@pytest.mark.parametrize(
    ("database_url", "at"),
    [("sqlite", "claimed"), ("postgresql", "claimed"), ("postgresql", "effect")],
    indirect=["database_url"],
)
def test_a_process_that_wakes_after_its_lease_cannot_commit_the_run_that_was_taken_over(
    shops: Shops, effects: Effects, at: str
) -> None:
    zombie = freeze_one(shops, at)
    others(shops)
    assert eventually(effects.ticks)
    zombie.thaw()
    lost_the_tick(zombie)
    (effect,) = effects.check_once()
    assert effect.pid != zombie.pid
    assert effects.states("ticker") == [("lost", 1), ("succeeded", 2)]


def wait_until_expired(effects: Effects, frozen: Member) -> None:
    """Wait until the lease of the process is over, and the living processes have seen this."""
    assert eventually(lambda: frozen.pid not in effects.instances(alive=True))
    time.sleep(0.5)  # two of their heartbeats


@on_postgresql
def test_a_process_that_is_frozen_with_a_row_locked_loses_the_lock_with_its_lease(
    shops: Shops, effects: Effects
) -> None:
    zombie = freeze_one(shops, "commit")
    others(shops)
    assert eventually(effects.ticks)
    zombie.thaw()
    zombie.wait_for("Lost the tick")
    zombie.wait_for("begins as a new instance")
    (effect,) = effects.check_once()
    assert effect.pid != zombie.pid
    assert effects.states("ticker") == [("lost", 1), ("succeeded", 2)]


@on_postgresql
def test_a_process_that_is_frozen_between_the_check_and_the_commit_of_a_slice_loses_the_lock_with_its_lease(
    shops: Shops, effects: Effects
) -> None:
    more = {"PROBE_WORKERS": "listener", "PROBE_SECONDS": 0}
    zombie = freeze_one(shops, "commit", **more)
    others(shops, **more)
    assert eventually(lambda: effects.ticks("listener"))
    zombie.thaw()
    zombie.wait_for("Lost the tick")
    zombie.wait_for("begins as a new instance")
    assert [effect.attempt for effect in effects.all("listener", "began")] == [2]
    assert len(effects.check_once("listener")) == 1
    assert effects.states("listener") == [("lost", 1), ("succeeded", 2)]


@on_sqlite
@pytest.mark.parametrize(
    ("at", "states"),
    [
        ("claim", [("lost", 1), ("succeeded", 2)]),  # the claim succeeded, but the run began after the lease
        ("effect", [("lost", 1), ("succeeded", 2)]),
        ("commit", [("succeeded", 1)]),  # checked before the freeze: no other process can have begun meanwhile
    ],
)
def test_a_tick_is_decided_once_when_a_process_wakes_with_the_write_lock_of_sqlite_after_its_lease(
    shops: Shops, effects: Effects, at: str, states: list[tuple[str, int]]
) -> None:
    """Check this although no process can take over before: the frozen process keeps the write lock."""
    zombie = freeze_one(shops, at)
    others(shops)
    wait_until_expired(effects, zombie)
    assert effects.states("ticker") == ([] if at == "claim" else [("running", 1)])
    zombie.thaw()
    zombie.wait_for("Ran the tick" if at == "commit" else "Lost the tick")
    zombie.wait_for("begins as a new instance")
    assert eventually(effects.ticks)
    effects.check_once()
    assert effects.states("ticker") == states


# The instance that ran a tick is also first at the next tick. With a jitter, a newcomer gets its turn.
TWO_WORKERS = {"PROBE_WORKERS": "ticker,quick", "PROBE_PERIOD": 0.5, "PROBE_JITTER": 0.2}


@on_postgresql
def test_a_process_that_is_frozen_in_its_commit_holds_up_no_other_worker(shops: Shops, effects: Effects) -> None:
    """Check that only statements on the worker's own row wait, until the lease of the frozen process is over."""
    others(shops, WORKERS_THREADS=4, WORKERS_LEASE_SECONDS=5, **TWO_WORKERS)
    freeze_one(shops, "commit", PROBE_PERIOD=0.5, WORKERS_LEASE_SECONDS=5)
    ran = len(effects.all("quick"))
    assert eventually(lambda: len(effects.all("quick")) >= ran + 6)
    effects.check_consecutive(timedelta(seconds=1), effects.ticks("quick")[ran - 1], "quick")
    assert eventually(lambda: "lost" in dict(effects.states("ticker")))
    effects.check_once()


@on_sqlite
def test_while_a_process_is_frozen_in_its_commit_sqlite_runs_nothing_and_no_process_ends(
    shops: Shops, effects: Effects
) -> None:
    """Check that the other processes stay alive while they wait for the single writer, and go on afterwards."""
    living = others(shops, **TWO_WORKERS)
    zombie = freeze_one(shops, "commit", PROBE_PERIOD=0.5)
    ran = effects.ticks(), effects.ticks("quick")
    wait_until_expired(effects, zombie)
    assert (effects.ticks(), effects.ticks("quick")) == ran
    assert effects.instances(alive=True) == {each.pid for each in living}
    zombie.kill()
    assert eventually(lambda: len(effects.ticks()) >= len(ran[0]) + 2)
    assert eventually(lambda: len(effects.ticks("quick")) >= len(ran[1]) + 2)
    effects.check_once("quick")
    assert [effect.attempt for effect in effects.check_once()[len(ran[0]) :]][:2] == [2, 1]
    assert "Traceback" not in "".join(each.output for each in living)


def test_a_frozen_process_cannot_claim_its_old_tick_even_after_the_history_was_pruned(
    shops: Shops, effects: Effects
) -> None:
    zombie = freeze_one(shops, "claiming", LOG_LEVEL="DEBUG")
    others(shops)
    assert eventually(effects.ticks)
    engine = create_engine(effects.url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(delete(tables.executions))
    zombie.thaw()
    zombie.wait_for("not running the tick .* already decided")
    (effect,) = effects.check_once()
    assert effect.pid != zombie.pid
    assert effects.states("ticker") == []


# -- starved, hung and mistaken for another --------------------------------------------------------


def test_a_process_whose_interpreter_is_held_past_the_lease_loses_its_run_and_lives_on(
    shops: Shops, effects: Effects
) -> None:
    """Hold the interpreter's lock in one call into C, so that neither the heartbeat nor any other thread runs."""
    more = {"PROBE_WORKERS": "hog,ticker", "PROBE_PERIOD": 0.5}
    hogged = shops.start(PROBE_HOLDS=2.5, WORKERS_LEASE_SECONDS=1, **more)
    hogged.wait_for("The hog began")
    [other] = shops.join(**more)
    lost_the_tick(hogged)
    assert eventually(lambda: effects.ticks("hog"))
    assert len(effects.check_once("hog")) == 1
    *lost, (state, _) = effects.states("hog")
    assert (lost[0], {state for state, _ in lost}, state) == (("lost", 1), {"lost"}, "succeeded")
    other.kill()
    assert eventually(lambda: effects.ticks() and effects.all()[-1].pid == hogged.pid)
    effects.check_once()


def test_a_process_with_the_name_of_a_dead_process_neither_has_its_claims_nor_shields_them(
    shops: Shops, effects: Effects
) -> None:
    """Set the host name, and give each process the id 1, as in containers."""
    more = {"PROBE_WORKERS": "listener", "WORKERS_LEASE_SECONDS": 2, "alone": True}
    try:
        first = shops.start(**more)
    except PermissionError as error:
        pytest.skip(str(error))
    first.wait_for("The listener began")
    killed = first.kill()
    shops.join(PROBE_SECONDS=0, **more)
    assert eventually(lambda: effects.all("listener"))
    lost, again = effects.history("listener")
    assert lost["instance_name"] == again["instance_name"] == f"{socket.gethostname()}:1"
    assert lost["instance"] != again["instance"]
    assert (again["started_at"].timestamp() - killed) > 1  # the dead one's heartbeats were 0.2 s apart
    assert effects.states("listener") == [("lost", 1), ("succeeded", 2)]
    effects.check_once("listener")


def test_a_body_longer_than_the_period_skips_the_ticks_meanwhile_and_keeps_their_order(
    shops: Shops, effects: Effects
) -> None:
    shops.join(2, PROBE_PERIOD=0.5, PROBE_TAKES=0.7)
    assert eventually(lambda: len(effects.ticks()) >= 3)
    effects.check_answered(timedelta(seconds=0.5))
    skipped = [row for row in effects.history("ticker") if row["state"] == "skipped"]
    assert skipped
    assert all(row["reason"].startswith("still running the tick 20") for row in skipped)


def test_a_body_longer_than_the_lease_keeps_its_claim(shops: Shops, effects: Effects) -> None:
    shops.join(2, PROBE_PERIOD=RARELY, PROBE_TAKES=3, WORKERS_LEASE_SECONDS=1.5)
    assert eventually(effects.ticks)
    effects.check_once()
    assert effects.states("ticker") == [("succeeded", 1)]


def test_a_hanging_body_is_timed_out_in_the_whole_fleet_and_the_next_ticks_go_on(
    shops: Shops, effects: Effects
) -> None:
    """Hang at every second tick, in total more often than there are threads."""
    shops.join(PROBE_WORKERS="hanging", WORKERS_THREADS=2)
    assert eventually(lambda: effects.states("hanging").count(("timed out", 1)) > 2)  # the first may be skipped
    assert eventually(lambda: len(effects.ticks("hanging")) >= 4)
    effects.check_answered(timedelta(seconds=0.5), "hanging")
    states = [state for state, _ in effects.states("hanging")]
    assert not {"lost", "failed"} & set(states)
