"""Writes the measured figures into docs/performance.md and the README, as tables."""

import operator
import re
from collections.abc import Iterator
from pathlib import Path

from .figures import median, number, spread
from .results import Entry

ROOT = Path(__file__).parents[2]
PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
NAMES = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}
MOST_PAGES = 6
_PART = re.compile(r"<!-- figures: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
_README = re.compile(r"\| \[Speed\]\(docs.*?\n\n", re.DOTALL)


def fill(figures: list[Entry], about: str) -> None:
    """Replace the tables of both documents by these figures."""
    page = _PART.sub(lambda found: part(found[1], figures, about), PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(page, encoding="utf-8")
    summary = "\n".join(readme(figures)) + "\n\n"
    README.write_text(_README.sub(lambda _: summary, README.read_text(encoding="utf-8")), encoding="utf-8")


def part(case: str, figures: list[Entry], about: str) -> str:
    lines = [about] if case == "machine" else list(table(case, [each for each in figures if each["case"] == case]))
    return "\n".join([f"<!-- figures: {case} -->", *(["", *lines, ""] if lines else []), "<!-- end -->"])


def table(case: str, figures: list[Entry]) -> Iterator[str]:
    """Yield a table of the case. Of the pages, only the slowest."""
    if not figures:
        return
    if case == "pages":
        figures = sorted(figures, key=lambda each: -median(each["values"]))[:MOST_PAGES]
    yield "| | engine | figure | ratio | aim |"
    yield "|---|---|---|---|---|"
    for each in figures:
        name = re.sub(r"(until|at)=[^&]*", r"\1", each["name"])
        at = f", at {each['at']:,}" if "at" in each else ""
        of = each.get("of", "")
        ratio = f"{spread(each['ratios'])} times {of}" if of else ""
        aim = each.get("aim", "") + (", not met" if is_missed(each) else "")
        figure = f"{number(median(each['values']))} {each['unit']}"
        yield re.sub(" +", " ", f"| {name}{at} | {NAMES[each['engine']]} | {figure} | {ratio} | {aim} |")


def is_missed(figure: Entry) -> bool:
    """Return whether the median misses the aim. An aim without a unit is about the ratio, if there is one."""
    if not figure.get("aim"):
        return False
    sign, wanted, *unit = figure["aim"].split(maxsplit=2)
    found = median(figure["values" if unit else "ratios"] if figure.get("of") else figure["values"])
    return not {"<=": operator.le, ">=": operator.ge, "=": operator.eq}[sign](found, float(wanted))


def readme(figures: list[Entry]) -> Iterator[str]:
    """Yield the README's table."""
    yield "| [Speed](docs/performance.md) | SQLite | PostgreSQL |"
    yield "|---|---|---|"
    for label, case, name in (
        ("messages a second, `handle`", "peers", "handle, one consumer"),
        ("messages a second, `handle_many`", "peers", "handle_many, one consumer"),
    ):
        yield from row(label, [beside_the_fastest(case, name, engine, figures) for engine in NAMES])
    for label, case, name in (
        ("`handle`, where a bare SQLAlchemy loop is 1", "messages", "handle, one statement"),
        ("a winning claim, where hand-written SQL is 1", "claim", "a claim that wins"),
    ):
        yield from row(label, [ratio_of(case, name, engine, figures) for engine in NAMES])


def row(label: str, cells: list[str]) -> Iterator[str]:
    """Yield a row of the table, if one of its cells has a figure."""
    if any(cells):
        yield f"| {label} | {' | '.join(each or 'not measured' for each in cells)} |"


def beside_the_fastest(case: str, name: str, engine: str, figures: list[Entry]) -> str:
    """Return the rate, and its ratio of the fastest peer."""
    found = entries_of(case, name, engine, figures)
    if not found:
        return ""
    fastest = max(found, key=lambda each: median(each["of_values"]))
    ratio, rate = number(median(fastest["ratios"])), number(median(fastest["values"]))
    return f"{rate}, {ratio} times {fastest['of'].partition(' ')[0]}"


def ratio_of(case: str, name: str, engine: str, figures: list[Entry]) -> str:
    found = entries_of(case, name, engine, figures)
    return number(median(found[0]["ratios"])) if found else ""


def entries_of(case: str, name: str, engine: str, figures: list[Entry]) -> list[Entry]:
    return [each for each in figures if (each["case"], each["engine"], each["name"]) == (case, engine, name)]
