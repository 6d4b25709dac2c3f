"""Ticks, compared with a clock that is walked minute by minute and knows only the rule."""

import subprocess
import sys
import time
from bisect import bisect_left, bisect_right
from datetime import UTC, date, datetime, timedelta
from functools import cache
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from background.errors import InvalidSchedule
from background.schedule.cron import Cron
from background.schedule.parsing import make_schedule, parse_schedule, typed_schedule
from background.schedule.periods import Every, Schedule

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
MICROSECOND = timedelta(microseconds=1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NAIVE = datetime(2025, 1, 1)  # noqa: DTZ001 - it must be refused


def repeatable(examples: int) -> settings:
    """Return settings that give the same examples in every run, however slow the machine."""
    slow = [HealthCheck.too_slow]
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=slow)


JUMPS = {  # the moments at which the clocks of a zone jump, in UTC
    "Berlin, spring": ("Europe/Berlin", datetime(2025, 3, 30, 1, tzinfo=UTC)),
    "Berlin, autumn": ("Europe/Berlin", datetime(2025, 10, 26, 1, tzinfo=UTC)),
    "Cairo, midnight does not exist": ("Africa/Cairo", datetime(2025, 4, 24, 22, tzinfo=UTC)),
    "Cairo, back over midnight": ("Africa/Cairo", datetime(2025, 10, 30, 21, tzinfo=UTC)),
    "Lord Howe, half an hour on": ("Australia/Lord_Howe", datetime(2025, 10, 4, 15, 30, tzinfo=UTC)),
    "Lord Howe, half an hour back": ("Australia/Lord_Howe", datetime(2025, 4, 5, 15, tzinfo=UTC)),
    "Sao Paulo, midnight does not exist": ("America/Sao_Paulo", datetime(2018, 11, 4, 3, tzinfo=UTC)),
    "Sao Paulo, back over midnight": ("America/Sao_Paulo", datetime(2018, 2, 18, 2, tzinfo=UTC)),
    "Troll, two hours on": ("Antarctica/Troll", datetime(2025, 3, 30, 1, tzinfo=UTC)),
    "Troll, two hours back": ("Antarctica/Troll", datetime(2025, 10, 26, 1, tzinfo=UTC)),
    "Casey, three hours back": ("Antarctica/Casey", datetime(2010, 3, 4, 15, tzinfo=UTC)),
    "Apia, a day does not exist": ("Pacific/Apia", datetime(2011, 12, 30, 10, tzinfo=UTC)),
    "New York, autumn": ("America/New_York", datetime(2025, 11, 2, 6, tzinfo=UTC)),
    "Kathmandu, no jump": ("Asia/Kathmandu", datetime(2025, 3, 30, 1, tzinfo=UTC)),
}
EXPRESSIONS = [
    "30 2 * * *",
    "0 0 * * *",
    "0,15,30,45 2 * * *",
    "15 1-3 * * *",
    "*/10 2 * * *",
    "*/10 0 * * FRI",
    "*/20 5 * * *",
    "30 */2 * * *",
    "0 * * * *",
    "7-59/13 * * * *",
    "59 23 * * *",
    "0 0 30 12 *",
    "30 2 26 10 SUN",
    "* * * * *",
]


# The oracle


def values(field: str, low: int, high: int) -> set[int]:
    found: set[int] = set()
    for term in field.split(","):
        span, _, step = term.partition("/")
        first, _, last = (f"{low}-{high}" if span == "*" else span).partition("-")
        found |= set(range(int(first), int(last or first) + 1, int(step or 1)))
    return found


def matches_day(expression: str, day: date) -> bool:
    *_, days, months, weekdays = expression.replace("SUN", "0").replace("MON", "1").replace("FRI", "5").split()
    if day.month not in values(months, 1, 12):
        return False
    by_day = day.day in values(days, 1, 31)
    by_weekday = day.isoweekday() in values(weekdays, 0, 7) or day.isoweekday() % 7 in values(weekdays, 0, 7)
    return (by_day and by_weekday) if "*" in (days[0], weekdays[0]) else (by_day or by_weekday)


def walk(expression: str, jump: str) -> list[datetime]:
    """Return the ticks within eight hours of the jump: read the clock every minute, and apply the rule."""
    minutes, hours = (values(f, 0, high) for f, high in zip(expression.split(), (59, 23), strict=False))
    fixed = "*" not in (expression.split()[0][0], expression.split()[1][0])
    day = cache(lambda d: matches_day(expression, d))

    def matches(wall: datetime) -> bool:
        return wall.minute in minutes and wall.hour in hours and day(wall.date())

    ticks, shown = [], clock(jump)
    reached = shown[0][1]
    for instant, wall in shown[1:]:
        passed = [reached + n * MINUTE for n in range(1, (wall - reached) // MINUTE + 1)]  # empty if it went back
        if any(map(matches, passed)) if fixed else matches(wall):
            ticks.append(instant)
        reached = max(reached, wall)
    return ticks


@cache
def clock(jump: str) -> list[tuple[datetime, datetime]]:
    zone, at = JUMPS[jump]
    instants = [at + n * MINUTE for n in range(-480, 481)]
    return [(instant, instant.astimezone(ZoneInfo(zone)).replace(tzinfo=None)) for instant in instants]


def assert_ticks_as_walked(expression: str, jump: str) -> None:
    schedule, start, end = Cron(expression, JUMPS[jump][0]), clock(jump)[0][0], clock(jump)[-1][0]
    expected = walk(expression, jump)
    forward, backward, at = [], [], start
    while (at := schedule.next(at)) <= end:
        forward.append(at)
    at = end
    while (at := schedule.previous(at)) > start:
        backward.append(at)
        at -= MICROSECOND
    assert forward == expected
    assert backward[::-1] == expected


@pytest.mark.parametrize("jump", JUMPS)
def test_a_cron_ticks_around_a_jump_as_the_walked_clock_does(jump: str) -> None:
    for expression in EXPRESSIONS:
        assert_ticks_as_walked(expression, jump)


minute_fields = st.sampled_from(["0", "30", "59", "0,30", "10-50/20", "*/15", "*/7", "*", "0-59"])
hour_fields = st.sampled_from(["0", "1", "2", "3", "23", "0,2", "1-3", "22-23", "0-23", "*/2", "*/5", "*"])
day_fields = st.sampled_from(["*", "*", "*", "1-31", "*/2", "26", "30,31"])
weekday_fields = st.sampled_from(["*", "*", "*", "SUN", "FRI,SUN", "1-5", "7"])
crons = st.builds("{} {} {} * {}".format, minute_fields, hour_fields, day_fields, weekday_fields)


@repeatable(60)
@given(crons, st.sampled_from(list(JUMPS)))
def test_any_cron_ticks_around_any_jump_as_the_walked_clock_does(expression: str, jump: str) -> None:
    assert_ticks_as_walked(expression, jump)


@repeatable(200)
@given(crons, st.sampled_from(list(JUMPS)), st.timedeltas(-5 * HOUR, 5 * HOUR))
def test_next_and_previous_agree_with_the_walked_clock_at_any_instant(
    expression: str, jump: str, offset: timedelta
) -> None:
    zone, jumps_at = JUMPS[jump]
    schedule, ticks, at = Cron(expression, zone), walk(expression, jump), jumps_at + offset
    later, earlier = ticks[bisect_right(ticks, at) :], ticks[: bisect_right(ticks, at)]
    start, end = clock(jump)[0][0], clock(jump)[-1][0]
    assert schedule.next(at) == later[0] if later else schedule.next(at) > end
    assert schedule.previous(at) == earlier[-1] if earlier else schedule.previous(at) <= start


@pytest.mark.parametrize(
    ("expression", "zone", "after", "expected"),
    [
        ("30 2 * * *", "Europe/Berlin", "2025-03-29T12:00", ["03-30T01:00", "03-31T00:30"]),
        ("30 2 * * *", "Europe/Berlin", "2025-10-25T12:00", ["10-26T00:30", "10-27T01:30"]),
        ("0,30 2 * * *", "Europe/Berlin", "2025-03-29T12:00", ["03-30T01:00", "03-31T00:00", "03-31T00:30"]),
        ("0 0 * * *", "Africa/Cairo", "2025-04-24T12:00", ["04-24T22:00", "04-25T21:00"]),
        ("15 2 * * *", "Australia/Lord_Howe", "2025-10-04T00:00", ["10-04T15:30", "10-05T15:15"]),
        ("45 1 * * *", "Australia/Lord_Howe", "2025-04-05T00:00", ["04-05T14:45", "04-06T15:15"]),
        ("*/30 2 * * *", "Europe/Berlin", "2025-03-29T12:00", ["03-31T00:00", "03-31T00:30"]),
        ("*/30 2 * * *", "Europe/Berlin", "2025-10-25T12:00", ["10-26T00:00", "10-26T00:30", "10-26T01:00"]),
    ],
)
def test_a_cron_ticks_when_the_rule_says(expression: str, zone: str, after: str, expected: list[str]) -> None:
    schedule, at = Cron(expression, zone), datetime.fromisoformat(f"{after}Z")
    for tick in expected:
        at = schedule.next(at)
        assert at == datetime.fromisoformat(f"2025-{tick}Z")
        assert schedule.previous(at) == at


def test_a_cron_read_in_the_repeated_hour_neither_returns_the_past_nor_omits_its_tick() -> None:
    schedule = Cron("30 2 * * *", "Europe/Berlin")
    second_ten_past_two = datetime(2025, 10, 26, 1, 10, tzinfo=UTC)
    assert schedule.next(second_ten_past_two) == datetime(2025, 10, 27, 1, 30, tzinfo=UTC)
    assert schedule.previous(second_ten_past_two) == datetime(2025, 10, 26, 0, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    "expression",
    [
        "0 0 29 2 *",
        "0 0 1 1 *",
        "30 2 1-7 * MON",
        "30 2 */2 * MON",
        "59 23 31 * *",
        "0 12 13 * FRI",
        "0 0 30 4,6 *",
    ],
)
def test_a_cron_matches_the_dates_of_a_walked_calendar(expression: str) -> None:
    minute, hour = map(int, expression.split()[:2])
    midnights = [datetime(2000, 1, 1, tzinfo=UTC) + n * DAY for n in range(10_000)]
    expected = [m + hour * HOUR + minute * MINUTE for m in midnights if matches_day(expression, m.date())]
    schedule = Cron(expression)
    first, last = expected[0], expected[-1]
    assert [first, *map(schedule.next, expected[:-1])] == expected
    assert [*(schedule.previous(tick - MICROSECOND) for tick in expected[1:]), last] == expected


# Rules for any schedule at any instant

periods = st.one_of(
    st.timedeltas(timedelta(milliseconds=1), 366 * DAY),
    st.sampled_from([timedelta(seconds=0.1), timedelta(seconds=1), 10 * MINUTE, DAY, 7 * DAY, 366 * DAY]),
)
rare = st.sampled_from(["0 0 29 2 *", "0 0 1 1 *", "0 0 * 2 MON#5", "30 2 L * *", "* 2 29 2 *", "0 0 29 2 */7"])
zones = st.sampled_from(sorted({zone for zone, _ in JUMPS.values()} | {"UTC"}))
schedules = st.one_of(st.builds(Every, periods), st.builds(Cron, st.one_of(crons, rare), zones))
instants = st.one_of(
    st.builds(EPOCH.__add__, st.timedeltas(timedelta(), 180 * 365 * DAY)),
    st.builds(lambda jump, offset: jump[1] + offset, st.sampled_from(list(JUMPS.values())), st.timedeltas(-DAY, DAY)),
)


@repeatable(250)
@given(schedules, instants, st.floats(0, 1, exclude_max=True))
@example(Every(DAY), EPOCH, 0.0)
@example(Every(DAY), EPOCH - MICROSECOND, 0.5)
@example(Cron("30 2 * * *", "Europe/Berlin"), datetime(2025, 3, 30, 1, tzinfo=UTC), 0.0)
def test_next_and_previous_enclose_any_instant_with_no_tick_between(
    schedule: Schedule, at: datetime, part: float
) -> None:
    previous, following = schedule.previous(at), schedule.next(at)
    assert previous <= at < following
    assert previous.tzinfo is following.tzinfo is UTC
    assert schedule.next(previous) == following
    assert schedule.previous(following) == following
    assert schedule.previous(following - MICROSECOND) == previous
    between = previous + int((following - previous) // MICROSECOND * part) * MICROSECOND
    assert (schedule.previous(between), schedule.next(between)) == (previous, following)


@repeatable(100)
@given(periods, instants)
def test_a_period_ticks_at_whole_multiples_since_the_epoch(period: timedelta, at: datetime) -> None:
    since = Every(period).previous(at) - EPOCH
    assert since % period == timedelta()


def test_the_ticks_that_follow_end_with_the_calendar() -> None:
    daily, end = Every(DAY), datetime.max.replace(tzinfo=UTC)
    assert daily.following(EPOCH, 3) == [EPOCH + DAY, EPOCH + 2 * DAY, EPOCH + 3 * DAY]
    assert daily.following(end - 2 * DAY, 5) == [daily.previous(end) - DAY, daily.previous(end)]


def test_instants_of_other_zones_are_accepted_and_returned_in_utc() -> None:
    at = datetime(2025, 7, 1, 12, 5, tzinfo=ZoneInfo("Asia/Kathmandu"))
    for schedule in (Every(5 * MINUTE), Cron("*/10 * * * *", "Asia/Kathmandu")):
        assert schedule.next(at) == datetime(2025, 7, 1, 12, 10, tzinfo=at.tzinfo) == schedule.next(at.astimezone(UTC))
        assert schedule.previous(at).tzinfo is UTC


@pytest.mark.parametrize("schedule", [Every(DAY), Cron("0 0 * * *")])
def test_a_naive_instant_is_refused(schedule: Schedule) -> None:
    with pytest.raises(TypeError, match="offset-naive"):
        schedule.next(NAIVE)
    with pytest.raises(TypeError, match="offset-naive"):
        schedule.previous(NAIVE)


@pytest.mark.parametrize("expression", ["0 0 1 1 *", "0 0 29 2 *", "0 0 * 2 MON#5", "* 2 29 2 *", "* * * * *"])
def test_the_rarest_and_the_densest_cron_answer_in_milliseconds(expression: str) -> None:
    schedule = Cron(expression, "Europe/Berlin")
    for at in (datetime(2026, 3, 1, tzinfo=UTC), datetime(2025, 10, 26, 0, 30, tzinfo=UTC)):
        for ask in (schedule.next, schedule.previous):
            assert min(seconds_of(ask, at) for _ in range(10)) < 0.01


def seconds_of(ask, at: datetime) -> float:
    started = time.perf_counter()
    ask(at)
    return time.perf_counter() - started


# Texts


@repeatable(100)
@given(schedules)
def test_a_schedule_equals_the_schedule_read_from_its_text(schedule: Schedule) -> None:
    read = parse_schedule(str(schedule))
    assert read == schedule
    assert (type(read), hash(read), str(read)) == (type(schedule), hash(schedule), str(schedule))
    assert "\n" not in str(schedule)


@pytest.mark.parametrize(
    ("schedule", "text", "words"),
    [
        (Every(10 * MINUTE), "every 600s", "every 10 minutes"),
        (Every(MINUTE), "every 60s", "every minute"),
        (Every(timedelta(seconds=0.5)), "every 0.5s", "every 0.5 seconds"),
        (Every(timedelta(seconds=1)), "every 1s", "every second"),
        (Every(timedelta(seconds=90)), "every 90s", "every 90 seconds"),
        (Every(36 * HOUR), "every 129600s", "every 36 hours"),
        (Every(7 * DAY), "every 604800s", "every 7 days"),
        (Every(timedelta(milliseconds=1)), "every 0.001s", "every 0.001 seconds"),
        (
            Cron("30 2 * * *", "Europe/Berlin"),
            "cron 30 2 * * * Europe/Berlin",
            "at 30 2 * * * (Europe/Berlin)",
        ),
        (Cron("  0  9 * *\tmon-fri "), "cron 0 9 * * MON-FRI UTC", "at 0 9 * * MON-FRI (UTC)"),
    ],
)
def test_a_schedule_has_a_text_for_the_database_and_words_for_people(schedule: Schedule, text: str, words: str) -> None:
    assert (str(schedule), schedule.describe()) == (text, words)


def test_schedules_of_one_text_are_one_object() -> None:
    assert len({Every(MINUTE), Every(timedelta(seconds=60)), Cron("0 0 * * mon"), Cron("0 0 * * MON", "UTC")}) == 2
    assert Every(MINUTE) != "every 60s"


def test_a_schedule_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Every(MINUTE).period = HOUR  # type: ignore[misc]


@pytest.mark.parametrize("zone", [None, "UTC", UTC, ZoneInfo("UTC")])
def test_a_worker_declares_a_cron_with_or_without_a_zone(zone) -> None:
    assert make_schedule("sweep", None, "0 0 * * *", zone) == Cron("0 0 * * *", "UTC")
    assert make_schedule("sweep", MINUTE, None, None) == Every(MINUTE)


# Refusals


@pytest.mark.parametrize(
    ("period", "cron", "zone", "says"),
    [
        (None, None, None, "neither a period nor a cron: write period = timedelta(minutes=10)"),
        (DAY, "0 0 * * *", None, "both a period (1 day, 0:00:00) and a cron ('0 0 * * *'): keep one"),
        (600, None, None, "period 600 is a number: write timedelta(seconds=600)"),
        (0.5, None, None, "write timedelta(seconds=0.5)"),
        ("10m", None, None, "period '10m' is not a timedelta: write timedelta(minutes=10)"),
        (timedelta(), None, None, "period 0:00:00 is out of range: expected a millisecond to 366 days"),
        (-MINUTE, None, None, "period -1 day, 23:59:00 is out of range"),
        (timedelta(microseconds=999), None, None, "period 0:00:00.000999 is out of range"),
        (367 * DAY, None, None, "or a cron for rarer dates"),
        (DAY, None, "Europe/Berlin", "timezone 'Europe/Berlin' has no use without a cron: remove it"),
        (
            None,
            "",
            None,
            "cron '' has 0 field(s): expected five (minute, hour, day-of-month, month, day-of-week)",
        ),
        (None, "@daily", None, "cron '@daily' has 1 field(s): expected five"),
        (None, "@hourly", None, "month, day-of-week); write '0 * * * *'."),
        (None, "@every 5m", None, "write a period instead, such as period = timedelta(minutes=5)."),
        (None, "@reboot", None, "a start of the host is not a tick"),
        (
            None,
            "CRON_TZ=Europe/Berlin 0 6 * * mon",
            None,
            "begins with a time zone: expected the five fields only; write cron = '0 6 * * mon' and "
            "timezone = 'Europe/Berlin'.",
        ),
        (None, "TZ=UTC */5 * * * *", None, "write cron = '*/5 * * * *' and timezone = 'UTC'."),
        (
            None,
            "*/90 * * * *",
            None,
            "cron '*/90 * * * *' has the minute '*/90', a step beyond the field: expected a step of at most 59; "
            "write period = timedelta(minutes=90) or the first value alone, '0'.",
        ),
        (
            None,
            "0 8-18/36 * * *",
            None,
            "has the hour '8-18/36', a step beyond the field: expected a step",
        ),
        (None, "0 0 1,5/32 * *", None, "has the day-of-month '1,5/32', a step beyond the field"),
        (None, "0 0 1 */13 *", None, "expected a step of at most 12; write the first value alone, '1'."),
        (None, "0 0 * * */8", None, "has the day-of-week '*/8', a step beyond the field"),
        (None, "0 22-6 * * *", None, "expected 0-23; the range goes downwards, so write '22-23,0-6'."),
        (None, "50-10 * * * *", None, "the range goes downwards, so write '50-59,0-10'."),
        (None, "0 22-6/2 * * *", None, "the range goes downwards, so write '22,0,2,4,6'."),
        (None, "0 0 1 NOV-FEB *", None, "the range goes downwards, so write 'NOV-DEC,JAN-FEB'."),
        (None, "0 0 * * FRI-MON", None, "the range goes downwards, so write 'FRI-SAT,SUN-MON'."),
        (None, f"{','.join(['1'] * 100)} * * * *", None, "is 207 characters long: expected at most 150"),
        (None, 5, None, "cron 5 is not a string: write '30 2 * * *'"),
        (None, "60 2 * * *", None, "cron '60 2 * * *' has the minute '60': expected 0-59"),
        (None, "0 2 * foo *", None, "has the month 'FOO': expected 1-12 or JAN-DEC"),
        (None, "0 0 * * FRI-MON", None, "has the day-of-week 'FRI-MON': expected 0-7 or SUN-SAT"),
        (
            None,
            "0 0/10 * * * ?",
            None,
            "has 6 fields, the first for seconds: expected five; write '0/10 * * * *'",
        ),
        (None, "0 30 2 ? * 2-6", None, "write '30 2 * * 1-5'"),
        (
            None,
            "0 0 2 ? * MON#1 2025",
            None,
            "has 7 fields, the first for seconds: expected five; write '0 2 * * MON#1'",
        ),
        (
            None,
            "*/10 * * * * *",
            None,
            "for less than a minute write a period, such as timedelta(seconds=10)",
        ),
        (None, "0 2 * * * root", None, "has 6 fields, the first for seconds: expected five (minute,"),
        (
            None,
            "0 0 30 2 *",
            None,
            "has the day-of-month '30': expected 1-31 (or L, the last) and a day that one of",
        ),
        (
            None,
            "0 0 */31 * MON#2",
            None,
            "cron '0 0 */31 * MON#2' never fires in UTC: expected a date that exists",
        ),
        (None, "* 2 * 3 0L", "Europe/Berlin", "cron '* 2 * 3 0L' never fires in Europe/Berlin"),
        (
            None,
            "0 0 * * *",
            "Europe/Berln",
            "timezone 'Europe/Berln' is not in the time zone database. Did you mean 'Europe/Berlin'?",
        ),
        (None, "0 0 * * *", "europe/berlin", "Did you mean 'Europe/Berlin'?"),
        (None, "0 0 * * *", "Europe", "timezone 'Europe' is not"),
        (None, "0 0 * * *", "", "timezone '' is not"),
        (None, "0 0 * * *", "../etc/passwd", "timezone '../etc/passwd' is not"),
    ],
)
def test_a_wrong_schedule_is_refused_with_the_worker_the_value_and_the_remedy(period, cron, zone, says: str) -> None:
    with pytest.raises(InvalidSchedule) as refused:
        make_schedule("sweep", period, cron, zone)
    assert str(refused.value).startswith("Worker 'sweep': ")
    assert says in str(refused.value)
    assert str(refused.value)[-1] in ".?"


@pytest.mark.parametrize(
    "text",
    ["", "every", "every 0s", "every 1e3s", "every 99999999999s", "cron", "cron 0 0 * * * Mars", "0 0 * * *"],
)
def test_a_stored_text_that_is_not_a_schedule_is_refused(text: str) -> None:
    with pytest.raises(InvalidSchedule, match=r"^The stored schedule '.*' cannot be used: "):
        parse_schedule(text)


def test_a_schedule_without_a_cron_does_not_import_the_cron_library() -> None:
    code = (
        "import sys; from datetime import timedelta; from background.schedule.periods import Every; "
        "str(Every(timedelta(1))); sys.exit('cronsim' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_walked_clock_itself_jumps_at_the_right_moments() -> None:
    """Check the oracle, without which the tests above would prove nothing."""
    for name in set(JUMPS) - {"Kathmandu, no jump"}:
        at = bisect_left([instant for instant, _ in clock(name)], JUMPS[name][1])
        assert clock(name)[at][1] - clock(name)[at - 1][1] != MINUTE, name


@pytest.mark.parametrize("text", ["@hourly", "TZ=UTC 0 0 * * *", "*/90 * * * *", "0 22-6 * * *"])
def test_an_entered_cron_is_refused_in_the_same_words_as_a_declared_cron(text: str) -> None:
    with pytest.raises(InvalidSchedule) as typed:
        typed_schedule(text)
    with pytest.raises(InvalidSchedule) as declared:
        make_schedule("sample", None, text, None)
    assert str(declared.value) == f"Worker 'sample': {typed.value}"


def test_a_stored_schedule_with_a_step_beyond_its_field_keeps_its_meaning() -> None:
    schedule = parse_schedule("cron */90 * * * * UTC")
    assert schedule.next(EPOCH) == EPOCH + HOUR
