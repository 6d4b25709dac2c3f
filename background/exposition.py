"""The text that Prometheus reads, https://prometheus.io/docs/instrumenting/exposition_formats/, version 0.0.4.

Written here, as the usual client library takes several times as long for it: of 1,000 workers it is 35,000 lines,
and while they are written the process serves little else.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Distribution(NamedTuple):
    """One histogram: how many fell into each bucket (not cumulative), and the sum of what was measured."""

    labels: str
    counts: Sequence[int]
    sum: float


def labelled(**labels: object) -> str:
    """The labels of a sample."""
    return ",".join(f'{name}="{_escaped(str(value))}"' for name, value in labels.items())


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


class Exposition:
    """Families of samples, written one after the other; one without samples is left out."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def counter(self, name: str, meaning: str, samples: Iterable[tuple[str, float]]) -> None:
        """`samples` are labels and values."""
        self._family(name, "counter", meaning, [f"{name}{{{labels}}} {value}" for labels, value in samples])

    def gauge(self, name: str, meaning: str, samples: Iterable[tuple[str, float]]) -> None:
        self._family(name, "gauge", meaning, [f"{name}{{{labels}}} {value}" for labels, value in samples])

    def single(self, name: str, meaning: str, value: float) -> None:
        """A gauge without labels."""
        self._family(name, "gauge", meaning, [f"{name} {value}"])

    def histogram(self, name: str, meaning: str, bounds: Sequence[str], series: Iterable[Distribution]) -> None:
        """`bounds` are the upper ones of the buckets, ascending; the last is "+Inf"."""
        edges = [f',le="{bound}"}} ' for bound in bounds]
        lines: list[str] = []
        for labels, counts, total in series:
            start, sums = f"{name}_bucket{{{labels}", list(accumulate(counts))
            lines += [f"{start}{edge}{count}" for edge, count in zip(edges, sums, strict=True)]
            lines += [f"{name}_sum{{{labels}}} {total}", f"{name}_count{{{labels}}} {sums[-1]}"]
        self._family(name, "histogram", meaning, lines)

    def text(self) -> str:
        return "\n".join([*self._lines, ""])

    def _family(self, name: str, kind: str, meaning: str, lines: list[str]) -> None:
        if lines:
            self._lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", *lines]
