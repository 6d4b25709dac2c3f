"""Each page of the dashboard, on a big database beside a small one: milliseconds, and the same number of queries."""

from collections.abc import Iterator

from ..harness.figures import Figure, Setup, check
from ..pages import LIMIT, SMALL, Size, measured

BIG = Size(1_000, 1_000_000, 100, 1_000_000)
BIGGER = Size(30, 3_000, 10, 3_000)  # of the small scale


def run(setup: Setup) -> Iterator[Figure]:
    rounds = setup.size(1, 30)
    big = BIGGER if setup.is_small else BIG
    small, large = (measured(setup.engine, size, rounds) for size in (SMALL, big))
    for (page, much), little in zip(large.items(), small.values(), strict=True):  # the ids in them differ
        check(
            much.queries <= little.queries,
            f"{page} sends {much.queries} queries, and {little.queries} on a small database",
        )
        yield Figure(page, "ms", [much.p50], "a small database", [little.p50], f"<= {LIMIT} ms")
    slowest = max(large, key=lambda page: large[page].p99)
    yield Figure(f"slowest page, p99: {slowest}", "ms", [large[slowest].p99], aim=f"<= {LIMIT} ms")
