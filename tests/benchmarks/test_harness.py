"""The measure: turns, ratios, the file of figures, and work that was not done once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import CASES, main
from benchmarks.cases import limits
from benchmarks.harness.figures import Figure, NotDone, Setup, check_once, in_turns
from benchmarks.harness.results import entries, read, write

SETUP = Setup("sqlite", is_small=True, turns=2)


def test_each_way_is_measured_once_a_turn_and_every_second_turn_is_reversed() -> None:
    seen: list[str] = []

    def way(name: str) -> float:
        seen.append(name)
        return float(len(seen))

    values = in_turns(SETUP, "ways", {name: lambda name=name: way(name) for name in ("ours", "by hand")})

    assert sorted(seen[:2]) == sorted(seen[2:]) == ["by hand", "ours"]
    assert seen[:2] == seen[:1:-1]
    assert {name: len(each) for name, each in values.items()} == {"ours": 2, "by hand": 2}


def test_a_ratio_compares_values_of_the_same_turn_and_names_its_denominator() -> None:
    figure = Figure("handle", "messages/s", [10.0, 40.0, 30.0], "by hand", [20.0, 50.0, 300.0])

    assert figure.ratios == [0.5, 0.8, 0.1]
    assert "x0.5 (0.1 to 0.8) of by hand" in str(figure)


@pytest.mark.parametrize(("found", "different"), [(9, 9), (11, 10), (10, 9)])
def test_work_that_was_not_done_exactly_once_is_refused(found: int, different: int) -> None:
    check_once(10, 10, 10, "messages")
    with pytest.raises(NotDone, match="messages: expected 10 effects, each once"):
        check_once(10, found, different, "messages")


def test_the_file_keeps_the_figures_of_other_cases_and_engines(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    for case, value in (("claim", 1.0), ("limits", 2.0), ("claim", 3.0)):
        write(path, entries(case, SETUP, [Figure("rate", "a second", [value])]))

    assert [(each["case"], each["engine"], each["values"]) for each in read(path)] == [
        ("limits", "sqlite", [2.0]),
        ("claim", "sqlite", [3.0]),
    ]


def test_a_case_whose_work_was_not_done_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_setup: Setup) -> Iterator[Figure]:
        raise NotDone("a commit is missing")
        yield

    monkeypatch.setattr(limits, "run", run)
    result = CliRunner().invoke(main, ["limits", "--engine", "sqlite"])

    assert result.exit_code == 1
    assert "limits on sqlite: a commit is missing" in result.output


def test_each_case_is_a_command_and_says_its_purpose() -> None:
    listed = CliRunner().invoke(main, ["--help"]).output
    assert [case for case in (*CASES, "all") if f"  {case} " not in listed] == []


def test_the_limits_of_sqlite_are_measured_and_written(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    result = CliRunner().invoke(main, ["limits", "--engine", "sqlite", "--scale", "small", "--json", str(path)])

    assert result.exit_code == 0, result.output
    assert {each["name"] for each in read(path)} >= {"fdatasync", "round trip", "commit, synchronous FULL"}
