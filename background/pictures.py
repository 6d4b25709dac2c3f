"""The newest executions of a worker as a small picture: a bar each, as high as it took long, coloured by outcome."""

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from math import sqrt

from markupsafe import Markup, escape

from .history import Glance
from .pages import state_class, utc_text
from .words import span

COUNT = 50
_BAR, _STEP, _HIGHEST, _LOWEST, _MARK = 3, 4, 28, 3, 3


def picture(glances: Sequence[Glance]) -> Markup:
    """An SVG of at most COUNT executions, oldest first. Whatever did not succeed also has a mark below its bar."""
    took = [_took(each) for each in glances]
    longest = max((length.total_seconds() for length in took if length is not None), default=0.0)
    bars = [
        _bar((COUNT - len(glances) + index) * _STEP, each, length, longest)
        for index, (each, length) in enumerate(zip(glances, took, strict=True))
    ]
    width, height = COUNT * _STEP - 1, _HIGHEST + 2 + _MARK
    return Markup(  # noqa: S704 - the bars are of numbers, and of texts that are escaped
        f'<svg class="bw-picture" role="img" aria-label="{escape(_label(glances, longest))}" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{"".join(bars)}</svg>'
    )


def _bar(x: int, glance: Glance, length: timedelta | None, longest: float) -> str:
    # The square root shows a run of a hundredth of the longest beside it, and still who is longer.
    share = sqrt(length.total_seconds() / longest) if length is not None and longest else 0.0
    height = _LOWEST + (_HIGHEST - _LOWEST) * max(share, 0.0)
    css, what = escape(state_class(glance.state)), escape(_title(glance, length))
    mark = "" if glance.state in ("succeeded", "running") else f'<rect y="30" x="{x}" width="{_BAR}" height="{_MARK}"/>'
    bar = f'<rect x="{x}" y="{_HIGHEST - height:.1f}" width="{_BAR}" height="{height:.1f}"/>'
    return f'<g class="{css}"><title>{what}</title>{bar}{mark}</g>'


def _took(glance: Glance) -> timedelta | None:
    return (glance.finished_at or glance.clock) - glance.started_at if glance.started_at else None


def _title(glance: Glance, length: timedelta | None) -> str:
    took = f", {span(length)}" if length is not None else ""
    return f"{utc_text(glance.tick)}: {glance.state}{took}"


def _label(glances: Sequence[Glance], longest: float) -> str:
    if not glances:
        return "No executions yet"
    counts = ", ".join(f"{count} {state}" for state, count in Counter(each.state for each in glances).most_common())
    return f"The last {len(glances)} executions: {counts}; the longest took {span(timedelta(seconds=longest))}"
