"""Writes series in Prometheus's text format.

The client library takes 5 us for a line, and a fleet of 1,000 workers has thousands of lines.
"""

from collections.abc import Iterable
from functools import lru_cache

from prometheus_client.utils import floatToGoString


@lru_cache(maxsize=10_000)  # most counts are small, and frequent
def count(value: int) -> str:
    """Write a whole number."""
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def seconds(value: float) -> str:
    """Write a time, to the microsecond."""
    if 0 <= value < 999_999:  # Go writes such a number as Python does
        return repr(round(float(value), 6))
    return str(floatToGoString(round(value, 6)))  # type: ignore[no-untyped-call]


def label(name: str, value: str) -> str:
    """Write one label. A series has its labels sorted by name, with commas between them."""
    escaped = value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return f'{name}="{escaped}"'


def metric(name: str, kind: str, meaning: str, lines: Iterable[str]) -> str:
    """Write a metric: its head, then its lines."""
    return f"# HELP {name} {meaning}\n# TYPE {name} {kind}\n{''.join(lines)}"


def gauge(name: str, meaning: str, samples: Iterable[tuple[str, str]]) -> str:
    """Write a gauge. Each sample has its labels, or "", and its value as text."""
    lines = [f"{name}{{{labels}}} {value}\n" if labels else f"{name} {value}\n" for labels, value in samples]
    return metric(name, "gauge", meaning, lines)
