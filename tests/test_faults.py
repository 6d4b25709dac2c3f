"""Processes that die, freeze and wake again, at the worst moments: each tick is run once all the same.

A victim freezes itself at a point of its run (see probe.py); then it is killed, or thawed, while others are up.
"""

import time
from datetime import timedelta
from typing import Any

import pytest
from effects import Effects
from nursery import Member, Shops
from processes import eventually
from sqlalchemy import create_engine, delete
from sqlalchemy.pool import NullPool

from background import models as tables

DAY = timedelta(days=1).total_seconds()
MARGIN = 2.0  # seconds that a busy machine may take longer than the targets


def freeze_one(shops: Shops, at: str, **more: Any) -> Member:
    """A process that is frozen `at` a point of the day's only tick, with a lease of a second."""
    settings = {"PROBE_PERIOD": DAY, "WORKERS_LEASE_SECONDS": 1}
    victim = shops.start(PROBE_FREEZES_AT=at, **settings | more)
    victim.wait_until_frozen()
    return victim


def others(shops: Shops, count: int = 2, **more: Any) -> list[Member]:
    return shops.join(count, **{"PROBE_PERIOD": DAY} | more)


# -- killed ----------------------------------------------------------------------------------------


def test_a_process_that_is_killed_before_its_claim_is_committed_leaves_no_trace_of_it(
    shops: Shops, effects: Effects
) -> None:
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
    assert effect.at.timestamp() - killed <= 2 + 1 + MARGIN
    assert effect.attempt == 2
    assert effect.pid != victim.pid
    assert effects.states("ticker") == [("lost", 1), ("succeeded", 2)]


def test_what_a_process_committed_before_it_was_killed_is_not_run_again(shops: Shops, effects: Effects) -> None:
    victim = freeze_one(shops, "committed", PROBE_PERIOD=0.5)
    others(shops, PROBE_PERIOD=0.5)
    victim.kill()
    assert eventually(lambda: len(effects.ticks()) >= 5)  # which is more than the victim's lease
    first, *_ = effects.check_once()
    assert (first.pid, first.attempt) == (victim.pid, 1)
    assert {state for state, _ in effects.states("ticker")} <= {"succeeded", "missed", "running"}


def test_a_worker_that_kills_its_process_is_given_up_and_the_last_process_lives_on(
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


# -- frozen, and woken up again --------------------------------------------------------------------


def lost_the_tick(zombie: Member) -> None:
    """It says so itself, and goes on as another instance."""
    zombie.wait_for("Lost the tick")
    zombie.wait_for("begins anew")
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


def is_expired(effects: Effects, frozen: Member) -> None:
    """Wait until its lease is over, and until the living have seen that."""
    assert eventually(lambda: frozen.pid not in effects.instances(alive=True))
    time.sleep(0.5)  # two heartbeats of theirs


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("at", ["claim", "commit"])
def test_a_process_that_is_frozen_with_a_row_locked_loses_the_lock_with_its_lease(
    shops: Shops, effects: Effects, at: str
) -> None:
    zombie = freeze_one(shops, at)
    others(shops)
    assert eventually(effects.ticks)
    zombie.thaw()
    zombie.wait_for("begins anew")
    (effect,) = effects.check_once()
    assert effect.pid != zombie.pid
    assert effects.states("ticker") == ([("lost", 1), ("succeeded", 2)] if at == "commit" else [("succeeded", 1)])
    assert ("Lost the tick" in zombie.output) == (at == "commit")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("at", "states"),
    [
        ("claim", [("lost", 1), ("succeeded", 2)]),  # the claim went through, but its run began after the lease
        ("effect", [("lost", 1), ("succeeded", 2)]),
        ("commit", [("succeeded", 1)]),  # checked before the freeze: nobody else can have begun meanwhile
    ],
)
def test_a_process_that_wakes_with_the_write_lock_of_sqlite_after_its_lease_is_decided_on_once(
    shops: Shops, effects: Effects, at: str, states: list[tuple[str, int]]
) -> None:
    """While it is frozen nobody can write, so nobody can take over."""
    zombie = freeze_one(shops, at)
    others(shops)
    is_expired(effects, zombie)
    assert effects.states("ticker") == ([] if at == "claim" else [("running", 1)])
    zombie.thaw()
    zombie.wait_for("begins anew")
    assert eventually(effects.ticks)
    effects.check_once()
    assert effects.states("ticker") == states
    assert ("Lost the tick" in zombie.output) == (states[0][0] == "lost")


TWO_WORKERS = {"PROBE_WORKERS": "ticker,quick", "PROBE_PERIOD": 0.5}


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_process_that_is_frozen_in_its_commit_holds_up_no_other_worker(shops: Shops, effects: Effects) -> None:
    """Its worker's row is locked until its lease is over; all that others want of that row waits."""
    others(shops, WORKERS_THREADS=5, WORKERS_LEASE_SECONDS=6, **TWO_WORKERS)
    freeze_one(shops, "commit", PROBE_PERIOD=0.5, WORKERS_LEASE_SECONDS=6)
    ran = len(effects.all("quick"))
    assert eventually(lambda: len(effects.all("quick")) >= ran + 7)
    effects.check_consecutive(timedelta(seconds=1), effects.ticks("quick")[ran - 1], "quick")
    assert eventually(lambda: "lost" in dict(effects.states("ticker")))
    effects.check_once()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_while_a_process_is_frozen_in_its_commit_sqlite_runs_nothing_and_nobody_dies(
    shops: Shops, effects: Effects
) -> None:
    """One writer: everybody waits for it. They stay alive meanwhile, and go on when it wakes or is killed."""
    living = others(shops, **TWO_WORKERS)
    zombie = freeze_one(shops, "commit", PROBE_PERIOD=0.5)
    ran = effects.ticks(), effects.ticks("quick")
    is_expired(effects, zombie)
    assert (effects.ticks(), effects.ticks("quick")) == ran
    assert effects.instances(alive=True) == {each.pid for each in living}
    zombie.kill()
    assert eventually(lambda: len(effects.ticks()) >= len(ran[0]) + 2)
    assert eventually(lambda: len(effects.ticks("quick")) >= len(ran[1]) + 2)
    effects.check_once("quick")
    assert [effect.attempt for effect in effects.check_once()[len(ran[0]) :]][:2] == [2, 1]
    assert "Traceback" not in "".join(each.output for each in living)


def test_a_frozen_process_cannot_claim_the_old_tick_in_its_hand_though_the_history_was_pruned(
    shops: Shops, effects: Effects
) -> None:
    zombie = freeze_one(shops, "claiming", LOG_LEVEL="DEBUG")
    others(shops)
    assert eventually(effects.ticks)
    engine = create_engine(effects.url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(delete(tables.executions))
    zombie.thaw()
    zombie.wait_for("not running the tick .* somebody was here before")
    (effect,) = effects.check_once()
    assert effect.pid != zombie.pid
    assert effects.states("ticker") == []
