"""Draws the newest executions of a worker as small bars. Height shows the duration, colour the outcome."""

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from functools import lru_cache
from math import sqrt

from markupsafe import Markup, escape

from ..history.records import Glance
from ..history.text import span
from .filters import state_class

COUNT = 50
_BAR, _STEP, _HIGHEST, _LOWEST, _MARK = 2, 3, 28, 3, 3


@lru_cache(maxsize=200)  # a live page draws the same pictures every two seconds
def picture(glances: tuple[Glance, ...]) -> Markup:
    """Draw at most COUNT executions as SVG, oldest first. A mark below a bar says that it did not succeed."""
    took = [_took(each) for each in glances]
    longest = max((length.total_seconds() for length in took if length is not None), default=0.0)
    bars = [
        _bar((COUNT - len(glances) + index) * _STEP, each, length, longest)
        for index, (each, length) in enumerate(zip(glances, took, strict=True))
    ]
    width, height = COUNT * _STEP - 1, _HIGHEST + 2 + _MARK
    return Markup(  # noqa: S704 - of numbers, and of texts that are escaped
        f'<svg class="bw-picture" role="img" aria-label="{escape(_label(glances, longest))}" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<path class="bw-base" d="M0 {_HIGHEST}h{width}v1H0z"/>{"".join(bars)}</svg>'
    )


def _bar(x: int, glance: Glance, length: timedelta | None, longest: float) -> str:
    # The square root keeps a run visible that took a hundredth of the longest run's time.
    share = sqrt(length.total_seconds() / longest) if length is not None and longest else 0.0
    height = _LOWEST + (_HIGHEST - _LOWEST) * share
    css, state = _escaped(glance.state)
    bar = f"M{x} {_HIGHEST}h{_BAR}v-{height:.1f}h-{_BAR}z"
    if glance.state not in ("succeeded", "running"):
        bar += f"M{x} {_HIGHEST + 2}h{_BAR}v{_MARK}h-{_BAR}z"
    at, took = glance.tick.isoformat(" ", "seconds")[:19], f", {span(length)}" if length is not None else ""
    return f'<path class="{css}" d="{bar}"><title>{at} UTC: {state}{took}</title></path>'


@lru_cache(maxsize=100)
def _escaped(state: str) -> tuple[str, str]:
    """Return the CSS class and the name of a state, escaped. Cached: a page has over a thousand bars."""
    return str(escape(state_class(state))), str(escape(state))


def _took(glance: Glance) -> timedelta | None:
    if glance.started_at is None:
        return None
    return max(glance.ended_at - glance.started_at, timedelta())  # a clock may be set back


def _label(glances: Sequence[Glance], longest: float) -> str:
    if not glances:
        return "No executions yet"
    counts = ", ".join(f"{count} {state}" for state, count in Counter(each.state for each in glances).most_common())
    return f"The last {len(glances)} executions: {counts}; the longest took {span(timedelta(seconds=longest))}"
