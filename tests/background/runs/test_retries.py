"""A failed run is tried again after its backoff, until the next tick is due."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from support.databases import on_sqlite
from support.fleet import HOUR, Fleet, Hourly, effect, wait_until

from background import BackgroundWorkerManager, InvalidWorker, WorkerContext
from background.history.status import statuses
from background.ledger.claim import Claim
from background.testing import Clock
from background.worker import pause_after

IN_2030 = datetime(2030, 5, 1, 12, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
OTHER = ("another one", "elsewhere:1")


class Flaky(Hourly):
    """Fails at its first `failures` runs. Commits a cursor before."""

    on_failed = "retry"
    backoff = timedelta(minutes=8)
    failures = 1

    def do_work(self, context: WorkerContext) -> None:
        effect(context, context.cursor)
        context.cursor = (context.cursor or 0) + 1
        context.commit()
        if context.cursor <= self.failures:
            raise ZeroDivisionError("by design")


def flaky(**attributes: Any) -> type[Flaky]:
    return type("Flaky", (Flaky,), {"name": "flaky", **attributes})


def owed(manager: BackgroundWorkerManager) -> datetime | None:
    state = manager.stores.ledger.look("flaky")
    assert state is not None
    return state.owed


def run_owed(manager: BackgroundWorkerManager) -> str | None:
    """Run the tick that is owed, as the heartbeat of an instance does."""
    execution = (tick := owed(manager)) and manager.ticks.run_pending(manager.workers["flaky"], tick)
    return execution and execution.state


def fail(fleet: Fleet, at: datetime = IN_2030, **attributes: Any) -> BackgroundWorkerManager:
    manager = fleet.manager(flaky(**attributes))
    assert manager.tick("flaky", at).state == "failed"
    return manager


def test_the_next_attempt_comes_after_the_backoff_and_has_the_cursor(fleet: Fleet) -> None:
    with Clock(IN_2030) as clock:
        manager = fail(fleet)
        clock.move(5 * MINUTE)
        assert owed(manager) is None
        assert manager.ticks.run_pending(manager.workers["flaky"], IN_2030) is None
        clock.move(6 * MINUTE)
        assert run_owed(manager) == "succeeded"
    assert fleet.effects() == ["None", "1"]
    assert [(row.state, row.attempt, row.tick) for row in fleet.executions()] == [
        ("failed", 1, IN_2030),
        ("succeeded", 2, IN_2030),
    ]
    row = fleet.row("flaky")
    assert (row.pending_tick, row.pending_after, row.pending_until) == (None, None, None)


def test_the_backoff_doubles_up_to_an_hour_and_is_spread_by_a_quarter() -> None:
    for attempt, minutes in ((1, 8), (2, 16), (3, 32), (4, 60), (2_000, 60)):
        pauses = {pause_after(Flaky, attempt) for _ in range(50)}
        assert len(pauses) > 1
        assert all(0.75 * minutes * MINUTE <= pause <= 1.25 * minutes * MINUTE for pause in pauses)


def test_a_running_instance_tries_it_again_by_itself(fleet: Fleet) -> None:
    manager = fleet.manager(flaky(backoff=timedelta(seconds=0.2), failures=2))
    manager.start()
    wait_until(lambda: fleet.states() == ["failed", "failed", "succeeded"], "the third attempt")
    assert fleet.effects() == ["None", "1", "2"]


def test_no_attempt_follows_the_last(fleet: Fleet) -> None:
    with Clock(IN_2030) as clock:
        manager = fail(fleet, failures=9, max_attempts=2)
        clock.move(20 * MINUTE)
        assert run_owed(manager) == "failed"
        assert (fleet.row("flaky").pending_tick, fleet.states()) == (None, ["failed", "failed"])
        assert manager.why("flaky", IN_2030).sentence.endswith("by design; it is given up after attempt 2 of 2.")


def test_by_default_a_failed_run_waits_for_the_next_tick(fleet: Fleet) -> None:
    with Clock(IN_2030):
        manager = fail(fleet, on_failed="skip", backoff=Hourly.backoff)
        assert fleet.row("flaky").pending_tick is None
        assert manager.why("flaky", IN_2030).sentence.endswith("ZeroDivisionError: by design.")


def test_an_attempt_that_would_come_after_the_next_tick_is_not_planned(fleet: Fleet) -> None:
    with Clock(IN_2030 + 55 * MINUTE):
        manager = fail(fleet, IN_2030)
        assert fleet.row("flaky").pending_tick is None
        said = manager.why("flaky", IN_2030).sentence
        assert said.endswith("by design; attempt 2 did not follow, as the next tick came first.")


def test_at_the_next_tick_the_attempt_is_dropped_and_the_tick_runs(fleet: Fleet) -> None:
    with Clock(IN_2030) as clock:
        manager = fail(fleet)
        clock.move(HOUR)  # no instance was alive when the attempt was due
        assert owed(manager) is None
        assert manager.ticks.run_pending(manager.workers["flaky"], IN_2030) is None
        assert isinstance(manager.stores.ledger.claim("flaky", IN_2030 + HOUR, "every 3600s", OTHER), Claim)
        assert [(row.tick, row.attempt) for row in fleet.executions()] == [(IN_2030, 1), (IN_2030 + HOUR, 1)]


def test_a_waiting_attempt_does_not_delay_the_next_tick_of_another_schedule(fleet: Fleet) -> None:
    with Clock(IN_2030) as clock:
        manager = fail(fleet)
        manager.reschedule("flaky", period=5 * MINUTE)
        assert fleet.row("flaky").pending_until == IN_2030 + 5 * MINUTE
        clock.move(5 * MINUTE)
        assert manager.tick("flaky", clock.now).claim.tick == clock.now
        assert [row.tick for row in fleet.executions()] == [IN_2030, IN_2030 + 5 * MINUTE]


def test_an_attempt_is_not_owed_while_the_worker_is_paused(fleet: Fleet) -> None:
    with Clock(IN_2030) as clock:
        manager = fail(fleet)
        manager.pause("flaky")
        clock.move(20 * MINUTE)
        assert owed(manager) is None
        assert manager.ticks.run_pending(manager.workers["flaky"], IN_2030) is None
        assert not manager.request("flaky")
        manager.resume("flaky")
        assert run_owed(manager) == "succeeded"


def test_a_pause_over_the_next_tick_drops_the_attempt(fleet: Fleet) -> None:
    with Clock(IN_2030) as clock:
        manager = fail(fleet)
        manager.pause("flaky")
        clock.move(HOUR)
        assert manager.tick("flaky", clock.now) is None
        manager.resume("flaky")
        assert owed(manager) is None
        clock.move(HOUR)
        assert manager.tick("flaky", clock.now).claim.tick == clock.now


@pytest.mark.parametrize("asks", ["request", "trigger"])
def test_a_manual_run_is_the_waiting_attempt(fleet: Fleet, asks: str) -> None:
    with Clock(IN_2030) as clock:
        manager = fail(fleet)
        clock.move(MINUTE)
        if asks == "trigger":
            assert manager.trigger("flaky").claim.attempt == 2
        else:
            assert manager.request("flaky")
            assert run_owed(manager) == "succeeded"
    assert [(row.trigger, row.state, row.attempt) for row in fleet.executions()] == [
        ("schedule", "failed", 1),
        ("schedule", "succeeded", 2),
    ]
    assert fleet.effects() == ["None", "1"]


@pytest.mark.parametrize("asks", ["request", "trigger"])
def test_a_manual_run_after_the_next_tick_was_due_is_a_new_run(fleet: Fleet, asks: str) -> None:
    with Clock(IN_2030) as clock:
        manager = fail(fleet)
        clock.move(HOUR)
        if asks == "trigger":
            manager.trigger("flaky")
        else:
            assert manager.request("flaky")
            assert run_owed(manager)
    assert [(row.trigger, row.attempt) for row in fleet.executions()] == [("schedule", 1), ("manual", 1)]
    assert fleet.effects() == ["None", "None"]


def test_a_failed_manual_run_is_not_tried_again(fleet: Fleet) -> None:
    with Clock(IN_2030 + MINUTE):
        manager = fleet.manager(flaky())
        assert manager.trigger("flaky").state == "failed"
        assert fleet.row("flaky").pending_tick is None


@on_sqlite
def test_the_user_reads_that_a_manual_run_is_not_tried_again(fleet: Fleet) -> None:
    app = fleet.manager(flaky(failures=2)).app
    sentence = "If this manual run fails, it is not tried again."

    def asks(*command: str) -> str:
        return app.test_cli_runner().invoke(args=["workers", *command]).output

    with Clock(IN_2030):
        assert "ZeroDivisionError: by design; a manual run is not tried again." in asks("trigger", "flaky")
        assert sentence in asks("trigger", "flaky", "--fleet")
    fleet.set("flaky", pending_tick=None, pending_attempt=None, pending_trigger=None)
    with Clock(IN_2030 + HOUR):
        assert sentence in app.test_client().post("/workers/worker/flaky/run", follow_redirects=True).text
    fleet.set("flaky", pending_tick=None, pending_attempt=None, pending_trigger=None)
    with Clock(IN_2030 + 2 * HOUR) as clock:
        assert app.extensions["background_workers"].tick("flaky", clock.now).state == "failed"
        clock.move(MINUTE)
        assert sentence not in asks("trigger", "flaky", "--fleet")  # it is the next attempt at the tick


def test_an_attempt_that_was_lost_comes_before_the_next_tick(fleet: Fleet) -> None:
    """A lost tick never waits, and no next tick drops it, also if an earlier attempt failed."""
    with Clock(IN_2030) as clock:
        manager = fail(fleet)
        clock.move(20 * MINUTE)
        ledger = manager.stores.ledger
        claim = ledger.claim_pending("flaky", IN_2030, OTHER)
        assert isinstance(claim, Claim)
        ledger.end(claim, "lost", "its instance is gone", 3)
        clock.move(HOUR)
        assert owed(manager) == IN_2030
        manager.tick("flaky", IN_2030 + HOUR)
        assert [(row.tick, row.attempt) for row in fleet.executions()] == [
            *((IN_2030, attempt) for attempt in (1, 2, 3)),
            (IN_2030 + HOUR, 1),
        ]


def test_a_lost_tick_is_owed_beside_the_moments_that_an_older_release_left(fleet: Fleet) -> None:
    """The older release claims the attempt early, and leaves `pending_after` and `pending_until` as they are."""
    with Clock(IN_2030) as clock:
        manager = fail(fleet)
        later = IN_2030 + 2 * HOUR
        clock.set(later)
        fleet.set("flaky", mark=later, pending_tick=later, pending_attempt=2)
        assert owed(manager) == later
        clock.move(HOUR)
        assert not manager.stores.ledger.claim("flaky", clock.now, "every 3600s", OTHER)
        assert owed(manager) == later
        assert run_owed(manager)


@pytest.mark.parametrize("later", [MINUTE, HOUR], ids=["before the next tick", "at the next tick"])
def test_a_run_requested_by_an_older_release_waits_for_no_backoff(fleet: Fleet, later: timedelta) -> None:
    """The older release claims the attempt early, and leaves `pending_after` and `pending_until` as they are."""
    with Clock(IN_2030) as clock:
        manager = fail(fleet)
        clock.move(MINUTE)
        asked = clock.now
        fleet.set("flaky", pending_tick=asked, pending_attempt=1, pending_trigger="manual")
        clock.set(asked + later)
        assert not manager.stores.ledger.hasten("flaky")
        (status,) = statuses_of(manager)
        assert status.waits_since == asked
        assert not isinstance(manager.stores.ledger.claim("flaky", IN_2030 + HOUR, "every 3600s", OTHER), Claim)
        assert owed(manager) == asked
        assert run_owed(manager)
    assert [(row.tick, row.trigger) for row in fleet.executions()] == [(IN_2030, "schedule"), (asked, "manual")]


def test_the_history_the_list_and_the_pages_tell_of_the_attempt(fleet: Fleet) -> None:
    with Clock(IN_2030) as clock:
        manager = fail(fleet)
        after = fleet.row("flaky").pending_after
        said = manager.why("flaky", IN_2030).sentence
        assert f"by design; attempt 2 follows at {after:%Y-%m-%dT%H:%M:%S}Z by the next instance" in said
        listed = manager.app.test_cli_runner().invoke(args=["workers", "list"]).output
        assert f"failed, next attempt at {after:%Y-%m-%dT%H:%M:%S}Z" in listed
        client = manager.app.test_client()
        page = client.get("/workers/").get_data(as_text=True)
        assert "next attempt: " in page
        assert "overdue since" not in page
        page = client.get("/workers/worker/flaky").get_data(as_text=True)
        assert " failed, next attempt: " in page
        assert "<dt>If a run fails</dt>\n    <dd>retried after " in page
        clock.move(HOUR)
        assert "next attempt: " not in client.get("/workers/").get_data(as_text=True)


def test_a_waiting_attempt_is_late_from_its_moment_on(fleet: Fleet) -> None:
    with Clock(IN_2030) as clock:
        manager = fail(fleet)
        (status,) = statuses_of(manager)
        assert (status.waits_since, status.is_late) == (None, False)
        clock.move(20 * MINUTE)
        (status,) = statuses_of(manager)
        assert status.waits_since == fleet.row("flaky").pending_after


def statuses_of(manager: BackgroundWorkerManager) -> list[Any]:
    return statuses(manager.stores, manager.workers)


def test_an_attempt_that_a_clock_ahead_put_off_is_due_once_the_clock_is_right(fleet: Fleet) -> None:
    class Yearly(Flaky):
        name = "flaky"
        period = timedelta(days=366)

    with Clock(IN_2030):
        manager = fleet.manager(Yearly)
        assert manager.tick("flaky", IN_2030).state == "failed"
        put_off = IN_2030 + timedelta(days=2)
        fleet.set("flaky", pending_after=put_off)
        assert manager.repair() == (["flaky"], 0)
        assert fleet.row("flaky").pending_after == IN_2030
        assert run_owed(manager) == "succeeded"


WRONG = [
    ({"on_failed": "again"}, "has on_failed = 'again'; expected 'retry' or 'skip'"),
    ({"on_failed": "retry", "backoff": 5}, "has backoff = 5; expected a timedelta from 0 to 1 hour"),
    ({"on_failed": "retry", "backoff": 2 * HOUR}, "expected a timedelta from 0 to 1 hour"),
    ({"on_failed": "skip", "backoff": HOUR}, "expected on_failed = 'retry' beside it"),
]


@pytest.mark.parametrize(("attributes", "said"), WRONG)
def test_a_wrong_attribute_is_refused_with_a_sentence(fleet: Fleet, attributes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidWorker, match=said):
        fleet.manager(type("Wrong", (Hourly,), {"name": "wrong", **attributes}))
