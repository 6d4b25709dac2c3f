"""Tallies add up, and their percentiles are close to those of the single lengths."""

from bisect import bisect_right
from collections import Counter
from math import ceil

from hypothesis import given, settings
from hypothesis import strategies as st

from background.tallies.tally import BOUNDS, Lengths, Tally

LENGTHS = st.lists(st.floats(0.0, 2_000_000.0), min_size=1, max_size=60)


def lengths(values: list[float]) -> Lengths:
    return Lengths(Counter(bisect_right(BOUNDS, each) for each in values), max(values, default=None))


@settings(derandomize=True, database=None, deadline=None)
@given(LENGTHS, st.sampled_from([0.5, 0.95, 1.0]))
def test_a_percentile_is_at_most_six_percent_or_a_millisecond_off(values: list[float], share: float) -> None:
    exact = sorted(values)[ceil(share * len(values)) - 1]
    found = lengths(values).percentile(share)
    assert found is not None
    if exact <= BOUNDS[-1]:  # above it only the longest is known
        assert abs(found - exact) <= max(0.06 * exact, 0.001)
    assert found <= max(values)


@settings(derandomize=True, database=None, deadline=None)
@given(LENGTHS, LENGTHS)
def test_the_lengths_of_two_tallies_add_up(some: list[float], more: list[float]) -> None:
    sum_of_both = lengths(some)
    sum_of_both.add(lengths(more).bins.items(), lengths(more).longest)
    assert sum_of_both == lengths(some + more)


def test_a_tally_survives_its_row() -> None:
    tally = Tally(Counter(succeeded=3, failed=1), lengths([0.2, 3.0]), lengths([0.01]))
    read = Tally()
    read.add_json(tally.as_json())
    assert read == tally
    read.add_json(tally.as_json())
    tally.add(tally)
    assert (read, read.took.bins.total(), read.took.longest) == (tally, 4, 3.0)
    read.add_json(Tally().as_json())
    assert read == tally


def test_a_tally_without_runs_has_no_rate_and_no_percentiles() -> None:
    assert (Tally().runs, Tally().success_rate, Tally().took.p50, Tally().took.longest) == (0, None, None, None)


def test_runs_that_were_handed_back_or_cancelled_do_not_lower_the_success_rate() -> None:
    assert Tally(Counter({"succeeded": 3, "failed": 1, "handed back": 5, "cancelled": 2})).success_rate == 0.75
    assert Tally(Counter(cancelled=2)).success_rate is None
