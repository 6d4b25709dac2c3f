"""Draws charts of runs and messages as SVG. Horizontal places are percentages, vertical places are pixels."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import log

from markupsafe import Markup, escape

from ..history.records import STATES
from ..tallies.charts import Bar, Chart
from ..tallies.tally import Lengths, Tally
from .filters import length_text, percent_text, state_class, utc_text

_TOP, _PLOT, _FOOT, _LABELS = 8, 120, 20, 58  # pixels
_BOTTOM, _HEIGHT = _TOP + _PLOT, _TOP + _PLOT + _FOOT
_FILLED = 0.78  # of the place of a bar
_LEAST = 2.0  # pixels: a single failure stays visible beside a thousand successes
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_BETWEEN_LABELS = {
    timedelta(minutes=5): timedelta(minutes=15),
    timedelta(hours=1): timedelta(hours=6),
    timedelta(hours=6): timedelta(days=2),
    timedelta(hours=12): timedelta(days=4),
}
_GRID = {
    0.001: "1 ms",
    0.01: "10 ms",
    0.1: "100 ms",
    1.0: "1 s",
    10.0: "10 s",
    60.0: "1 min",
    600.0: "10 min",
    3600.0: "1 h",
    36_000.0: "10 h",
    864_000.0: "10 d",
}
_PATTERNS = {
    "state-failed": "M0 6L6 0",
    "state-lost": "M0 0L6 6",
    "state-timed-out": "M0 3H6",
    "state-handed-back": "M3 0V6",
    "state-cancelled": "M0 6L6 0M0 0L6 6",
}


@dataclass(frozen=True)
class Part:
    """A part of the stacked bars: a key of the counts, and its class of CSS."""

    key: str
    css: Markup


@dataclass(frozen=True)
class Picture:
    """A drawing with its caption."""

    title: str
    figures: str
    svg: Markup
    parts: tuple[Part, ...] = ()
    """The parts that the legend explains. A picture of lengths has a legend of its own."""
    is_marked: bool = False
    """True if a line marks the messages that were enqueued."""


def runs(chart: Chart) -> list[Picture]:
    """Draw the runs by outcome, their durations and their lateness."""
    known = [state for state in STATES if state in chart.total.counts]
    states = [*known, *sorted(chart.total.counts.keys() - set(STATES))]
    rate = chart.total.success_rate
    runs = "1 run" if chart.total.runs == 1 else f"{chart.total.runs:,} runs"
    figures = runs if rate is None else f"{runs}, {percent_text(rate)} succeeded"
    parts = tuple(Part(state, escape(state_class(state))) for state in states)
    return [
        _stacked(chart, "runs", "Runs by outcome", figures, parts),
        _ranges(chart, "durations", "Duration", lambda tally: tally.took),
        _ranges(chart, "lateness", "Lateness", lambda tally: tally.late),
    ]


def messages(chart: Chart) -> list[Picture]:
    """Draw the attempts at messages by outcome, marks for the messages that were enqueued, and the latency."""
    counts = chart.total.counts
    figures = ", ".join(f"{counts[key]:,} {key}" for key in ("enqueued", "done", "failed"))
    parts = Part("done", escape("state-succeeded")), Part("failed", escape("state-failed"))
    return [
        _stacked(chart, "messages", "Messages", figures, parts, "enqueued"),
        _ranges(chart, "latency", "Latency", lambda tally: tally.took),
    ]


# -- stacked bars --------------------------------------------------------------------------------


def _stacked(
    chart: Chart, id: str, title: str, figures: str, parts: tuple[Part, ...], mark: str | None = None
) -> Picture:
    counted = [[bar.tally.counts[part.key] for part in parts] for bar in chart.bars]
    marked = [bar.tally.counts[mark] if mark else 0 for bar in chart.bars]
    most = _round(max(max(map(sum, counted)), *marked, 1))
    per_pixel = most / _PLOT
    bars = []
    for number, (bar, counts, enqueued) in enumerate(zip(chart.bars, counted, marked, strict=True)):
        x, y, drawn = _place(chart, number), float(_BOTTOM), ""
        for part, count in zip(parts, counts, strict=True):
            if count:
                height = max(count / per_pixel, _LEAST)
                y = max(y - height, 0.0)
                drawn += _rect(part.css, x, y, height)
                if part.css in _PATTERNS:
                    drawn += _rect("", x, y, height, f"url(#{id}-{part.css})")
        if enqueued:
            drawn += _rect("bw-mark", x, _BOTTOM - enqueued / per_pixel - 1, 2)
        if drawn:
            keys = [part.key for part in parts] + ([mark] if mark else [])
            drawn = f"<g><title>{_title(bar, bar.tally, keys)}</title>{drawn}</g>"
        bars.append(drawn)
    grid = {0.0: "0", 0.5: f"{most / 2:,g}", 1.0: f"{most:,}"} if most > 1 else {0.0: "0", 1.0: "1"}
    patterns = "".join(
        f'<pattern id="{id}-{part.css}" width="6" height="6" patternUnits="userSpaceOnUse">'
        f'<path class="bw-hatching" d="{_PATTERNS[part.css]}"/></pattern>'
        for part in parts
        if part.css in _PATTERNS
    )
    svg = _framed(chart, id, title, figures, grid, f"<defs>{patterns}</defs>{''.join(bars)}")
    return Picture(title, figures, svg, parts, mark is not None)


def _round(number: int) -> int:
    """Return the next number above that is 1, 2 or 4 times a power of ten."""
    power = int(10 ** (len(str(number)) - 1))
    return next(each * power for each in (1, 2, 4, 10) if each * power >= number)


def _title(bar: Bar, tally: Tally, keys: Sequence[str]) -> str:
    counts = ", ".join(f"{tally.counts[key]:,} {key}" for key in keys if tally.counts[key])
    return str(escape(f"{_when(bar)}: {counts}"))


def _when(bar: Bar) -> str:
    return f"{utc_text(bar.start)[:16]} to {bar.end:%H:%M} UTC"


# -- ranges of lengths ---------------------------------------------------------------------------


def _ranges(chart: Chart, id: str, title: str, lengths_of: Callable[[Tally], Lengths]) -> Picture:
    total, found = lengths_of(chart.total), [lengths_of(bar.tally) for bar in chart.bars]
    figures = f"p50 {length_text(total.p50)}, p95 {length_text(total.p95)}, max {length_text(total.longest)}"
    if total.longest is None:
        return Picture(title, "none", _framed(chart, id, title, "none", {}, ""))
    least = min(p50 for each in found if (p50 := each.p50) is not None)
    low = max((mark for mark in _GRID if mark <= least), default=min(_GRID))
    high = min((mark for mark in _GRID if mark >= total.longest and mark > low), default=max(_GRID))

    def place(seconds: float) -> float:
        share = log(max(seconds, low) / low) / log(high / low)
        return _BOTTOM - min(share, 1.0) * _PLOT

    marks = [mark for mark in _GRID if low <= mark <= high]
    grid = {(_BOTTOM - place(mark)) / _PLOT: _GRID[mark] for mark in marks[:: 2 if len(marks) > 6 else 1]}
    drawn = "".join(_range(chart, number, each, place) for number, each in enumerate(found))
    return Picture(title, figures, _framed(chart, id, title, figures, grid, drawn))


def _range(chart: Chart, number: int, lengths: Lengths, place: Callable[[float], float]) -> str:
    p50, p95, longest = lengths.p50, lengths.p95, lengths.longest
    if p50 is None or p95 is None or longest is None:
        return ""
    x, (low, high, top) = _place(chart, number), map(place, (p50, p95, longest))
    texts = length_text(p50), length_text(p95), length_text(longest)
    title = f"{_when(chart.bars[number])}: p50 {texts[0]}, p95 {texts[1]}, max {texts[2]}"
    middle = x[0] + x[1] / 2
    return (
        f"<g><title>{escape(title)}</title>"
        f'<line class="bw-stem" x1="{middle:.2f}%" x2="{middle:.2f}%" y1="{top:.1f}" y2="{high:.1f}"/>'
        f"{_rect('bw-range', x, high, max(low - high, _LEAST))}{_rect('bw-mark', x, top - 1, 2)}</g>"
    )


# -- the frame -----------------------------------------------------------------------------------


def _framed(chart: Chart, id: str, title: str, figures: str, grid: dict[float, str], drawn: str) -> Markup:
    """Return the labels at the left, and the picture beside them, which is as wide as its place."""
    places = {_BOTTOM - share * _PLOT: text for share, text in grid.items()}
    labels = "".join(
        f'<text class="bw-axis" x="{_LABELS - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        for y, text in places.items()
    )
    lines = "".join(f'<line class="bw-grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>' for y in places)
    return Markup(  # noqa: S704 - of numbers, and of texts that are escaped
        f'<div class="bw-chart"><svg width="{_LABELS}" height="{_HEIGHT}" aria-hidden="true">{labels}</svg>'
        f'<svg class="bw-plot" width="100%" height="{_HEIGHT}" role="img" aria-labelledby="{id}-title {id}-desc">'
        f'<title id="{id}-title">{escape(title)}</title>'
        f'<desc id="{id}-desc">{escape(f"{figures}, since {utc_text(chart.since)}")}</desc>'
        f"{lines}{drawn}{''.join(_times(chart))}</svg></div>"
    )


def _times(chart: Chart) -> Iterator[str]:
    """Yield the labels of the horizontal axis. The script converts them to the browser's zone."""
    step = _BETWEEN_LABELS[chart.span.bar]
    for number, bar in enumerate(chart.bars):
        x = 100 * number / len(chart.bars)
        if (bar.start - _EPOCH) % step or x > 96:
            continue
        is_day = step >= timedelta(days=1)
        name, text = ("data-day", f"{bar.start:%b} {bar.start.day}") if is_day else ("data-time", f"{bar.start:%H:%M}")
        mark = f'{name}="{bar.start.isoformat()}"' + (' text-anchor="middle"' if x > 4 else "")
        yield (
            f'<line class="bw-grid" x1="{x:.2f}%" x2="{x:.2f}%" y1="{_BOTTOM}" y2="{_BOTTOM + 4}"/>'
            f'<text class="bw-axis" x="{x:.2f}%" y="{_HEIGHT - 3}" {mark}>{text}</text>'
        )


def _place(chart: Chart, number: int) -> tuple[float, float]:
    """Return the place and the width of a bar, in percent."""
    width = 100 / len(chart.bars)
    return (number + (1 - _FILLED) / 2) * width, _FILLED * width


def _rect(css: str, x: tuple[float, float], y: float, height: float, fill: str = "") -> str:
    look = f'fill="{fill}"' if fill else f'class="{css}"'
    return f'<rect {look} x="{x[0]:.2f}%" width="{x[1]:.2f}%" y="{y:.1f}" height="{height:.1f}"/>'
