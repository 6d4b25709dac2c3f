"""`flask workers list --watch`: it is shown until a signal, and survives a database that is away."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from flask import Flask
from support.processes import Process, flask, run, started

from background.cli.watch import fitting

Env = Callable[..., dict[str, str]]
Watching = Callable[..., AbstractContextManager[Process]]


@pytest.fixture
def watching(env: Env) -> Watching:
    return lambda terminal: started(flask("workers", "list", "--watch", "0.1"), env(), terminal=terminal)


@pytest.mark.promise
@pytest.mark.parametrize("terminal", [True, False])
def test_a_watched_list_is_shown_again_until_a_signal(watching: Watching, terminal: bool) -> None:
    with watching(terminal) as process:
        process.wait_for("morning_report_worker", times=3)
        assert ("\x1b[2J" in process.output) is terminal  # the screen is cleared
        if terminal:
            process.type("\x03")
        else:
            process.signal_group(15)
        assert process.wait() == 0
        assert "Traceback" not in process.output
        assert "Aborted" not in process.output


@pytest.mark.promise
@pytest.mark.parametrize("terminal", [True, False])
def test_a_watched_list_survives_a_database_that_is_away(shop: Flask, watching: Watching, terminal: bool) -> None:
    engine = shop.extensions["background_workers"].stores.main.engine

    def rename(old: str, new: str) -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"ALTER TABLE {old} RENAME TO {new}")

    with watching(terminal) as process:
        process.wait_for("morning_report_worker", times=2)
        rename("background_executions", "gone")
        process.wait_for(r"\d\d:\d\d:\d\d\S+: The database ", times=2)
        rename("gone", "background_executions")
        seen = len(re.findall("Messages|morning_report_worker", process.output))
        process.wait_for("morning_report_worker", times=seen + 2)
        process.signal_group(2)
        assert process.wait() == 0
        assert "Traceback" not in process.output


@pytest.mark.promise
def test_a_closed_pipe_ends_a_watched_list_quietly(env: Env) -> None:
    code, said = run(["bash", "-c", f"{' '.join(flask('workers', 'list', '--watch', '0.1'))} | head -n 2"], env())
    assert (code, len(said.splitlines())) == (0, 2), said


@pytest.mark.promise
def test_a_database_that_is_away_at_the_start_is_an_error(env: Env, tmp_path: Path) -> None:
    code, said = run(flask("workers", "list", "--watch"), env(DATABASE_URL=f"sqlite:///{tmp_path / 'none.sqlite'}"))
    assert code == 1
    assert said.startswith("Error: ")


@pytest.mark.parametrize("seconds", ["0", "often", "nan", "1e9"])
def test_a_wrong_number_of_seconds_is_one_sentence(shop: Flask, seconds: str) -> None:
    result = shop.test_cli_runner().invoke(args=["workers", "list", "--watch", seconds])
    assert result.exit_code == 2
    assert result.stderr == f"Error: --watch is {seconds!r}; expected a number of seconds from 0.1 to 86400.\n"


def test_a_picture_that_is_higher_than_the_terminal_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "5")
    monkeypatch.setenv("COLUMNS", "10")
    assert fitting(["\x1b[31m123456789\x1b[0m", "", "2", "3"]) == ["\x1b[31m123456789\x1b[0m", "", "2", "3"]
    assert fitting(["1", "2", "3", "4", "5"]) == ["1", "2", "3", "... and 2 more lines"]
    assert fitting(["a line of two rows", "2", "3", "4"]) == ["a line of two rows", "2", "... and 2 more lines"]
