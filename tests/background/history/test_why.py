"""Every tick answers "why did it not run?" with one sentence, from the rows about the tick."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import Engine, insert, update
from support.databases import close
from support.fleet import make_app, statements

from background import BackgroundWorkerManager, PeriodicWorker, UnknownWorker, WorkerContext
from background.database.tables import executions, workers
from background.history.records import InstanceRecord, Record, Surroundings
from background.history.text import moment, span
from background.history.why import Answer, why
from background.ledger.claim import Claim, WorkerState

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


class Tidy(PeriodicWorker):
    period = timedelta(minutes=10)
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        pass


class Once(Tidy):
    name = "tidy"
    on_lost = "skip"


class Off(Tidy):
    name = "tidy"
    enabled = False


class Patient(Tidy):
    name = "tidy"
    catch_up = False


def record(state: str, **columns: Any) -> Record:
    """Return an attempt at noon's tick on a:1 that began a second late and took half a second."""
    ran = state not in ("skipped", "missed")
    return Record(
        **{
            "id": 1,
            "worker": "tidy",
            "tick": NOON,
            "through": None if ran else NOON,
            "trigger": "schedule",
            "state": state,
            "attempt": 1 if ran else None,
            "token": 1 if ran else None,
            "instance": "a" if ran else None,
            "instance_name": "a:1" if ran else None,
            "started_at": NOON + timedelta(seconds=1) if ran else None,
            "finished_at": None if state == "running" else NOON + timedelta(seconds=1.5),
            "progress_done": None,
            "progress_total": None,
            "reason": None,
            "cancelled_at": None,
            "cancelled_by": None,
            "clock": NOON + 5 * MINUTE,
            **columns,
        }
    )


def state(**columns: Any) -> WorkerState:
    """Return a worker that has been known for a day, and whose tick of noon is decided."""
    return WorkerState(
        **{
            "name": "tidy",
            "clock": NOON + 5 * MINUTE,
            "mark": NOON,
            "schedule_text": "every 600s",
            "scheduled_at": NOON - DAY,
            "declared": "every 600s",
            "declared_by": None,
            "paused_at": None,
            "pending_tick": None,
            "pending_trigger": None,
            "running": None,
            "started_at": None,
            "progress_done": None,
            "progress_total": None,
            "instance": None,
            "instance_name": None,
            **columns,
        }
    )


A = InstanceRecord("a", "a", 1, NOON - HOUR, NOON + 5 * MINUTE, None)
B = InstanceRecord("b", "b", 2, NOON - 2 * HOUR, NOON - HOUR, None)
BEFORE_NOON = {"mark": NOON - 10 * MINUTE}


def around(*records: Record, known: WorkerState | None = None, **more: Any) -> Surroundings:
    """Return the surroundings at five past twelve, with a:1 alive."""
    given = {"at": NOON + 5 * MINUTE, "clock": NOON + 5 * MINUTE, "alive": (A,), "last_seen": A, **more}
    return Surroundings(name="tidy", state=known or state(), records=records, **given)


def answer(seen: Surroundings, worker: type[PeriodicWorker] | None = Tidy) -> Answer:
    return why(seen, worker, history_days=14)


def said(seen: Surroundings, worker: type[PeriodicWorker] | None = Tidy) -> str:
    """Return the sentence without its subject, which is noon's tick."""
    sentence = answer(seen, worker).sentence
    subject = "The tick 2026-11-20T12:00:00Z of tidy "
    assert sentence.startswith(subject)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence.removeprefix(subject).removesuffix(".")


# -- ticks with a row ----------------------------------------------------------------------------


def test_a_tick_that_ran_shows_its_start_its_instance_and_its_length() -> None:
    seen = around(record("succeeded"))
    assert said(seen) == "ran at 2026-11-20T12:00:01Z on a:1 and succeeded in 0.500 s"
    assert answer(seen).is_fine


def test_a_second_attempt_names_the_first() -> None:
    lost = record("lost", reason="b:2 stopped renewing its lease", instance_name="b:2")
    assert said(around(lost, record("succeeded", attempt=2))) == (
        "ran at 2026-11-20T12:00:01Z on a:1 and succeeded in 0.500 s "
        "(attempt 2; the one before was lost on b:2 (b:2 stopped renewing its lease))"
    )


def test_a_failed_tick_shows_the_last_line_of_its_error() -> None:
    reason = "Traceback (most recent call last):\n  File ...\nValueError: no such book.\n"
    seen = around(record("failed", reason=reason))
    assert said(seen) == "ran at 2026-11-20T12:00:01Z on a:1 and failed after 0.500 s: ValueError: no such book"
    assert not answer(seen).is_fine


class Again(Tidy):
    name = "tidy"
    on_failed = "retry"


def test_a_failed_tick_names_the_attempt_that_follows_or_did_not() -> None:
    failed = "ran at 2026-11-20T12:00:01Z on a:1 and failed after 0.500 s: ValueError"
    pending = state(pending_tick=NOON, pending_trigger="schedule", retry_at=NOON + 6 * MINUTE)
    seen = record("failed", reason="ValueError")
    assert said(around(seen, known=pending), Again) == f"{failed}; attempt 2 follows at 2026-11-20T12:06:00Z by a:1"
    assert said(around(seen), Again) == f"{failed}; attempt 2 did not follow, as the next tick came first"
    last = record("failed", reason="ValueError", attempt=3)
    assert said(around(last), Again) == f"{failed}; it is given up after attempt 3 of 3"


def test_a_tick_that_timed_out_shows_its_time_limit() -> None:
    seen = around(record("timed out", reason="ran longer than its timeout of 0:00:00.400"))
    assert said(seen) == (
        "ran at 2026-11-20T12:00:01Z on a:1 and timed out after 0.500 s: it ran longer than its timeout of 0:00:00.400"
    )


def test_a_cancelled_tick_names_the_user_and_a_thread_that_hangs() -> None:
    by = {"cancelled_at": NOON + timedelta(seconds=1), "cancelled_by": "ada"}
    ran = "ran at 2026-11-20T12:00:01Z on a:1 for 0.500 s and was cancelled"
    assert said(around(record("cancelled", **by))) == f"{ran} by ada at 2026-11-20T12:00:01Z"
    assert not answer(around(record("cancelled", **by))).is_fine
    nameless = by | {"cancelled_by": None, "reason": "it did not end within 20 s, so its thread may still run"}
    assert said(around(record("cancelled", **nameless))) == (
        f"{ran} at 2026-11-20T12:00:01Z: it did not end within 20 s, so its thread may still run"
    )
    running = "began at 2026-11-20T12:00:01Z on a:1 and was cancelled by ada at 2026-11-20T12:00:01Z"
    assert said(around(record("running", **by))) == f"{running}: it has been asked to stop"
    assert said(around(record("running", **by, is_gone=True))) == f"{running}: its instance is gone"


def test_a_running_tick_shows_its_start_and_its_progress() -> None:
    seen = around(record("running", progress_done=2000.0, progress_total=5000.0))
    assert said(seen) == "has been running for 4 min 59 s, since 2026-11-20T12:00:01Z on a:1 (2,000 of 5,000 done)"
    assert answer(seen).is_fine


def test_a_running_tick_whose_instance_is_gone_names_the_instance_that_takes_it_over() -> None:
    seen = around(record("running", instance_name="b:2", is_gone=True))
    assert said(seen) == "began at 2026-11-20T12:00:01Z on b:2, which is gone: will be taken over by a:1"


def test_a_running_tick_without_an_instance_to_take_it_over_names_the_remedy() -> None:
    seen = around(record("running", instance_name="b:2", is_gone=True), alive=(), last_seen=B)
    assert said(seen) == (
        "began at 2026-11-20T12:00:01Z on b:2, which is gone: will be taken over by the next instance that starts: "
        "no instance is alive now (b:2 was last seen at 2026-11-20T11:00:00Z); `flask workers run` starts one"
    )


LOST = record("lost", reason="a:1 stopped renewing its lease")


def test_a_lost_tick_that_is_retried_names_the_next_attempt() -> None:
    assert said(around(LOST, known=state(pending_tick=NOON))) == (
        "was lost at 2026-11-20T12:00:01Z (a:1 stopped renewing its lease); attempt 2 follows by a:1"
    )


def test_a_lost_tick_of_a_paused_worker_names_the_pause() -> None:
    assert said(around(LOST, known=state(pending_tick=NOON, paused_at=NOON + MINUTE))).endswith(
        "attempt 2 follows, once the worker is resumed (it is paused since 2026-11-20T12:01:00Z)"
    )


def test_a_lost_tick_that_is_given_up_shows_the_number_of_attempts() -> None:
    assert said(around(record("lost", reason=LOST.reason, attempt=3))).endswith("given up after attempt 3 of 3")


def test_a_lost_tick_that_must_not_be_repeated_says_so() -> None:
    assert said(around(LOST), Once).endswith("and is given up, as Once has on_lost = 'skip'")


def test_a_tick_that_was_handed_back_names_the_instance_that_runs_it_again() -> None:
    assert said(around(record("handed back"), known=state(pending_tick=NOON))) == (
        "was handed back by a:1 at 2026-11-20T12:00:01Z; it will be run again by a:1"
    )


def test_a_skipped_tick_shows_since_when_the_worker_was_paused() -> None:
    reason = "paused since 2026-11-20T11:30:00+00:00"
    skipped = record("skipped", tick=NOON - 20 * MINUTE, through=NOON + 10 * MINUTE, reason=reason)
    assert said(around(skipped)) == (
        "was skipped, as the worker was paused since 2026-11-20T11:30:00Z, "
        "like every tick from 2026-11-20T11:40:00Z to 2026-11-20T12:10:00Z"
    )


def test_a_skipped_tick_names_the_run_that_was_still_on() -> None:
    skipped = record("skipped", reason="still running the tick 2026-11-20T11:50:00+00:00 on b:2")
    assert said(around(skipped)) == (
        "was skipped, as the worker was still running the tick 2026-11-20T11:50:00Z on b:2"
    )


def test_a_missed_tick_shows_the_time_without_an_instance() -> None:
    missed = record("missed", tick=NOON - HOUR, through=NOON, finished_at=NOON + 4 * MINUTE)
    assert said(around(missed)) == (
        "was missed, as no instance came to run it in time, nor any other tick between 2026-11-20T11:00:00Z and "
        "2026-11-20T12:00:00Z: one did at 2026-11-20T12:04:00Z, and of several that are due only the latest tick runs"
    )


def test_a_manual_run_is_called_manual() -> None:
    asked = NOON + timedelta(seconds=1.234)
    seen = around(record("succeeded", trigger="manual", tick=asked), at=asked)
    assert answer(seen).sentence == (
        "The manual run of tidy asked for at 2026-11-20T12:00:01.234Z "
        "ran at 2026-11-20T12:00:01Z on a:1 and succeeded in 0.500 s."
    )


# -- ticks without a row -------------------------------------------------------------------------


def test_a_tick_of_the_future_is_not_due_yet() -> None:
    seen = around(at=NOON, clock=NOON - 3 * MINUTE, known=state(**BEFORE_NOON))
    assert said(seen) == "is not due yet: it comes in 3 min"
    assert answer(seen).is_fine


@pytest.mark.parametrize(
    ("worker", "changed", "alive", "obstacle"),
    [
        (Off, {}, (A,), "Off is disabled (enabled = False)"),
        (Tidy, {"paused_at": NOON - HOUR}, (A,), "the worker is paused since 2026-11-20T11:00:00Z"),
        (Tidy, {}, (), "no instance is alive now; `flask workers run` starts one"),
    ],
)
def test_a_future_tick_that_will_not_run_says_so(
    worker: type[PeriodicWorker], changed: dict[str, Any], alive: tuple[InstanceRecord, ...], obstacle: str
) -> None:
    seen = around(at=NOON, clock=NOON - 3 * MINUTE, known=state(**BEFORE_NOON | changed), alive=alive, last_seen=None)
    assert said(seen, worker) == f"is not due yet: it comes in 3 min, and {obstacle}"


def test_a_tick_that_repeats_after_a_clock_was_set_back_says_so() -> None:
    known = state(mark=NOON + 2 * HOUR)
    assert said(around(known=known, clock=NOON - HOUR, at=NOON)) == (
        "waits: the database's clock was ahead, so the worker's ticks are decided up to 2026-11-20T14:00:00Z, and "
        "go on once the clock has been right for the length of a lease, or by `flask workers repair`"
    )


def test_a_tick_below_a_mark_beyond_the_history_names_the_command() -> None:
    known = state(mark=NOON + timedelta(days=400))
    assert said(around(known=known, clock=NOON - HOUR, at=NOON)).endswith(
        "and go on by `flask workers repair` only, because the history is shorter than that"
    )


def test_a_worker_without_any_instance_yet_says_so() -> None:
    seen = Surroundings("tidy", NOON, NOON, None)
    assert said(seen) == (
        "did not run: no instance has ever started the worker on this database, "
        "and no instance is alive now; `flask workers run` starts one"
    )


def test_a_tick_before_the_worker_was_known_shows_since_when_it_is_known() -> None:
    seen = around(at=NOON, known=state(scheduled_at=NOON + 3 * MINUTE, mark=NOON + 10 * MINUTE), clock=NOON + HOUR)
    assert said(seen) == (
        "was before this database knew the worker or its schedule (every 10 minutes, since 2026-11-20T12:03:00Z)"
    )


@pytest.mark.parametrize("mark", [NOON - MINUTE, NOON])
def test_a_tick_of_the_first_period_is_older_than_the_schedule(mark: datetime) -> None:
    known = state(scheduled_at=NOON + 3 * MINUTE, mark=mark)
    assert said(around(known=known)) == (
        "is older than its schedule (every 10 minutes, since 2026-11-20T12:03:00Z), "
        "whose first tick is 2026-11-20T12:10:00Z"
    )


def test_a_tick_of_another_schedule_names_that_schedules_last_tick() -> None:
    before = record("succeeded", tick=NOON - 5 * MINUTE)
    known = state(scheduled_at=NOON + 6 * MINUTE, mark=NOON + 10 * MINUTE)
    seen = around(known=known, before=before, oldest=NOON - DAY, clock=NOON + HOUR)
    assert said(seen) == (
        "is not a tick of the current schedule, which is newer (every 10 minutes, since 2026-11-20T12:06:00Z); "
        "the last tick of the schedule before it, 2026-11-20T11:55:00Z, is succeeded"
    )


def test_a_tick_whose_row_was_pruned_shows_how_far_the_history_goes_back() -> None:
    seen = around(clock=NOON + 20 * DAY, known=state(mark=NOON + 20 * DAY), oldest=NOON + 6 * DAY)
    assert answer(seen).state == "pruned"
    assert said(seen) == (
        "is decided, but the history no longer has it: "
        "the history of the worker goes back to 2026-11-26T12:00:00Z (WORKERS_HISTORY_DAYS is 14)"
    )


def test_a_tick_without_a_row_names_the_rows_around_it() -> None:
    seen = around(
        at=NOON,
        clock=NOON + 2 * HOUR,
        known=state(mark=NOON + HOUR),
        before=record("succeeded", tick=NOON - 10 * MINUTE),
        after=record("skipped", tick=NOON + HOUR),
    )
    assert said(seen) == (
        "did not run: no instance claimed it when it was due, and it is too late now; "
        "the history goes from 2026-11-20T11:50:00Z (succeeded) straight to 2026-11-20T13:00:00Z (skipped)"
    )


def test_a_disabled_worker_says_so() -> None:
    assert said(around(known=state(**BEFORE_NOON)), Off) == (
        "did not run: Off is disabled in this release (enabled = False)"
    )


def test_a_worker_that_is_paused_now_shows_since_when() -> None:
    assert said(around(known=state(**BEFORE_NOON, paused_at=NOON - MINUTE))) == (
        "did not run: the worker is paused since 2026-11-20T11:59:00Z"
    )


def test_a_tick_that_waits_for_an_older_tick_names_it() -> None:
    assert said(around(known=state(**BEFORE_NOON, pending_tick=NOON - HOUR))) == (
        "has waited for 5 min: the tick 2026-11-20T11:00:00Z, which was lost or handed back, runs first by a:1"
    )


@pytest.mark.parametrize(("alive", "gone"), [((A,), ""), ((B,), ", which is gone: will be taken over")])
def test_a_tick_that_waits_for_a_running_tick_names_its_instance(alive: tuple[InstanceRecord, ...], gone: str) -> None:
    running = Claim("tidy", NOON - HOUR, 1, 7, "schedule", 7)
    known = state(**BEFORE_NOON, running=running, instance="a", instance_name="a:1")
    assert said(around(known=known, alive=alive)) == (
        f"has waited for 5 min: the tick 2026-11-20T11:00:00Z is still running on a:1{gone}"
    )


def test_a_tick_is_overdue_when_no_instance_is_alive() -> None:
    seen = around(known=state(**BEFORE_NOON), alive=(), last_seen=B)
    assert said(seen) == (
        "is overdue by 5 min: no instance is alive now (b:2 was last seen at 2026-11-20T11:00:00Z); "
        "`flask workers run` starts one"
    )


def test_a_tick_that_has_just_fallen_due_is_about_to_be_claimed() -> None:
    seen = around(known=state(**BEFORE_NOON), at=NOON, clock=NOON + timedelta(seconds=0.2))
    assert said(seen) == "fell due 0.200 s ago; a:1 will run it"


def test_a_tick_without_catch_up_shows_when_the_instances_started() -> None:
    late = InstanceRecord("a", "a", 1, NOON + MINUTE, NOON + 5 * MINUTE, None)
    assert said(around(known=state(**BEFORE_NOON), alive=(late,)), Patient) == (
        "did not run: no instance was up when it was due (the oldest started at 2026-11-20T12:01:00Z), "
        "and Patient has catch_up = False"
    )


def test_a_tick_that_living_instances_do_not_claim_names_them() -> None:
    assert said(around(known=state(**BEFORE_NOON), alive=(A, B))).startswith(
        "is overdue by 5 min although a:1 or 1 more is alive: its log says why"
    )


def test_a_worker_of_another_release_says_so() -> None:
    assert said(around(known=state(**BEFORE_NOON)), None) == (
        "is overdue by 5 min: this release does not have the worker, and no other release runs it"
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1, "0.000 s"),
        (0.0311, "0.031 s"),
        (12.34, "12.3 s"),
        (60, "1 min"),
        (303, "5 min 3 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (360_000, "4 d 4 h"),
    ],
)
def test_a_length_of_time_is_shown_in_its_two_largest_units(seconds: float, words: str) -> None:
    assert span(timedelta(seconds=seconds)) == words


# -- read from real rows -------------------------------------------------------------------------


@pytest.fixture
def app(database_url: str) -> Iterator[Flask]:
    app = make_app(database_url, Tidy)
    yield app
    close(app)


@pytest.fixture
def write(manager: BackgroundWorkerManager) -> Callable[..., None]:
    """Write a row of tidy's history, by default of noon."""

    def write(state: str, **columns: Any) -> None:
        row = {"worker": "tidy", "tick": NOON, "trigger": "schedule", "state": state, **columns}
        with manager.stores.main.engine.begin() as connection:
            connection.execute(insert(executions).values(row))

    return write


@pytest.fixture
def known(manager: BackgroundWorkerManager) -> Callable[..., None]:
    """Make tidy known since the day before, by default with its ticks until noon decided."""

    def known(**columns: Any) -> None:
        manager.recovery.look(Tidy)
        values = {"scheduled_at": NOON - DAY, "mark": NOON, **columns}
        with manager.stores.main.engine.begin() as connection:
            connection.execute(update(workers).where(workers.c.name == "tidy").values(values))

    return known


def test_a_real_run_is_described_with_its_own_data(manager: BackgroundWorkerManager) -> None:
    tick = manager.history.clock()
    execution = manager.tick("tidy", tick)
    assert execution
    answer = manager.why("tidy", tick)
    assert (answer.state, answer.tick) == ("succeeded", execution.claim.tick)
    assert [each.attempt for each in answer.records] == [1]
    assert str(answer.records[0].instance_name) in answer.sentence


def test_a_moment_belongs_to_the_latest_tick_up_to_it(
    manager: BackgroundWorkerManager, known: Callable[..., None], write: Callable[..., None]
) -> None:
    known()
    write("succeeded", tick=NOON - 10 * MINUTE)
    write("failed", started_at=NOON, finished_at=NOON, instance_name="a:1", attempt=1, reason="Broken: yes")
    just_before = timedelta(microseconds=1000)
    assert manager.why("tidy", NOON - just_before).tick == NOON - 10 * MINUTE
    assert [manager.why("tidy", NOON + late).state for late in (0 * MINUTE, 10 * MINUTE - just_before)] == [
        "failed"
    ] * 2
    assert manager.why("tidy", NOON + 10 * MINUTE).state == "overdue"


def test_every_tick_within_a_row_of_missed_ticks_was_missed_even_around_a_manual_run(
    manager: BackgroundWorkerManager, known: Callable[..., None], write: Callable[..., None]
) -> None:
    known()
    write("succeeded", trigger="manual", tick=NOON - 35 * MINUTE, token=1)
    write("missed", tick=NOON - HOUR, through=NOON - 10 * MINUTE, finished_at=NOON)
    answers = [manager.why("tidy", NOON - minutes * MINUTE) for minutes in (60, 45, 31, 30, 10, 1)]
    assert {answer.state for answer in answers} == {"missed"}
    assert [(NOON - answer.tick) // MINUTE for answer in answers] == [60, 50, 40, 30, 10, 10]
    assert manager.why("tidy", NOON - 35 * MINUTE).state == "succeeded"


def test_the_attempts_at_a_tick_are_listed_in_their_order(
    manager: BackgroundWorkerManager, known: Callable[..., None], write: Callable[..., None]
) -> None:
    known()
    for number, state in enumerate(("handed back", "lost", "succeeded"), 1):
        write(state, attempt=max(1, number - 1), token=number, instance_name=f"a:{number}", started_at=NOON)
    assert [each.state for each in manager.why("tidy", NOON).records] == ["handed back", "lost", "succeeded"]


def test_after_a_change_of_schedule_the_earlier_tick_is_described(
    manager: BackgroundWorkerManager, known: Callable[..., None], write: Callable[..., None]
) -> None:
    known(scheduled_at=NOON + 7 * MINUTE)
    write("succeeded", tick=NOON + 5 * MINUTE)
    write("succeeded", tick=NOON - DAY)
    assert (
        "the last tick of the schedule before it, 2026-11-20T12:05:00Z"
        in manager.why("tidy", NOON + 6 * MINUTE).sentence
    )


def test_a_tick_older_than_every_row_is_pruned(
    manager: BackgroundWorkerManager, known: Callable[..., None], write: Callable[..., None]
) -> None:
    known(mark=NOON, scheduled_at=NOON - 900 * DAY)
    write("succeeded")
    assert manager.why("tidy", NOON - 800 * DAY).state == "pruned"


def test_a_pause_is_the_reason_given(manager: BackgroundWorkerManager, known: Callable[..., None]) -> None:
    known(mark=NOON)
    manager.pause("tidy")
    moment = manager.history.clock()
    assert manager.why("tidy", moment).state == "paused"
    assert manager.tick("tidy", moment) is None  # this call records the skip
    assert manager.why("tidy", moment).state == "skipped"


def test_ticks_before_the_first_claim_count_as_missed_since_the_worker_is_known(
    manager: BackgroundWorkerManager, known: Callable[..., None]
) -> None:
    known(mark=None, scheduled_at=NOON - HOUR)
    assert manager.tick("tidy", NOON)
    answer = manager.why("tidy", NOON - 5 * MINUTE)
    assert (answer.state, answer.records[0].tick) == ("missed", NOON - 50 * MINUTE)


def test_the_name_of_an_unknown_worker_is_refused(manager: BackgroundWorkerManager) -> None:
    with pytest.raises(UnknownWorker, match="Did you mean 'tidy'"):
        manager.why("tidi")


def test_an_answer_costs_a_constant_number_of_queries_on_an_index(
    manager: BackgroundWorkerManager, known: Callable[..., None], write: Callable[..., None]
) -> None:
    known()

    def queries(engine: Engine) -> list[str]:
        with statements(engine) as asked:
            manager.why("tidy", NOON - 5 * MINUTE)
        return asked

    few = queries(manager.stores.main.engine)
    for number in range(200):
        write("succeeded", tick=NOON - number * DAY, token=number)
    assert len(queries(manager.stores.main.engine)) == len(few) <= 5


# -- one answer, however it is asked for ---------------------------------------------------------


def both_ways(manager: BackgroundWorkerManager) -> Answer:
    """Return the answer about the latest tick. The answer must be the same for this moment and for the tick."""
    now = manager.why("tidy")
    at_the_tick = manager.why("tidy", now.tick)
    assert (now.state, now.sentence) == (at_the_tick.state, at_the_tick.sentence)
    return now


def test_a_tick_before_a_change_of_schedule_is_called_older_and_not_unclaimed(
    manager: BackgroundWorkerManager, write: Callable[..., None]
) -> None:
    manager.remove("tidy")
    manager.add(type("Daily", (Tidy,), {"name": "tidy", "period": DAY}))
    assert manager.why("tidy").state in ("unknown", "before")
    manager.recovery.look(manager.workers["tidy"])
    clock = manager.history.clock()
    ran = clock.replace(hour=0, minute=0, second=0, microsecond=0)
    with manager.stores.main.engine.begin() as connection:
        values = {"mark": ran, "scheduled_at": ran - 9 * DAY}
        connection.execute(update(workers).where(workers.c.name == "tidy").values(values))
    write("succeeded", tick=ran, started_at=ran, finished_at=ran + MINUTE, instance_name="a:1", attempt=1)
    assert both_ways(manager).state == "succeeded"
    manager.reschedule("tidy", period=HOUR / 60)
    answer = both_ways(manager)
    assert answer.tick == ran if clock.hour == clock.minute == 0 else answer.state == "before"
    assert "no instance took it" not in answer.sentence


def test_later_rows_of_an_older_schedule_do_not_change_the_answer(
    manager: BackgroundWorkerManager, known: Callable[..., None], write: Callable[..., None]
) -> None:
    known(scheduled_at=NOON - MINUTE, mark=NOON)
    write("succeeded", started_at=NOON, finished_at=NOON + MINUTE, instance_name="a:1", attempt=1)
    write("succeeded", tick=NOON + 3 * MINUTE, trigger="manual", token=7)
    write("missed", tick=NOON + 5 * MINUTE, finished_at=NOON + HOUR)  # by the schedule after a rollback
    answers = [manager.why("tidy", NOON + minutes * MINUTE) for minutes in (0, 1, 4, 9)]
    assert {answer.sentence for answer in answers} == {answers[0].sentence}
    assert answers[0].state == "succeeded"
    assert manager.why("tidy", NOON + 3 * MINUTE).sentence.startswith("The manual run")


def test_the_answer_about_now_adds_a_manual_run_after_the_latest_tick(manager: BackgroundWorkerManager) -> None:
    manager.remove("tidy")
    manager.add(type("Daily", (Tidy,), {"name": "tidy", "period": DAY}))
    manager.tick("tidy", manager.history.clock())
    assert "manual" not in manager.why("tidy").sentence
    run = manager.trigger("tidy")
    assert run is not None
    answer = manager.why("tidy")
    assert answer.tick < run.claim.tick
    assert answer.sentence.startswith("The tick ")
    assert f". The manual run of tidy asked for at {moment(run.claim.tick)} ran at " in answer.sentence
    assert "manual" not in manager.why("tidy", answer.tick).sentence


@pytest.mark.parametrize("alive", [(), (A,)])
@pytest.mark.parametrize("mark", [None, NOON - 10 * MINUTE, NOON, NOON + DAY])
@pytest.mark.parametrize("scheduled", [-DAY, -MINUTE, 3 * MINUTE])
def test_the_answer_about_a_tick_is_the_same_for_every_moment_that_belongs_to_it(
    alive: tuple[InstanceRecord, ...], mark: datetime | None, scheduled: timedelta
) -> None:
    known = state(mark=mark, scheduled_at=NOON + scheduled)
    moments = (NOON, NOON + MINUTE, NOON + 5 * MINUTE)
    answers = {answer(around(known=known, at=at, alive=alive)).sentence for at in moments}
    assert len(answers) == 1


def test_an_instance_whose_row_was_deleted_is_not_blamed_for_its_lease(
    manager: BackgroundWorkerManager, known: Callable[..., None]
) -> None:
    known(mark=NOON - DAY, scheduled_at=NOON - 2 * DAY)
    clock = manager.history.clock()
    state = manager.recovery.look(Tidy)
    tick = state.schedule.previous(clock)
    manager.stores.ledger.miss(state, tick)
    assert manager.stores.ledger.claim("tidy", tick, state.schedule_text, ("deleted", "web-1:7"))
    assert manager.tick("tidy", clock)
    lost = manager.history.executions("tidy", state="lost")[0]
    assert lost.reason == "web-1:7 is not known to the fleet: its row was deleted"
