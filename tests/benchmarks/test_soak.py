"""The soak's judge: each way to break the promise is a violation, and excuses are few."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, insert
from sqlalchemy.pool import NullPool

from background.database.dialects.sqlite import prepare
from background.database.tables import executions
from background.repair.edited_rows import GONE
from background.schedule.periods import Every
from benchmarks.soak import statements, tracebacks
from benchmarks.soak_fleet import LEASE_SECONDS, Fault
from benchmarks.soak_operator import Deleted
from benchmarks.soak_oracle import Oracle, Spans, Verdict
from benchmarks.soak_worker import effects, workers

MOMENT = timedelta(milliseconds=1)
SECOND = timedelta(seconds=1)
QUICK = next(worker for worker in workers() if worker.name == "quick_0")


def lonely_tick() -> datetime:
    """Return a tick of `quick_0` at which no other worker has a tick."""
    schedules = [Every(worker.period) for worker in workers() if worker.period and worker.name != QUICK.name]
    tick = Every(QUICK.period).next(datetime(2026, 3, 1, tzinfo=UTC))
    while any(schedule.next(tick - MOMENT) <= tick for schedule in schedules):
        tick += QUICK.period
    return tick


TICK = lonely_tick()
NEXT = TICK + QUICK.period

STAMP = "2026-03-01 00:00:00,000"
AWAY = (
    "sqlalchemy.exc.OperationalError: (psycopg.OperationalError) connection failed: connection to server failed\n"
    "DETAIL: It was closed.\n(Background on this error at: https://sqlalche.me/e/20/e3q8)"
)


class Soaked:
    """A database as a soak leaves it. The test writes the events at TICK, and the judge reads them."""

    def __init__(self, url: str) -> None:
        self.engine = create_engine(url, poolclass=NullPool)
        prepare(self.engine)
        effects.create(self.engine)
        self.tokens = 0

    def ran(self, state: str = "succeeded", begun: datetime = TICK, **more: Any) -> None:
        """Insert an execution, with its effect if it succeeded."""
        self.tokens += 1
        row = {"worker": QUICK.name, "tick": TICK, "trigger": "schedule", "state": state, "token": self.tokens}
        row |= {"instance_name": "host:1", "attempt": 1, "started_at": begun, "finished_at": begun + MOMENT}
        row |= more
        self._insert(executions, row)
        if state == "succeeded":
            self.left(at=begun, tick=row["tick"], worker=row["worker"])

    def left(self, **more: Any) -> None:
        """Insert an effect."""
        row = {"worker": QUICK.name, "tick": TICK, "part": 0, "token": self.tokens, "pid": 1, "at": TICK}
        self._insert(effects, row | more)

    def did_not_run(self, state: str) -> None:
        row = {"worker": QUICK.name, "tick": TICK, "through": TICK, "trigger": "schedule", "state": state}
        self._insert(executions, row | {"finished_at": TICK})

    def judge(self, *faults: Fault, absences: Spans = (), standstills: Spans = ()) -> Verdict:
        return Oracle(self.engine, absences, standstills, faults).judge(TICK - MOMENT, TICK - MOMENT, TICK)

    def _insert(self, table: Any, row: dict[str, Any]) -> None:
        with self.engine.begin() as connection:
            connection.execute(insert(table), row)


@pytest.fixture
def soaked(sqlite_url: str) -> Soaked:
    return Soaked(sqlite_url)


def sentences(verdict: Verdict) -> list[str]:
    return [what for _, what in verdict.violations]


def test_a_tick_that_ran_once_and_in_time_is_not_a_violation(soaked: Soaked) -> None:
    soaked.ran()
    verdict = soaked.judge()
    assert (verdict.ticks, verdict.violations) == (1, [])


def test_a_tick_without_an_effect_is_lost(soaked: Soaked) -> None:
    verdict = soaked.judge()
    assert (verdict.lost, sentences(verdict)) == (1, ["lost"])


def test_a_second_effect_is_a_duplicate(soaked: Soaked) -> None:
    soaked.ran()
    soaked.left()
    assert soaked.judge().duplicates == 1


def test_an_effect_and_a_start_before_the_tick_are_early(soaked: Soaked) -> None:
    soaked.ran(begun=TICK - MOMENT)
    assert sentences(soaked.judge()) == ["done 0.001 s early", "begun 0.001 s early"]


def test_an_effect_of_an_older_tick_after_a_newer_tick_is_out_of_order(soaked: Soaked) -> None:
    soaked.ran()
    soaked.left(tick=TICK - QUICK.period)
    assert soaked.judge().out_of_order == 1


def test_a_run_that_begins_while_another_is_in_force_is_out_of_order(soaked: Soaked) -> None:
    soaked.ran("lost", finished_at=TICK + 3 * SECOND)
    soaked.ran(begun=TICK + 2 * SECOND)
    assert sentences(soaked.judge()) == ["begun while another was in force"]


def test_a_run_whose_claim_a_crash_lost_may_go_on_beside_the_next_run(soaked: Soaked) -> None:
    soaked.ran("lost", finished_at=TICK + 3 * SECOND, reason=GONE)
    soaked.ran(begun=TICK + 2 * SECOND)
    crash = TICK.timestamp() + 1
    assert sentences(soaked.judge(Fault("crash", crash, until=crash + 0.5))) == []
    assert soaked.judge(Fault("crash", crash - 5, until=crash - 4)).out_of_order == 1


@pytest.mark.parametrize("state", ["running", "failed", "timed out"])
def test_an_execution_without_a_good_end_is_a_violation(soaked: Soaked, state: str) -> None:
    soaked.ran(state)
    soaked.ran(begun=TICK + SECOND)
    assert sentences(soaked.judge()) == [f"an execution that {state}"]


def test_runs_after_the_last_judged_tick_may_be_cut_off_by_the_end_of_the_fleet(soaked: Soaked) -> None:
    soaked.ran()
    soaked.ran("running", tick=NEXT, begun=NEXT, finished_at=None)
    assert sentences(soaked.judge()) == []


def test_an_effect_of_a_run_that_was_lost_is_a_violation(soaked: Soaked) -> None:
    soaked.ran("lost")
    soaked.left()
    assert sentences(soaked.judge()) == ["lost, but the effects are those of the tokens [1]"]


def test_a_skipped_tick_is_excused_by_a_run_that_was_in_force_and_by_nothing_else(soaked: Soaked) -> None:
    soaked.did_not_run("skipped")
    assert sentences(soaked.judge()) == ["lost"]
    soaked.ran(tick=TICK - QUICK.period, begun=TICK - SECOND, finished_at=TICK + MOMENT)
    verdict = soaked.judge()
    assert (verdict.lost, verdict.skipped) == (0, 1)


def test_a_missed_tick_is_excused_by_a_database_that_was_away_for_all_of_its_period(soaked: Soaked) -> None:
    soaked.did_not_run("missed")
    began, ended = TICK.timestamp(), NEXT.timestamp()
    assert soaked.judge().lost == 1
    assert soaked.judge(absences=[(began, ended - 1.1)]).lost == 1
    assert soaked.judge(absences=[(began + 0.1, ended)]).lost == 1
    verdict = soaked.judge(absences=[(began, ended - 0.9)])
    assert (verdict.lost, verdict.outage) == (0, 1)


def deletion(at: datetime) -> Fault:
    claim = Deleted("background_workers", QUICK.name, TICK, 1)
    return Fault("delete", at.timestamp(), until=at.timestamp(), deleted=(claim,))


def test_a_missed_tick_is_excused_by_a_crash_after_it_and_not_by_an_earlier_crash(
    soaked: Soaked,
) -> None:
    soaked.did_not_run("missed")
    began = TICK.timestamp()
    assert soaked.judge(Fault("crash", began - 2, until=began - 1)).lost == 1
    assert soaked.judge(Fault("restart", began - 0.1, until=began + 1)).lost == 1
    verdict = soaked.judge(Fault("crash", began - 0.1, until=began + 1))
    assert (verdict.lost, verdict.undone) == (0, 1)


def test_a_tick_whose_rows_were_deleted_is_excused_by_an_execution_in_state_lost(soaked: Soaked) -> None:
    assert soaked.judge(deletion(TICK)).lost == 1
    soaked.ran("lost")
    assert soaked.judge().lost == 1
    assert soaked.judge(deletion(TICK + SECOND)).lost == 1
    verdict = soaked.judge(deletion(TICK))
    assert (verdict.lost, verdict.deleted) == (0, 1)


def test_a_tick_that_was_missed_right_after_the_row_of_its_worker_was_deleted_is_excused(soaked: Soaked) -> None:
    soaked.did_not_run("missed")
    assert soaked.judge(deletion(TICK - timedelta(seconds=LEASE_SECONDS + 2))).lost == 1
    verdict = soaked.judge(deletion(TICK - SECOND))
    assert (verdict.lost, verdict.deleted) == (0, 1)


def request(token: int) -> Fault:
    return Fault("cancel", TICK.timestamp(), cancelled=Deleted("", QUICK.name, TICK, token))


def test_a_run_that_the_operator_cancelled_excuses_its_tick(soaked: Soaked) -> None:
    soaked.ran("cancelled", cancelled_at=TICK)
    verdict = soaked.judge(request(1))
    assert (verdict.lost, verdict.cancelled, verdict.violations) == (0, 1, [])
    assert sentences(soaked.judge()) == ["cancelled, although the operator did not ask for it"]


FAILED = {"worker": "failing_0", "tick": Every(timedelta(seconds=6.3)).next(TICK)}
BY_DESIGN = "ValueError: the first attempt"


@pytest.mark.parametrize(
    ("after", "said"),
    [(0.2, ["tried again after 0.199 s"]), (1, []), (6.4, ["tried again after the next tick was due"])],
)
def test_a_failed_run_is_tried_again_after_its_backoff_and_before_the_next_tick(
    soaked: Soaked, after: float, said: list[str]
) -> None:
    soaked.ran()
    soaked.ran("failed", begun=FAILED["tick"], reason=BY_DESIGN, **FAILED)
    soaked.ran(begun=FAILED["tick"] + after * SECOND, attempt=2, **FAILED)
    verdict = soaked.judge()
    assert (sentences(verdict), verdict.failed) == (said, 1)


def test_a_slice_that_is_missed_is_a_violation(soaked: Soaked) -> None:
    soaked.ran()
    soaked.ran(worker="cursor_0")
    for part in (1, 2, 4):
        soaked.left(worker="cursor_0", part=part)
    assert sentences(soaked.judge()) == ["done with the slices [0, 1, 2, 4] only"]


def test_a_cancelled_run_that_commits_later_or_again_is_a_violation(soaked: Soaked) -> None:
    soaked.ran("cancelled", cancelled_at=TICK)
    soaked.left(part=1, at=TICK)
    assert sentences(soaked.judge(request(1))) == []
    soaked.left(part=2, at=TICK + SECOND)
    assert sentences(soaked.judge(request(1))) == ["cancelled, but it committed later"]
    soaked.ran(begun=TICK + 2 * SECOND)
    assert "cancelled, but run again" in sentences(soaked.judge(request(1)))


@pytest.mark.parametrize("state", ["succeeded", "lost", "handed back"])
def test_a_run_with_a_request_that_ends_otherwise_is_a_violation(soaked: Soaked, state: str) -> None:
    soaked.ran(state, cancelled_at=TICK)
    if state != "succeeded":
        soaked.ran(begun=TICK + SECOND)
    assert sentences(soaked.judge(request(1))) == [f"cancelled, but it {state}"]


@pytest.mark.parametrize("state", ["skipped", "missed"])
def test_an_effect_of_a_tick_recorded_as_not_run_is_a_violation(soaked: Soaked, state: str) -> None:
    soaked.ran()
    soaked.did_not_run(state)
    assert sentences(soaked.judge()) == [f"done, and noted as {state}"]


def test_an_effect_without_an_execution_is_a_violation(soaked: Soaked) -> None:
    soaked.left()
    assert sentences(soaked.judge()) == ["done by the token 0, which no execution has"]


def test_a_take_over_is_not_timed_if_rows_of_the_worker_were_deleted_meanwhile(soaked: Soaked) -> None:
    late = TICK + timedelta(seconds=LEASE_SECONDS + 1.1)
    soaked.ran("lost", finished_at=late)
    soaked.ran(begun=late)
    kill = Fault("kill", TICK.timestamp(), (1,))
    assert sentences(soaked.judge(kill)) != []
    assert sentences(soaked.judge(kill, deletion(late - SECOND))) == []


@pytest.mark.parametrize(("kind", "left", "most"), [("kill", "lost", LEASE_SECONDS + 1), ("term", "handed back", 1.0)])
def test_a_late_take_over_is_a_violation_unless_the_machine_stood_still(
    soaked: Soaked, kind: str, left: str, most: float
) -> None:
    late = TICK + timedelta(seconds=most + 0.1)
    soaked.ran(left, finished_at=late)
    soaked.ran(begun=late)
    fault = Fault(kind, TICK.timestamp(), (1,))
    assert [what.split(" s after")[0] for what in sentences(soaked.judge(fault))] == [
        f"begun elsewhere {most + 0.1:.3f}"
    ]
    another = Fault("stop", late.timestamp() + 0.05, (2,))
    assert bool(sentences(soaked.judge(fault, another))) == (kind == "term")
    assert sentences(soaked.judge(fault, Fault("stop", late.timestamp() + 0.2, (2,)))) != []
    stood_still = [(TICK.timestamp() + 0.5, TICK.timestamp() + 0.7)]
    assert sentences(soaked.judge(fault, standstills=stood_still)) == []


@pytest.mark.parametrize(
    ("said", "error", "is_violation"),
    [
        ("Buried the message letters:7, attempt 8 failed", "ValueError: poison", False),
        ("Buried the message letters:7, attempt 8 failed", AWAY, False),
        ("Buried the message letters:7, attempt 8 failed", "TypeError: no", True),
        ("Buried the message parcels:7, attempt 100 failed", AWAY, True),
        ("Failed at the tick", AWAY, True),
    ],
)
def test_a_traceback_is_a_violation_but_for_a_message_that_always_fails(
    tmp_path: Path, said: str, error: str, is_violation: bool
) -> None:
    entry = f"{STAMP} ERROR   background.letters: {said}\nTraceback (most recent call last):\n  File ...\n{error}\n"
    (tmp_path / "1-0001.log").write_text(
        f"{STAMP} INFO    background: Before\n{entry}{STAMP} INFO    background: After\n"
    )
    assert tracebacks(tmp_path).total() == is_violation


def test_the_cost_of_losing_is_a_mean_and_a_count_of_each_number_above_one() -> None:
    assert statements({}) == "none"
    assert statements({1: 1_000}) == "1.000 of 1,000"
    assert statements({1: 98, 3: 2}) == "1.040 of 100; 2 cost 3"
