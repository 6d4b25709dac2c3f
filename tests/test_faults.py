"""Processes that die, freeze and wake again, at the worst moments: each tick is run once all the same.

A victim freezes itself at a point of its run (see probe.py); then it is killed, or thawed, while others are up.
"""

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
    victim = freeze_one(shops, "committed")
    others(shops)
    victim.kill()
    assert eventually(lambda: effects.instances(alive=True).isdisjoint({victim.pid}))
    (effect,) = effects.check_once()
    assert effect.pid == victim.pid
    assert effects.states("ticker") == [("succeeded", 1)]


def test_a_worker_that_kills_its_process_is_given_up_and_the_last_process_lives_on(
    shops: Shops, effects: Effects
) -> None:
    fleet = [
        shops.start(PROBE_WORKERS="killer,ticker", PROBE_PERIOD=0.5, WORKERS_LEASE_SECONDS=1) for _ in range(4)
    ]
    assert eventually(lambda: effects.states("killer") == [("lost", 1), ("lost", 2), ("lost", 3)])
    (survivor,) = [member for member in fleet if member.is_up]
    ran = len(effects.all())
    assert eventually(lambda: len(effects.all()) >= ran + 2)
    assert effects.check_once()[-1].pid == survivor.pid
    assert effects.all("killer") == []
    assert survivor.is_up
