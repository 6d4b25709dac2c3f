"""Fleets that grow, shrink and change their release: no tick runs twice, early or never."""

import signal
import time
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from support.fleet import Fleet, Hourly, last_hour, wait_until
from support.fork_server import Member, Shops
from support.processes import eventually, margin
from support.run_traces import EPOCH, Effect, Effects


def stop(*members: Member) -> None:
    """Send SIGTERM to all processes, as a deploy does, and wait for their ends."""
    for member in members:
        member.signal(signal.SIGTERM)
    for member in members:
        member.wait()


def more_ticks(effects: Effects, count: int, worker: str = "ticker") -> list[Effect]:
    """Wait for `count` more ticks. Return all effects of the worker, checked."""
    ran = len(effects.all(worker))
    assert eventually(lambda: len(effects.all(worker)) >= ran + count)
    return effects.check_once(worker)


# -- a fleet at its ticks --------------------------------------------------------------------------


def test_one_of_sixteen_processes_runs_a_tick(shops: Shops, effects: Effects) -> None:
    herd = shops.join(16, PROBE_PERIOD=1)
    more_ticks(effects, 4)
    assert len(effects.instances(alive=True)) == 16
    effects.check_answered(timedelta(seconds=1))
    assert {attempt for state, attempt in effects.states("ticker") if state in ("succeeded", "running")} == {1}
    assert not [member.output for member in herd if "WARNING" in member.output or "ERROR" in member.output]


def test_processes_that_start_at_any_moment_run_the_same_ticks_once_each(shops: Shops, effects: Effects) -> None:
    """Check that ticks are whole multiples of the period since the epoch, whenever a process started."""
    period = timedelta(seconds=0.7)
    for after in (0, 0.13, 0.31, 0.57):
        time.sleep(after)
        shops.start(PROBE_PERIOD=period.total_seconds())
    assert eventually(lambda: len(effects.instances(alive=True)) == 4)
    found = more_ticks(effects, 4)
    effects.check_answered(period)
    assert all((effect.tick - EPOCH) % period == timedelta() for effect in found)


def test_two_manual_runs_at_the_tick_take_no_tick_away(shops: Shops, effects: Effects) -> None:
    period, more = timedelta(seconds=2), {"PROBE_PERIOD": 2, "PROBE_TAKES": 0.8}
    shops.join(2, **more)
    assert eventually(effects.ticks)
    ran = rounds = 0
    while rounds < 2 or (ran == 0 and rounds < 20):  # a process that comes late finds the tick running, and refuses
        rounds += 1
        until_the_tick = (EPOCH - datetime.now(UTC)) % period
        time.sleep(max(until_the_tick.total_seconds() - 0.5, 0))  # the manual run is on when the tick falls due
        both = [shops.start("workers", "trigger", "ticker", **more) for _ in range(2)]
        for each in both:
            each.wait()
        ran += sum("succeeded" in each.output for each in both)
    seen = effects.all()[-1].tick
    assert eventually(lambda: effects.all()[-1].tick > seen)
    found, history = effects.all(), effects.history("ticker")
    by_hand = [effect.key for effect in found if effect.key.startswith("ticker:manual:")]
    assert ran == len(set(by_hand)) == len(by_hand) >= 1
    runs = [(row["started_at"], row["finished_at"]) for row in history if row["state"] == "succeeded"]
    assert all(one[1] <= following[0] for one, following in pairwise(runs)), history
    ticks = [effect.tick for effect in found if effect.key not in by_hand]
    due = [ticks[1] + number * period for number in range((ticks[-1] - ticks[1]) // period + 1)]
    overlapped = tuple(f"still running the tick {tick.isoformat()} " for tick in ticks)  # on a busy machine
    skipped = [row["tick"] for row in history if (row["reason"] or "").startswith(overlapped)]
    assert set(due) - set(ticks) <= set(skipped), history


# -- hand-over -------------------------------------------------------------------------------------


def test_the_run_of_a_stopping_process_goes_on_in_another_process_within_a_second(
    shops: Shops, effects: Effects
) -> None:
    """Check this with the default heartbeats, which are further apart than a second."""
    more = {"PROBE_WORKERS": "listener", "WORKERS_HEARTBEAT_SECONDS": 2, "WORKERS_LEASE_SECONDS": 10}
    [first] = shops.join(**more)
    first.wait_for("The listener began")
    shops.join(PROBE_SECONDS=0, **more)
    told = time.time()
    first.signal(signal.SIGTERM)
    assert eventually(lambda: effects.all("listener"))
    _, again = effects.all("listener", "began")
    assert again.at.timestamp() - told <= 1 + margin()
    assert effects.states("listener") == [("handed back", 1), ("succeeded", 1)]
    effects.check_once("listener")


# -- a deploy --------------------------------------------------------------------------------------


def test_a_tick_that_fell_into_the_gap_of_a_deploy_is_run_once_on_return(shops: Shops, effects: Effects) -> None:
    period = timedelta(seconds=1)
    before = release(shops, period)
    middle = (timedelta(seconds=0.2), timedelta(seconds=0.5))  # of a period, so that no process gets SIGTERM at a tick
    assert eventually(lambda: effects.ticks() and middle[0] < (datetime.now(UTC) - EPOCH) % period < middle[1])
    stop(*before)
    last = effects.check_once()[-1].tick
    assert effects.instances(alive=True) == set()
    assert eventually(lambda: datetime.now(UTC) - last > 3 * period)
    release(shops, period)
    caught_up, *_ = [effect.tick for effect in more_ticks(effects, 2) if effect.tick > last]
    missed, run, *_ = effects.history("ticker", last + period)
    assert (missed["state"], missed["tick"], missed["through"]) == ("missed", last + period, caught_up - period)
    assert (run["state"], run["tick"], run["attempt"]) == ("succeeded", caught_up, 1)


OLD, NEW = timedelta(seconds=1.2), timedelta(seconds=0.9)


def release(shops: Shops, period: timedelta, count: int = 2, **more: Any) -> list[Member]:
    """Start processes that declare this period."""
    return shops.join(count, PROBE_PERIOD=period.total_seconds(), **more)


def schedule(effects: Effects, of: timedelta) -> datetime:
    """Wait until the fleet follows this schedule. Return the moment since which it is in force."""
    text = f"every {of.total_seconds()}s"
    assert eventually(lambda: effects.schedule("ticker")[0] == text), effects.schedule("ticker")
    return effects.schedule("ticker")[1]


def check_schedule(effects: Effects, period: timedelta, since: datetime, until: datetime) -> None:
    """Check that every tick of `period` after `since` and before `until` ran once."""
    ran = [effect.tick for effect in effects.check_once() if since < effect.tick < until]
    first = since + period - (since - EPOCH) % period
    due = [first + number * period for number in range((until - first) // period + 1)]
    assert [tick for tick in due if tick < until and tick not in ran] == []
    assert len(ran) - len(due) <= 1, ran  # ticks that were due when a process with the next schedule joined


def test_in_a_rolling_deploy_the_schedule_changes_once_and_no_tick_of_either_release_is_lost(
    shops: Shops, effects: Effects
) -> None:
    """Check that both releases, while both are alive, run the ticks of the newer release's schedule."""
    old = release(shops, OLD)
    began = more_ticks(effects, 3)[1].tick  # the first run catches up, and may be on when the next tick falls due
    release(shops, NEW)
    changed = schedule(effects, NEW)
    more_ticks(effects, 3)
    stop(*old)
    ended = more_ticks(effects, 3)[-1].tick
    assert schedule(effects, NEW) == changed
    check_schedule(effects, OLD, began, until=changed)
    check_schedule(effects, NEW, changed, until=ended)


@pytest.mark.parametrize(
    ("database_url", "end"), [("sqlite", signal.SIGTERM), ("postgresql", signal.SIGKILL)], indirect=["database_url"]
)
def test_a_late_process_of_the_old_release_has_its_schedule_in_force_only_while_it_lives(
    shops: Shops, effects: Effects, end: signal.Signals
) -> None:
    release(shops, NEW)
    began = more_ticks(effects, 2)[1].tick
    [recycled] = release(shops, OLD, count=1, WORKERS_LEASE_SECONDS=1)
    back = schedule(effects, OLD)
    more_ticks(effects, 2)
    recycled.signal(end)
    recycled.wait()
    forth = schedule(effects, NEW)
    ended = more_ticks(effects, 3)[-1].tick
    assert schedule(effects, NEW) == forth
    check_schedule(effects, NEW, began, until=back)
    check_schedule(effects, OLD, back, until=forth)
    check_schedule(effects, NEW, forth, until=ended)


def test_a_changed_schedule_does_not_run_a_tick_from_before_it_was_in_force(fleet: Fleet) -> None:
    """Check that a deploy at 10:00 that moves a daily tick from 03:00 to 04:00 does not run it twice that day."""
    old = type("Changing", (Hourly,), {"period": timedelta(days=366)})
    new = type("Changing", (Hourly,), {"period": timedelta(days=1)})
    assert fleet.manager(old).tick("changing", datetime.now(UTC)).state == "succeeded"
    manager = fleet.manager(new)
    manager.start()
    wait_until(lambda: fleet.row("changing").declared == "every 86400s", "the new declaration")
    assert manager.tick("changing", datetime.now(UTC)) is None
    assert fleet.states() == ["succeeded"]


def test_a_tick_without_a_living_instance_runs_even_if_its_schedule_changed_meanwhile(fleet: Fleet) -> None:
    old = type("Changing", (Hourly,), {"period": timedelta(hours=1)})
    new = type("Changing", (Hourly,), {"period": timedelta(hours=2)})
    assert fleet.manager(old).tick("changing", datetime.now(UTC)).state == "succeeded"
    fleet.set("changing", mark=last_hour() - timedelta(hours=5))
    fleet.manager(new).start()
    wait_until(lambda: fleet.states() == ["succeeded", "succeeded"], "the catching up")


def test_a_worker_unknown_to_the_old_release_is_left_alone_and_shown(shops: Shops, effects: Effects) -> None:
    newer = {"PROBE_WORKERS": "ticker,listener", "PROBE_PERIOD": 1, "WORKERS_LEASE_SECONDS": 1.5}
    [new] = shops.join(**newer)
    new.wait_for("The listener began")
    shops.join(1, PROBE_PERIOD=1)
    new.kill()
    assert eventually(lambda: new.pid not in effects.instances(alive=True))
    more_ticks(effects, 2)
    assert effects.states("listener") == [("running", 1)]
    listed = shops.start("workers", "list", PROBE_PERIOD=1)
    listed.wait()
    assert "which is gone" in listed.wait_for("listener .* not in this release").string
    shops.join(1, PROBE_SECONDS=0, **newer)
    assert eventually(lambda: effects.states("listener") == [("lost", 1), ("succeeded", 2)])
    effects.check_once("listener")
