"""docs/architecture.md names the rooms, the arrows and the functions of the code as it is."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from support.arrows import FILES, ORDER, ROOT, all_arrows, room

DOCUMENT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STOPS = re.findall(r"^- `([\w/]+):([\w.]+)`", DOCUMENT, re.MULTILINE)


def path_of(file: str) -> Path:
    return FILES.get(file) or ROOT / f"{file}.py"


@cache
def functions(path: Path) -> set[str]:
    return set(_functions(path))


def _functions(path: Path) -> Iterator[str]:
    """Yield the functions at the top of a file, and the methods of its classes as "Class.method"."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef))


@cache
def targets(name: str) -> set[str]:
    """Return every other room that the room imports from."""
    return {room(each) for file, found in all_arrows().items() if room(file) == name for each in found} - {name}


@cache
def below(name: str) -> set[str]:
    """Return every room that the room reaches by one arrow or more."""
    return targets(name).union(*map(below, targets(name)))


@pytest.mark.parametrize(("file", "function"), STOPS, ids=lambda part: part)
def test_each_stop_of_a_walk_exists(file: str, function: str) -> None:
    assert function in functions(path_of(file))


def test_the_document_has_four_walks() -> None:
    assert len(re.findall(r"^### ", DOCUMENT, re.MULTILINE)) == 4
    assert len(STOPS) > 30


def test_the_table_has_every_room_in_its_order() -> None:
    rows = re.search(r"\| room \| content \|\n\|---\|---\|\n(.*?)\n\n", DOCUMENT, re.DOTALL)[1].splitlines()
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])] == list(ORDER)


def test_the_drawing_has_every_arrow_that_no_longer_path_implies() -> None:
    drawn = {name: set(found.split(", ")) for name, found in re.findall(r"^ +(\w+) +--> (.+)$", DOCUMENT, re.MULTILINE)}
    assert drawn == {
        name: {each for each in found if not any(each in below(other) for other in found)}
        for name in ORDER
        if (found := targets(name))
    }


def test_the_lines_of_the_spine_are_about_right() -> None:
    rows = re.findall(r"^\| `([\w/]+)` \| (\d+) \|", DOCUMENT, re.MULTILINE)
    assert len(rows) == 8
    counts = {file: len(path_of(file).read_text(encoding="utf-8").splitlines()) for file, _ in rows}
    assert {file: count for file, count in counts.items() if abs(count - int(dict(rows)[file])) > 50} == {}


def test_the_document_is_short() -> None:
    lines = DOCUMENT.splitlines()
    assert len(lines) <= 220
    assert max(map(len, lines)) <= 100
