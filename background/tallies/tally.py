"""A tally: the counts of one worker's runs, or of one topic's messages, in a stretch of time. Tallies add up."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil, sqrt
from typing import Any

_PER_DECADE, _DECADES = 20, 9
BOUNDS = tuple(10 ** (number / _PER_DECADE - 3) for number in range(_DECADES * _PER_DECADE + 1))
"""The bounds of the bins of lengths, in seconds, from 1 ms to 1,000,000 s. Bin N begins with the Nth bound."""

_NO_FAULT = ("handed back", "cancelled")


@dataclass
class Lengths:
    """A number of lengths of time, in bins. The longest is exact. A percentile is at most 6 % off, or 1 ms."""

    bins: Counter[int] = field(default_factory=Counter)
    longest: float | None = None
    """In seconds. None without a length."""

    def add(self, bins: Iterable[tuple[int, int]], longest: float | None) -> None:
        """Add a number of lengths to each bin."""
        _add(self.bins, bins)
        if longest is not None and (self.longest is None or longest > self.longest):
            self.longest = longest

    def percentile(self, share: float) -> float | None:
        """Return the length in seconds that this share of the lengths does not exceed. None without a length."""
        if self.longest is None:
            return None
        total = self.bins.total()
        rank = ceil(share * total)
        if rank >= total:
            return self.longest
        for each in sorted(self.bins):
            rank -= self.bins[each]
            if rank <= 0:
                break
        return min(self.longest, _middle(each, self.longest))

    @property
    def p50(self) -> float | None:
        return self.percentile(0.5)

    @property
    def p95(self) -> float | None:
        return self.percentile(0.95)


def _middle(place: int, longest: float) -> float:
    """Return the length in the middle of a bin, on the logarithmic scale of the bins."""
    if place == 0:
        return BOUNDS[0]
    return sqrt(BOUNDS[place - 1] * BOUNDS[place]) if place < len(BOUNDS) else longest


@dataclass
class Tally:
    """The counts of ended runs by state. Or of messages: "enqueued", "done", "failed", "dead", "discarded".

    "failed" counts the failed attempts at messages.
    """

    counts: Counter[str] = field(default_factory=Counter)
    took: Lengths = field(default_factory=Lengths)
    """The durations of the runs. Or the latencies of the done messages, from due to done."""
    late: Lengths = field(default_factory=Lengths)
    """The lateness of first attempts at scheduled ticks, from the tick to the start."""

    def add(self, other: "Tally") -> None:
        _add(self.counts, other.counts.items())
        self.took.add(other.took.bins.items(), other.took.longest)
        self.late.add(other.late.bins.items(), other.late.longest)

    def add_json(self, text: str) -> None:
        """Add the tally that `as_json` wrote. A chart adds up hundreds of them."""
        row = json.loads(text)
        _add(self.counts, row["counts"].items())
        for lengths, name, longest in ((self.took, "took", "longest"), (self.late, "late", "latest")):
            lengths.add(((int(place), number) for place, number in row[name].items()), row[longest])

    @property
    def runs(self) -> int:
        """The number of runs that ended."""
        return self.counts.total()

    @property
    def success_rate(self) -> float | None:
        """The share of succeeded runs, from 0.0 to 1.0. Runs that were handed back or cancelled do not count."""
        judged = self.runs - sum(self.counts[state] for state in _NO_FAULT)
        return self.counts["succeeded"] / judged if judged else None

    def as_json(self) -> str:
        parts = {"counts": self.counts, "took": self.took.bins, "late": self.late.bins}
        lengths = {"longest": self.took.longest, "latest": self.late.longest}
        return json.dumps({**parts, **lengths}, separators=(",", ":"))


def _add(counts: Counter[Any], more: Iterable[tuple[Any, int]]) -> None:
    """Add as `Counter.update` does, in a fraction of its time."""
    get = counts.get
    for key, number in more:
        counts[key] = get(key, 0) + number
