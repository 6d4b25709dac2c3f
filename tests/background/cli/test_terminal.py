"""The look of the commands in a terminal and in a pipe."""

import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import Result
from flask import Flask
from hypothesis import given
from hypothesis import strategies as st
from support.processes import flask, run, started

from background.cli.terminal import Screen, localised, table
from background.history.text import moment

CLOCK = datetime(2026, 11, 30, 12, tzinfo=UTC)
SECOND, HOUR, DAY = timedelta(seconds=1), timedelta(hours=1), timedelta(days=1)


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


# -- moments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distance", "text"),
    [
        (0 * SECOND, "now"),
        (12.9 * SECOND, "in 12 s"),
        (-59 * SECOND, "59 s ago"),
        (-60 * SECOND, "1 min ago"),
        (59 * 60 * SECOND, "in 59 min"),
        (HOUR, "14:00"),
        (-13 * HOUR, "00:00"),
        (-14 * HOUR, "yesterday 23:00"),
        (11 * HOUR, "tomorrow 00:00"),
        (-2 * DAY, "2026-11-28 13:00"),
        (-150 * DAY, "2026-07-03 14:00"),
    ],
)
def test_a_terminal_gets_the_distance_or_the_time_and_the_date_only_if_it_is_another(
    berlin: None, distance: timedelta, text: str
) -> None:
    assert Screen(CLOCK, 80).since(CLOCK + distance) == text


def test_a_tick_keeps_its_seconds_and_its_fraction(berlin: None) -> None:
    screen = Screen(CLOCK, 80)
    assert screen.tick(CLOCK + 90.25 * SECOND) == "13:01:30.25"
    assert screen.at(CLOCK + 90.25 * SECOND) == "13:01:30"
    assert (screen.tick(None), screen.since(None)) == ("-", "-")


def test_a_pipe_gets_whole_moments_that_name_their_zone(berlin: None) -> None:
    pipe = Screen(CLOCK, None)
    assert pipe.next(CLOCK + 0.5 * SECOND) == pipe.tick(CLOCK + 0.5 * SECOND) == "2026-11-30T13:00:00.500+01:00"
    assert pipe.since(CLOCK + 0.5 * SECOND) == pipe.at(CLOCK) == "2026-11-30T13:00:00+01:00"


def test_the_moments_of_a_sentence_are_in_the_shown_zone(berlin: None) -> None:
    assert localised("The tick 2026-07-01T10:00:00Z of 2026-11-30T12:00:00.500+00:00.") == (
        "The tick 2026-07-01T12:00:00+02:00 of 2026-11-30T13:00:00.500+01:00."
    )
    for other in ("2026-13-01T10:00:00Z", "12026-11-30T12:00:00Z", "2026-11-30T12:00:00+05:00", "2026-11-30"):
        assert localised(other) == other


def test_the_end_of_the_calendar_is_written_in_utc(berlin: None) -> None:
    assert moment(datetime.max.replace(tzinfo=UTC), None).startswith("9999-12-31T23:59:59")


# -- tables --------------------------------------------------------------------------------------

NAMES = ("name", "schedule", "state", "note")
ROW = ["passive_user_checker_worker", "every 10 minutes", "succeeded", "overdue since 14:05; disabled"]


def test_a_table_that_fits_has_one_line_for_each_row() -> None:
    assert table(NAMES, [ROW], 100) == table(NAMES, [ROW])


def test_a_long_note_stands_below_its_row() -> None:
    assert table(NAMES, [ROW, ["other", "", "failed", ""]], 70).splitlines() == [
        "NAME                         SCHEDULE          STATE",
        "passive_user_checker_worker  every 10 minutes  succeeded",
        "    overdue since 14:05; disabled",
        "other                                          failed",
    ]


def test_a_narrow_table_shortens_elastic_columns_and_leaves_out_spare_columns() -> None:
    assert table(("id", "payload"), [["7", "x" * 60]], 30, elastic=("payload",)).splitlines()[1] == f"7   {'x' * 25}…"
    assert table(NAMES, [ROW], 40, spare=("schedule",)).splitlines()[0].split() == ["NAME", "STATE"]


words = st.text("abcdefg_", min_size=1, max_size=12)
cells = st.lists(words, max_size=12).map(" ".join)


@given(st.lists(st.tuples(words, cells, cells, cells), min_size=1, max_size=5), st.integers(30, 150))
def test_a_table_of_any_cells_fits_and_keeps_each_word(rows: list[tuple[str, ...]], width: int) -> None:
    text = table(("a", "b", "c", "note"), rows, width)
    assert max(map(len, text.splitlines())) <= width
    if width >= 60:
        assert sorted(text.split()[-len(" ".join(sum(rows, ())).split()) :]) == sorted(" ".join(sum(rows, ())).split())


# -- a real terminal and a real pipe -------------------------------------------------------------

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
GREEN, RED = "\x1b[32m", "\x1b[31m"


Env = Callable[..., dict[str, str]]


def shown(env: dict[str, str], *arguments: str, columns: int = 80) -> list[str]:
    with started(flask("workers", *arguments), env, terminal=True, columns=columns) as process:
        assert process.wait() == 0, process.output
        return process.output.splitlines()


@pytest.mark.promise
@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_shows_the_list_in_its_width_and_in_colour(env: Env, columns: int) -> None:
    lines = shown(env(), "list", columns=columns)
    plain = [COLOUR.sub("", line) for line in lines]
    assert max(map(len, plain[1:])) <= columns
    assert plain[1] in ("Times are in CET.", "Times are in CEST.")
    assert ("SCHEDULE" in plain[2], "TOOK" in plain[2]) == (columns == 120, columns == 120)
    rows = {COLOUR.sub("", line).split()[0]: line for line in lines[3:]}
    assert f"{GREEN}succeeded" in rows["passive_user_checker_worker"]
    assert f"{RED}failed" in rows["morning_report_worker"]
    assert re.search(r" {2}20\d\d-\d\d-\d\d \d\d:00 {2}", COLOUR.sub("", rows["morning_report_worker"]))


@pytest.mark.promise
def test_a_note_that_is_longer_than_the_line_is_below_its_row(env: Env) -> None:
    lines = shown(env(NO_COLOR="1"), "history", "morning_report_worker", "--utc")
    assert "\x1b" not in "".join(lines)
    assert lines[0] == "Times are in UTC."
    assert max(map(len, lines)) <= 80
    assert lines[3].startswith("    ValueError: a report")


@pytest.mark.promise
def test_a_dumb_terminal_gets_no_colour(env: Env) -> None:
    assert "\x1b" not in "".join(shown(env(TERM="dumb"), "list"))


def test_a_pipe_gets_whole_lines_without_colour(env: Env) -> None:
    code, said = run(flask("workers", "history", "morning_report_worker"), env())
    header, row = said.splitlines()
    assert (code, "\x1b" in said) == (0, False)
    assert header.split() == ["TICK", "STATE", "ATTEMPT", "STARTED", "TOOK", "INSTANCE", "NOTE"]
    assert re.match(r"20\d\d-\d\d-\d\dT0[12]:00:00\+0[12]:00 +failed +1 ", row)


# -- zones ---------------------------------------------------------------------------------------


def printed(app: Flask, *arguments: str) -> Result:
    result = app.test_cli_runner().invoke(args=["workers", *arguments])
    assert result.exception is None, result.output
    return result


def test_each_command_can_show_utc(shop: Flask, berlin: None) -> None:
    for arguments in (
        ["list"],
        ["instances"],
        ["history", "morning_report_worker"],
        ["preview", "morning_report_worker"],
        ["why", "passive_user_checker_worker"],
        ["pause", "morning_report_worker"],
        ["resume", "morning_report_worker"],
        ["reschedule", "morning_report_worker", "2 h"],
        ["trigger", "passive_user_checker_worker"],
        ["repair"],
    ):
        assert not re.search(r"T\d\d:\d\d:[\d.]+Z", printed(shop, *arguments).stdout), arguments
        assert not re.search(r"\+0[12]:00", printed(shop, *arguments, "--utc").stdout), arguments


def test_a_moment_without_a_zone_is_read_in_the_shown_zone(shop: Flask, berlin: None) -> None:
    ask = ("why", "morning_report_worker", "--at", "2999-07-01T12:34")
    local, utc = printed(shop, *ask), printed(shop, *ask, "--utc")
    assert local.stderr.startswith("2999-07-01T12:34 names no time zone, so it is taken as CE")
    assert utc.stderr == "2999-07-01T12:34 names no time zone, so it is taken as UTC.\n"
    assert re.search(r"The tick 2999-06-27T0[12]:00:00\+0[12]:00 of", local.stdout)
    assert "The tick 2999-06-27T00:00:00Z of" in utc.stdout
    assert printed(shop, *ask[:3], "2999-06-27T02:30").stdout.startswith("The tick 2999-06-27T02:00:00+02:00 of")
    assert printed(shop, *ask[:3], "2999-06-27T01:30").stdout.startswith("The tick 2999-06-20T02:00:00+02:00 of")


def test_json_is_in_utc_in_each_zone(shop: Flask, berlin: None) -> None:
    assert '00:00:00Z"' in printed(shop, "history", "morning_report_worker", "--json").stdout
    assert "+0" not in printed(shop, "history", "morning_report_worker", "--json").stdout
