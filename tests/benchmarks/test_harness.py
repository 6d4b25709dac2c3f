"""The measure: turns, ratios, the file of figures, and work that was not done once."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import CASES, main
from benchmarks.cases import limits
from benchmarks.harness import document
from benchmarks.harness.figures import Figure, NotDone, Setup, check_once, in_turns
from benchmarks.harness.results import about, entries, read, write
from benchmarks.peers import environment
from tests.books.documents import blocks, text

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
    figure = Figure("handle", "messages/s", [10.0, 40.0, 30.0], "hand-written SQL", [20.0, 50.0, 300.0])

    assert figure.ratios == [0.5, 0.8, 0.1]
    assert "0.5 (0.1 to 0.8) times hand-written SQL (50 messages/s)" in str(figure)


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


def test_a_run_of_one_peer_keeps_the_figures_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    of_two = [Figure("handle", "a second", [1.0], peer, [2.0]) for peer in ("celery", "pgqueuer")]
    write(path, entries("peers", SETUP, of_two))
    write(
        path, entries("peers", SETUP, [Figure("handle", "a second", [3.0], "pgqueuer", [2.0])]), keeps_other_peers=True
    )

    assert [(each["of"], each["values"]) for each in read(path)] == [("celery", [1.0]), ("pgqueuer", [3.0])]


def test_one_peer_is_measured_alone_and_a_database_without_it_has_no_figures() -> None:
    result = CliRunner().invoke(main, ["peers", "--engine", "sqlite", "--only", "pgqueuer"])

    assert result.exit_code == 0
    assert "has no figures on this database" in result.output


def test_a_case_whose_work_was_not_done_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_setup: Setup) -> Iterator[Figure]:
        raise NotDone("a commit is missing")
        yield

    monkeypatch.setattr(limits, "run", run)
    result = CliRunner().invoke(main, ["limits", "--engine", "sqlite"])

    assert result.exit_code == 1
    assert "limits on sqlite: a commit is missing" in result.output


def test_a_file_in_a_missing_folder_is_refused_before_the_measurement(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["limits", "--json", str(tmp_path / "missing" / "figures.json")])

    assert result.exit_code == 2
    assert "there is no folder" in result.output


FIGURE = Figure("rate", "a second", [1.0])
FULL = Setup("sqlite", is_small=False, turns=1)


def test_small_figures_never_replace_full_ones(tmp_path: Path) -> None:
    write(file := tmp_path / "figures.json", entries("limits", FULL, [FIGURE]))
    written = file.read_text()
    result = CliRunner().invoke(main, ["all", "--scale", "small", "--json", str(file)])

    assert result.exit_code == 2
    assert "has figures of the case 'limits' at the full scale" in result.output
    assert file.read_text() == written


def test_small_figures_are_neither_drawn_nor_filled_in(tmp_path: Path) -> None:
    write(file := tmp_path / "figures.json", entries("claim", FULL, [FIGURE]) + entries("limits", SETUP, [FIGURE]))
    result = CliRunner().invoke(main, ["plot", str(file)])

    assert result.exit_code == 2
    assert "has figures of the case 'limits' at the small scale" in result.output


def test_a_case_without_figures_leaves_the_file_alone(tmp_path: Path) -> None:
    write(file := tmp_path / "figures.json", entries("peers", FULL, [FIGURE]))
    written = file.read_text()
    result = CliRunner().invoke(
        main, ["peers", "--engine", "sqlite", "--only", "pgqueuer", "--turns", "1", "--json", str(file)]
    )

    assert result.exit_code == 0, result.output
    assert file.read_text() == written


def test_the_page_says_from_when_to_when_the_figures_were_measured(tmp_path: Path) -> None:
    [first] = entries("limits", FULL, [FIGURE])
    write(file := tmp_path / "figures.json", [first | {"measured_at": "2026-01-02 03:04 UTC"}])
    assert about(file).startswith("Measured at 2026-01-02 03:04 UTC on ")
    write(file, [first | {"case": "claim", "measured_at": "2026-01-03 04:05 UTC"}])
    assert about(file).startswith("Measured from 2026-01-02 03:04 UTC to 2026-01-03 04:05 UTC on ")
    assert re.search(r"SQLite 3\.\d+\.\d+ and PostgreSQL \d+\.$", about(file))


@pytest.mark.parametrize("command", ["record", "plot"])
def test_peers_that_pip_cannot_install_are_named_before_the_measurement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    monkeypatch.setattr(environment, "FOLDER", tmp_path / "peers")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    result = CliRunner().invoke(main, [command])

    assert result.exit_code == 1
    assert "pip could not install requirements-bench.txt" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("written", ["", "{", "[]", "{}", '{"figures": [{"case": "claim"}]}'])
@pytest.mark.parametrize("command", [["limits", "--json"], ["plot"]])
def test_a_file_without_figures_is_refused_at_once(tmp_path: Path, written: str, command: list[str]) -> None:
    (file := tmp_path / "figures.json").write_text(written)
    result = CliRunner().invoke(main, [*command, str(file)])

    assert result.exit_code == 2
    assert "has no figures of a run" in result.output
    assert file.read_text() == written


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_setup: Setup) -> Iterator[Figure]:
        raise ModuleNotFoundError("No module named 'server'", name="server")
        yield

    monkeypatch.setattr(limits, "run", run)
    result = CliRunner().invoke(main, ["limits", "--engine", "sqlite"])

    assert result.exit_code == 1
    assert "'server' is missing; expected the packages of requirements-dev.txt" in result.output


def test_each_case_is_a_command_and_says_its_purpose() -> None:
    listed = CliRunner().invoke(main, ["--help"]).output
    assert [case for case in (*CASES, "all") if f"  {case} " not in listed] == []


def test_each_command_of_the_page_is_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Check the commands of docs/performance.md. No command is executed."""
    (tmp_path / "benchmarks").mkdir()
    write(tmp_path / "benchmarks" / "figures.json", [])
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("docs/performance.md") for line in block.splitlines()]
    lines += re.findall(r"`(python -m benchmarks [^`]+)`", text("docs/performance.md"))
    assert len(lines) > 10
    for line in lines:
        python, dash_m, module, name, *arguments = line.split()
        assert (python, dash_m, module) == ("python", "-m", "benchmarks")
        main.commands[name].make_context(name, arguments)


def test_the_tables_of_the_page_have_every_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page, readme = tmp_path / "performance.md", tmp_path / "README.md"
    for copy, original in ((page, document.PAGE), (readme, document.README)):
        copy.write_text(original.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(document, "PAGE", page)
    monkeypatch.setattr(document, "README", readme)
    figures = [
        entry
        for case in (*CASES, "peers")
        for entry in entries(case, SETUP, [Figure(f"the {case}", "a second", [8.0, 9.0], "hand", [4.0, 3.0], ">= 3")])
    ]
    figures += entries("fleet", SETUP, [Figure("statements", "", [1.0], aim="= 1")])
    figures += entries("peers", SETUP, [Figure("handle, one consumer", "a second", [8.0], "huey on SQLite", [2.0])])

    document.fill(figures, "On this machine.")

    filled = page.read_text(encoding="utf-8")
    assert "On this machine." in filled
    assert [case for case in (*CASES, "peers") if f"| the {case} | SQLite | 8.5 a second |" not in filled] == []
    assert "| statements | SQLite | 1 | | = 1 |" in filled
    assert "2.5 (2 to 3) times hand | >= 3, not met |" in filled
    assert "| messages a second, `handle` | 8, 4 times huey |" in readme.read_text(encoding="utf-8")
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 110


@pytest.mark.parametrize(
    ("aim", "is_missed"),
    [("<= 2.5", False), ("<= 2", True), (">= 3", True), ("<= 8 ms", True), (">= 8 ms", False), ("", False)],
)
def test_a_missed_aim_is_marked(aim: str, is_missed: bool) -> None:
    [beside, alone] = entries(
        "claim", SETUP, [Figure("it", "ms", [8.5], "hand", [3.4], aim), Figure("it", "ms", [8.5], aim=aim)]
    )
    assert document.is_missed(beside) == is_missed
    assert document.is_missed(alone) == (aim.startswith("<="))


def test_the_limits_of_sqlite_are_measured_and_written(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    result = CliRunner().invoke(main, ["limits", "--engine", "sqlite", "--scale", "small", "--json", str(path)])

    assert result.exit_code == 0, result.output
    assert {each["name"] for each in read(path)} >= {"fdatasync", "round trip", "commit, synchronous FULL"}
