"""Figures, the turns in which they are measured, and the checks that the work was really done."""

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click


@dataclass(frozen=True)
class Setup:
    """One run of a case: its engine, its scale, and how many turns it takes."""

    engine: str
    is_small: bool
    turns: int
    only: str | None = None
    """The only peer to measure. None for all peers."""

    def size(self, small: int, full: int) -> int:
        return small if self.is_small else full


@dataclass(frozen=True)
class Figure:
    """The values of some turns. `of` names the denominator, and `of_values` has its values in the same turns."""

    name: str
    unit: str
    values: Sequence[float]
    of: str = ""
    of_values: Sequence[float] = field(default=())
    aim: str = ""
    at: int | None = None
    """The amount of work, for a figure that shows how a cost grows."""

    @property
    def ratios(self) -> list[float]:
        return [value / of for value, of in zip(self.values, self.of_values, strict=True)] if self.of else []

    def as_json(self) -> dict[str, Any]:
        shown = {name: value for name, value in vars(self).items() if name == "unit" or value not in ("", (), None)}
        return {**shown, "ratios": self.ratios} if self.of else shown

    def __str__(self) -> str:
        at = "" if self.at is None else f", at {self.at:,}"
        of = f"{self.of} ({number(median(self.of_values))} {self.unit})" if self.of else ""
        ratio = f"  {spread(self.ratios)} times {of}" if of else ""
        return f"{self.name + at:44} {spread(self.values)} {self.unit}{ratio}" + (f"  aim {self.aim}" * bool(self.aim))


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def number(value: float) -> str:
    """Return the value with three digits, or as an integer."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """Return the median, and the smallest and the greatest value."""
    ends = f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
    return number(median(values)) + ends


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def in_turns(setup: Setup, label: str, ways: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Measure each way once per turn. Every second turn has the reverse order, so that no way always comes first."""
    names, measured = list(ways), {name: [] for name in ways}
    steps = [name for turn in range(setup.turns) for name in (names if turn % 2 else reversed(names))]
    for name in progress(steps, f"{setup.engine}: {label}"):
        measured[name].append(ways[name]())
    return measured


def progress(steps: Sequence[Any], label: str) -> Iterator[Any]:
    """Yield the steps, beside a progress bar if the error output is a terminal."""
    with click.progressbar(steps, label=label, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        yield from bar


class NotDone(Exception):
    """The measured work was not done, or was done twice. The case then has no figures."""


def check(is_fine: bool, complaint: str) -> None:
    if not is_fine:
        raise NotDone(complaint)


def check_once(expected: int, found: int, different: int, work: str) -> None:
    """Check that all `expected` effects are there, each once."""
    check(
        expected == found == different,
        f"{work}: expected {expected:,} effects, each once. Found {found:,} effects of {different:,} different ones.",
    )
