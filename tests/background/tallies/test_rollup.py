"""The roll-up counts each run and each message once, in the slot of time in which it ended."""

import random
import re
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flask import Flask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, delete, event, insert, select
from support.databases import close
from support.fleet import make_app, statements

from background.database.tables import chores, executions, message_errors, messages, tallies, workers
from background.stores import Stores
from background.tallies.charts import SPANS, Chart, ChartHistory
from background.tallies.counting import ALL
from background.tallies.rollup import HOUR, MINUTES, RollUp, floor
from background.tallies.tally import BOUNDS, Tally
from background.testing.clock import Clock

NOW = datetime(2026, 3, 1, 12, 2, 30, tzinfo=UTC)
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
MINUTE, SECOND, DAY = timedelta(minutes=1), timedelta(seconds=1), timedelta(days=1)
STATES = ["succeeded", "failed", "lost", "timed out", "handed back"]


@pytest.fixture
def stores(app: Flask) -> Stores:
    found: Stores = app.extensions["background_workers"].stores
    return found


@pytest.fixture
def charts(stores: Stores) -> ChartHistory:
    return ChartHistory(stores.main, stores.roll_up)


@pytest.fixture
def clock() -> Iterator[Clock]:
    with Clock(NOW) as clock:
        yield clock


def run(ended: datetime, worker: str = "mailer", state: str = "succeeded", **more: Any) -> dict[str, Any]:
    """Return the row of a run that took 2 s and began 1 s late."""
    began = ended - timedelta(seconds=more.pop("took", 2))
    row = {"worker": worker, "tick": began - timedelta(seconds=more.pop("late", 1)), "trigger": "schedule"}
    return {**row, "attempt": 1, "state": state, "started_at": began, "finished_at": ended, **more}


def write(stores: Stores, *rows: dict[str, Any]) -> None:
    with stores.main.engine.begin() as connection:
        for row in rows:
            connection.execute(insert(executions).values(row))


def roll(stores: Stores) -> None:
    while stores.roll_up.step():
        pass


def kept(stores: Stores, length: timedelta, kind: str = "worker") -> dict[tuple[datetime, str], Tally]:
    query = select(tallies).where(tallies.c.seconds == length.total_seconds(), tallies.c.kind == kind)
    found: dict[tuple[datetime, str], Tally] = defaultdict(Tally)
    for row in stores.main.read(query):
        found[row.start, row.name].add_json(row.counts)
    return found


def numbers(chart: Chart) -> list[int]:
    return [bar.tally.runs for bar in chart.bars]


# -- counting ------------------------------------------------------------------------------------


RUNS = st.tuples(
    st.integers(0, 3 * 3600 * 1000),  # milliseconds before the end of the last whole slot
    st.sampled_from(["mailer", "sweeper", "näher"]),
    st.sampled_from(STATES),
    st.integers(0, 200_000),  # milliseconds
    st.integers(0, 20_000),
    st.sampled_from([("schedule", 1), ("schedule", 2), ("manual", 1)]),
)


def test_each_slot_has_the_counts_of_its_runs_exactly(stores: Stores, clock: Clock) -> None:
    @settings(
        max_examples=10,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(st.lists(RUNS, max_size=40))
    def check(found: list[Any]) -> None:
        with stores.main.engine.begin() as connection:
            for table in (executions, tallies, chores):
                connection.execute(delete(table))
        last = floor(NOW, MINUTES)
        rows = [
            run(
                last - timedelta(milliseconds=before),
                worker,
                state,
                took=took / 1000,
                late=late / 1000,
                trigger=trigger,
                attempt=attempt,
            )
            for before, worker, state, took, late, (trigger, attempt) in found
        ]
        write(stores, *rows)
        roll(stores)
        assert kept(stores, MINUTES) == by_hand(rows, MINUTES, last - 3 * HOUR)
        assert kept(stores, HOUR) == by_hand(rows, HOUR, last - 30 * DAY)

    check()


def by_hand(rows: list[dict[str, Any]], length: timedelta, since: datetime) -> dict[tuple[datetime, str], Tally]:
    """Count the rows one by one."""
    found: dict[tuple[datetime, str], Tally] = {}
    for row in rows:
        start = floor(row["finished_at"], length)
        if not since <= row["finished_at"] < floor(NOW, length):
            continue
        for name in (row["worker"], ALL):
            tally = found.setdefault((start, name), Tally())
            tally.counts[row["state"]] += 1
            add(tally.took, row["finished_at"] - row["started_at"])
            if (row["trigger"], row["attempt"]) == ("schedule", 1):
                add(tally.late, row["started_at"] - row["tick"])
    return found


def add(lengths: Any, length: timedelta) -> None:
    seconds = length.total_seconds()
    lengths.bins[bisect_right(BOUNDS, seconds)] += 1
    lengths.longest = max(lengths.longest or 0.0, seconds)


def test_ticks_that_did_not_run_are_not_runs(stores: Stores, charts: ChartHistory, clock: Clock) -> None:
    ended = NOW - HOUR
    write(stores, run(ended) | {"state": "skipped", "started_at": None}, run(ended), run(ended) | {"finished_at": None})
    roll(stores)
    assert charts.runs().total.counts == {"succeeded": 1}


def test_messages_are_counted_when_they_are_enqueued_when_they_fail_and_when_they_end(
    stores: Stores, charts: ChartHistory, clock: Clock
) -> None:
    message = {"topic": "mail", "payload": "1", "enqueued_at": NOW - 3 * HOUR, "due_at": NOW - 2 * HOUR}
    ends = {"done": NOW - 2 * HOUR + SECOND, "dead": NOW - HOUR, "discarded": NOW - MINUTE, "waiting": None}
    with stores.main.engine.begin() as connection:
        for state, ended in ends.items():
            connection.execute(insert(messages).values(**message, state=state, finished_at=ended))
        connection.execute(insert(messages).values(**message | {"topic": "orders"}))
        for attempt in (1, 2):
            values = {"message": 2, "attempt": attempt, "at": NOW - HOUR - attempt * MINUTE, "error": "no"}
            connection.execute(insert(message_errors).values(values))
    for _ in range(2):  # counted as the chart is read, and then by the roll-up
        roll(stores)
        chart = charts.messages("mail")
        assert chart.total.counts == {"enqueued": 4, "done": 1, "failed": 2, "dead": 1, "discarded": 1}
        assert chart.total.took.longest == 1.0
        assert charts.messages().total.counts["enqueued"] == 5
        assert sum(charts.messages("none").total.counts.values()) == 0
        clock.move(MINUTES)


def test_a_run_on_the_first_start_is_not_late_and_any_other_first_run_is(
    stores: Stores, charts: ChartHistory, clock: Clock
) -> None:
    known = {"schedule": "every 86400s", "declared": "every 86400s", "scheduled_at": NOON}
    with stores.main.engine.begin() as connection:
        connection.execute(insert(workers), [{"name": name, **known} for name in ("mailer", "sweeper")])
    write(stores, run(NOON + 3 * SECOND, late=15 * 3600, token=1), run(NOON + MINUTE, late=20, token=2))
    write(stores, run(NOON + MINUTE, "sweeper", late=40, token=1))
    for _ in range(2):  # from the rows, and from the tallies
        assert charts.runs("mailer").total.late.longest == 20
        assert charts.runs("sweeper").total.late.longest == 40
        assert charts.runs().total.runs == 3
        clock.move(MINUTES)
        roll(stores)


# -- late, twice, backwards ----------------------------------------------------------------------


def test_a_commit_that_comes_late_is_counted_by_the_next_roll_up(
    stores: Stores, charts: ChartHistory, clock: Clock
) -> None:
    roll(stores)
    write(stores, run(floor(NOW, MINUTES) - SECOND))  # its slot is counted already
    assert charts.runs(span="1h").total.runs == 0
    clock.move(MINUTES)
    roll(stores)
    assert charts.runs(span="1h").total.runs == 1
    clock.move(HOUR)
    roll(stores)
    assert charts.runs().total.runs == 1


def test_a_second_roll_up_of_the_same_slots_writes_nothing(stores: Stores, clock: Clock) -> None:
    write(stores, run(NOW - 4 * MINUTE))
    roll(stores)
    with statements(Engine) as seen:
        roll(stores)
    assert len(seen) == 1


def test_several_instances_at_once_count_each_run_once(
    database_url: str, stores: Stores, charts: ChartHistory, clock: Clock
) -> None:
    write(stores, *(run(NOW - SECOND - each * MINUTE) for each in range(170)))
    others = [make_app(database_url) for _ in range(3)]
    try:
        ready = threading.Barrier(len(others))

        def roll_with_the_others(app: Flask) -> None:
            ready.wait()
            with app.app_context():
                roll(app.extensions["background_workers"].stores)

        threads = [threading.Thread(target=roll_with_the_others, args=(app,)) for app in others]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        close(*others)
    assert charts.runs().total.counts == {"succeeded": 170}
    assert sum(tally.runs for (_, name), tally in kept(stores, MINUTES).items() if name == ALL) == 170 - 3


def test_each_instance_looks_once_per_slot_some_time_after_its_end(stores: Stores) -> None:
    roll_up, start = RollUp(stores.main, DAY), floor(NOW, MINUTES)
    looks = [at for at in (start + n * SECOND for n in range(1, 1500)) if roll_up.is_due(at)]
    assert [floor(at, MINUTES) for at in looks] == [start + n * MINUTES for n in (1, 2, 3, 4)]
    assert all(SECOND <= at - floor(at, MINUTES) <= MINUTE + SECOND for at in looks)


def test_an_instance_looks_again_soon_after_the_clock_was_set_back(stores: Stores) -> None:
    roll_up = RollUp(stores.main, DAY)
    assert not any(roll_up.is_due(at) for at in (NOW, NOW - DAY))
    assert roll_up.is_due(NOW - DAY + 2 * MINUTES)


def test_an_instance_that_counted_before_another_one_wrote_does_not_write(stores: Stores, clock: Clock) -> None:
    roll(stores)
    clock.move(MINUTES)
    slow, until = RollUp(stores.main, DAY), stores.roll_up.counted()[1][MINUTES]
    write(stores, run(NOW))
    roll(stores)
    slow._write(MINUTES, until, [until - MINUTES, until, until + MINUTES], {"worker": {}})
    assert kept(stores, MINUTES)[floor(NOW, MINUTES), "mailer"].runs == 1


def test_a_clock_that_was_set_back_leaves_each_run_counted_once(
    stores: Stores, charts: ChartHistory, clock: Clock
) -> None:
    write(stores, run(NOW - 50 * MINUTE), run(NOW - 10 * MINUTE))
    roll(stores)
    clock.move(-HOUR)
    write(stores, run(NOW - 50 * MINUTE))
    for _ in range(30):  # up to the same moment and on
        roll(stores)
        clock.move(MINUTES)
    assert charts.runs().total.runs == 3
    assert sum(tally.runs for (_, name), tally in kept(stores, MINUTES).items() if name == ALL) == 3


def test_after_an_outage_the_roll_up_catches_up_in_steps(stores: Stores, charts: ChartHistory, clock: Clock) -> None:
    roll(stores)
    clock.move(10 * DAY)
    write(stores, *(run(NOW + each * DAY) for each in range(10)))
    steps = 0
    while stores.roll_up.step():
        steps += 1
    assert steps == 10 * 24 // 5 - 1  # of six hours, the first was counted before
    assert charts.runs(span="14d").total.runs == 10


# -- charts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", SPANS)
def test_a_chart_has_each_run_of_its_span_before_and_after_the_roll_up(
    stores: Stores, charts: ChartHistory, clock: Clock, span: str
) -> None:
    chosen = random.Random(span)
    length, bar = SPANS[span].bars * SPANS[span].bar, SPANS[span].bar
    first = floor(NOW, bar) - length
    ends = [
        NOW - timedelta(milliseconds=chosen.randrange(int((NOW - first).total_seconds() * 1000))) for _ in range(300)
    ]
    write(stores, *(run(each, chosen.choice(["mailer", "sweeper"])) for each in ends), run(first - SECOND))
    roll(stores)
    expected = [sum(start <= each < start + bar for each in ends) for start in (first + n * bar for n in range(99))]
    chart = charts.runs(span=span)
    assert numbers(chart) == expected[: SPANS[span].bars + 1]
    assert chart.total.runs == 300
    assert (chart.gap, chart.is_cut) == (None, False)
    both = [numbers(charts.runs(worker, span)) for worker in ("mailer", "sweeper")]
    assert [sum(pair) for pair in zip(*both, strict=True)] == numbers(chart)


def test_the_runs_since_the_last_roll_up_are_in_the_bars_of_their_time(
    stores: Stores, charts: ChartHistory, clock: Clock
) -> None:
    roll(stores)
    clock.set(floor(NOW, MINUTES) + MINUTES + MINUTE)
    write(stores, run(clock.now - 2 * MINUTE), run(clock.now - SECOND))
    assert numbers(charts.runs(span="1h"))[-3:] == [0, 1, 1]


def test_before_the_first_roll_up_a_chart_says_which_time_is_not_counted(
    stores: Stores, charts: ChartHistory, clock: Clock
) -> None:
    write(stores, run(NOW - SECOND), run(NOW - 2 * HOUR))
    chart = charts.runs(span="24h")
    assert chart.total.runs == 1
    assert chart.gap == (chart.since, NOW - 2 * MINUTES)
    roll(stores)
    assert (charts.runs(span="24h").gap, charts.runs(span="24h").total.runs) == (None, 2)


def test_while_no_instance_rolls_up_a_chart_says_which_time_is_not_counted(
    stores: Stores, charts: ChartHistory, clock: Clock
) -> None:
    roll(stores)
    clock.move(2 * HOUR)
    assert charts.runs().gap == (floor(NOW, MINUTES), clock.now - 2 * MINUTES)


def test_a_chart_counts_a_limited_number_of_rows_itself(
    stores: Stores, charts: ChartHistory, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("background.tallies.charts._MOST_READ", 5)
    write(stores, *(run(NOW - SECOND, name) for name in "aaabbbccc"))
    roll(stores)
    assert (charts.runs().total.runs, charts.runs().is_cut) == (5, True)
    clock.move(MINUTES)
    roll(stores)
    assert (charts.runs().total.runs, charts.runs().is_cut) == (9, False)


def test_the_number_of_queries_does_not_depend_on_the_rows(stores: Stores, charts: ChartHistory, clock: Clock) -> None:
    def queries(read: Any) -> int:
        with statements(Engine) as seen:
            read()
        return len(seen)

    few = [queries(charts.runs), queries(charts.messages), queries(stores.roll_up.step)]
    write(stores, *(run(NOW - each * 7 * MINUTE, f"worker_{each % 50}") for each in range(500)))
    clock.move(MINUTES)
    assert [queries(charts.runs), queries(charts.messages)] == few[:2] == [3, 5]
    roll(stores)
    assert [queries(charts.runs), queries(charts.messages)] == [3, 5]


def test_every_count_reads_only_a_range_of_an_index(stores: Stores, charts: ChartHistory, clock: Clock) -> None:
    asked: list[tuple[str, Any]] = []

    def remember(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_more: Any) -> None:
        if statement.lstrip().startswith(("SELECT", "WITH")):
            asked.append((statement, parameters))

    roll(stores)
    clock.move(MINUTES)
    engine = stores.main.engine
    event.listen(engine, "before_cursor_execute", remember)
    stores.roll_up.step()
    charts.runs("mailer", "14d")
    charts.messages()
    event.remove(engine, "before_cursor_execute", remember)
    assert len(asked) >= 9
    with engine.connect() as connection:
        if not stores.main.on_sqlite:  # a few rows are read faster without the index
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        for statement, parameters in asked:
            explain = "EXPLAIN QUERY PLAN " if stores.main.on_sqlite else "EXPLAIN "
            plan = "\n".join(str(row[-1]) for row in connection.exec_driver_sql(explain + statement, parameters))
            assert not re.search(r"(SCAN|Seq Scan on) background_(executions|message|tallies)", plan), plan
