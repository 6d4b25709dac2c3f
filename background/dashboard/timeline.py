"""Draws the timeline, one lane per instance. It shows that each tick ran once, and no worker twice at a time.

Horizontal places are percentages, so that the picture is as wide as its page. Vertical places are pixels.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from markupsafe import escape

from ..history.records import STATES, InstanceRecord, Record, Window
from ..history.text import clipped, moment, second, span
from .filters import state_class
from .ticks import UNRECORDED

AXIS, HEAD, ROW, BAR, PAD = 26, 20, 18, 12, 5  # pixels
_LEFT, _RIGHT = 0.6, 98.4  # percent: so that the signs at the ends have room
_SLIMMEST = 0.35
_MOST_ROWS = 48  # up to this number each worker has its own row in a lane. Above it, workers share rows
_MOST_PACKED = 12
_LETTERS, _BOLD_LETTERS = 23, 20  # the longest name beside the picture
_MOST_LANES = 12  # above it, instances that did nothing are left out
_PER_LETTER, _MARGIN = 0.75, 1.2  # percent, on the narrowest picture

_STEPS = [timedelta(seconds=each) for each in (10, 60, 600, 3600, 6 * 3600)]
_MOST_LINES = 7
_AGAIN = ("lost", "handed back", "failed", "timed out")
_NOT_RUN = "not run"
SIGNS = {
    state: state.replace(" ", "-") for state in ("running", "lost", "handed back", "failed", "timed out", "cancelled")
}
"""The sign at the end of a bar, so that its colour is not its only mark."""
CLASSES = {state: state_class(state) for state in (*STATES, UNRECORDED)}
"""The class of CSS of each state."""


@dataclass
class Bar:
    """One execution, or a range of ticks that did not run. `y` and the text are set when its lane is placed."""

    record: Record
    x: float
    width: float
    title: str
    tick_x: float | None
    """The place of its tick. None if the tick is outside the picture."""
    end_x: float
    """The end of the bar. For a lost execution: the moment when another instance noticed the loss."""
    y: int = 0
    text: str | None = None
    text_x: float = 0.0
    is_text_inside: bool = False

    @property
    def middle(self) -> int:
        return self.y + BAR // 2

    def svg(self, address: str) -> str:
        """Draw the bar, with a link to the page of its execution. `address` is that of the worker's page.

        Not in the template, where the many small pieces of a bar take most of the page's time.
        """
        record, state, y, end, middle = self.record, self.record.state, self.y, self.x + self.width, self.middle
        css = CLASSES.get(state, "")
        page = f"/{record.id}" if record.started_at else f"?at={moment(record.through or record.tick)}#why"
        drawn = f'\n    <a href="{escape(address)}{page}" tabindex="-1"><title>{escape(self.title)}</title>'
        if self.tick_x is not None:
            drawn += f'<line class="bw-tick" x1="{self.tick_x}%" x2="{self.tick_x}%" y1="{y - 2}" y2="{y + 14}"/>'
        drawn += f'<rect class="bw-bar {css}" x="{self.x}%" y="{y}" width="{self.width}%" height="{BAR}" rx="2"/>'
        if state == "lost" and self.end_x > end:
            drawn += f'<line class="bw-silence" x1="{end}%" x2="{self.end_x}%" y1="{middle}" y2="{middle}"/>'
        if state in SIGNS:
            drawn += f'<use class="{css}" href="#bw-{SIGNS[state]}" x="{end}%" y="{middle}"/>'
        if self.text:
            look, dx = ("bw-inside", 4) if self.is_text_inside else ("bw-beside", 9)
            drawn += f'<text class="{look}" x="{self.text_x}%" dx="{dx}" y="{y + 10}">{escape(self.text)}</text>'
        return f"{drawn}</a>"


@dataclass(frozen=True)
class Lane:
    """The lane of one instance, or of the ticks that no instance ran."""

    label: str
    title: str
    note: str
    """The release."""
    seen: InstanceRecord | None
    y: int
    height: int
    life_x: float = 0.0
    life_width: float = 0.0
    is_lost: bool = False
    is_signed_off: bool = False
    bars: tuple[Bar, ...] = ()
    rows: tuple[tuple[str, int], ...] = ()
    """The workers' names and places. Empty if workers share rows."""

    @property
    def life_end(self) -> float:
        return self.life_x + self.life_width


@dataclass(frozen=True)
class Arrow:
    """An arrow from an attempt to the next attempt at the same tick."""

    x1: float
    y1: int
    x2: float
    y2: int
    state: str


@dataclass(frozen=True)
class Line:
    """A moment on the axis."""

    x: float
    at: datetime
    text: str
    """The moment in UTC. The script converts it to the browser's zone."""


@dataclass(frozen=True)
class Timeline:
    """The picture."""

    window: Window
    lanes: tuple[Lane, ...]
    arrows: tuple[Arrow, ...]
    lines: tuple[Line, ...]
    idle: int
    """The number of instances that are left out because they did nothing."""
    veil: float
    """The width at the left whose executions are not known."""

    @property
    def height(self) -> int:
        return self.lanes[-1].y + self.lanes[-1].height if self.lanes else AXIS + HEAD

    @property
    def records(self) -> list[Record]:
        """The executions, newest first."""
        return list(reversed(self.window.records))


def draw(window: Window) -> Timeline:
    """Draw the executions and instances of `window`."""
    scale = _Scale(window)
    groups, idle = _groups(window)
    pairs = {(lane, record.worker) for lane, (_, records) in groups.items() for record in records}
    lanes: list[Lane] = []
    for seen, records in groups.values():
        y = lanes[-1].y + lanes[-1].height + 1 if lanes else AXIS
        lanes.append(_lane(scale, seen, records, y, is_detailed=len(pairs) <= _MOST_ROWS))
    veil = scale.x(window.complete_since) if not window.is_complete else 0.0
    arrows = tuple(_arrows(bar for lane in lanes for bar in lane.bars))
    return Timeline(window, tuple(lanes), arrows, tuple(_lines(scale)), idle, veil)


class _Scale:
    """Converts a moment to its horizontal place."""

    def __init__(self, window: Window) -> None:
        self.window, self._since = window, window.since
        self._per_second = (_RIGHT - _LEFT) / (window.until - window.since).total_seconds()

    def x(self, at: datetime) -> float:
        x = _LEFT + (at - self._since).total_seconds() * self._per_second
        return _LEFT if x < _LEFT else _RIGHT if x > _RIGHT else round(x, 3)

    def shows(self, at: datetime) -> bool:
        return self.window.since <= at <= self.window.until


def _groups(window: Window) -> tuple[dict[str, tuple[InstanceRecord | None, list[Record]]], int]:
    """Return each lane's instance and records, oldest instance first, and the number of instances without a lane."""
    by_instance: dict[str, list[Record]] = defaultdict(list)
    for record in window.records:
        by_instance[record.instance or _NOT_RUN].append(record)
    seen = {each.id: each for each in window.seen}
    idle = [id for id in seen if id not in by_instance]
    shown = idle if len(by_instance) + len(idle) <= _MOST_LANES else []
    known = [id for id in seen if id in by_instance or id in shown]
    unknown = [id for id in by_instance if id not in seen and id != _NOT_RUN]
    last = [_NOT_RUN] if _NOT_RUN in by_instance else []
    groups = {id: (seen.get(id), by_instance.get(id, [])) for id in (*unknown, *known, *last)}
    return groups, len(idle) - len(shown)


# -- lanes and bars ------------------------------------------------------------------------------


def _lane(scale: _Scale, seen: InstanceRecord | None, records: list[Record], y: int, is_detailed: bool) -> Lane:
    bars = [_bar(scale, record, seen) for record in sorted(records, key=lambda record: record.began_at)]
    rows = _by_worker(bars) if is_detailed else _packed(bars)
    head = HEAD if is_detailed else PAD
    placed = tuple(
        bar for number, row in enumerate(rows) for bar in _placed(row, y + head + number * ROW, not is_detailed)
    )
    names = tuple((clipped(row[0].record.worker, _LETTERS), y + head + number * ROW) for number, row in enumerate(rows))
    height = max(head + len(rows) * ROW + PAD // 2, HEAD + PAD if is_detailed else 2 * HEAD)
    name = seen.name if seen else (records[0].instance_name if records[0].instance else None) or "not run"
    lane = Lane(clipped(name, _BOLD_LETTERS), name, "", seen, y, height, bars=placed, rows=names if is_detailed else ())
    return _with_life(scale, lane, seen) if seen else replace(lane, title=_title_without_life(records[0], name))


def _title_without_life(record: Record, name: str) -> str:
    return f"{name}: last seen more than a day ago" if record.instance else "Ticks that no instance ran"


def _with_life(scale: _Scale, lane: Lane, seen: InstanceRecord) -> Lane:
    """Add the time in which the instance was alive, which is drawn behind the bars."""
    lost = seen.state == "lost"
    until = seen.signed_off_at or (seen.heartbeat_at if lost else scale.window.until)
    x, end = scale.x(seen.started_at), scale.x(until)
    note = seen.release or ""
    title = f"{seen.name}, {f'release {note}, ' if note else ''}started {second(seen.started_at)}"
    if lost:
        title += f", lost: last heartbeat {second(seen.heartbeat_at)}"
    elif seen.signed_off_at:
        title += f", signed off {second(seen.signed_off_at)}"
    return replace(
        lane,
        title=title,
        note=clipped(note, _LETTERS),
        life_x=x,
        life_width=round(max(end - x, _SLIMMEST), 3),
        is_lost=lost and scale.shows(until),
        is_signed_off=seen.signed_off_at is not None and scale.shows(until),
    )


def _bar(scale: _Scale, record: Record, seen: InstanceRecord | None) -> Bar:
    began, ended = record.began_at, record.ended_at
    end_x = scale.x(ended)
    if record.state == "lost" and seen is not None:  # the run is known to have worked until the last heartbeat
        ended = min(max(seen.heartbeat_at, began), ended)
    x = scale.x(began)
    width = max(scale.x(ended) - x, _SLIMMEST)
    tick_x = scale.x(record.tick) if scale.shows(record.tick) and record.started_at else None
    return Bar(record, x, round(width, 3), describe(record), tick_x, round(max(end_x, x + width), 3))


def describe(record: Record) -> str:
    """Describe one execution in a line."""
    tick = moment(record.tick)
    if record.started_at is None:
        until = f" to {moment(record.through)}" if record.through and record.through != record.tick else ""
        return f"{record.worker}: tick {tick}{until}, {record.state}"
    attempt = f", attempt {record.attempt}" if (record.attempt or 1) > 1 else ""
    by_hand = "" if record.trigger == "schedule" else f", {record.trigger}"
    took = span(record.duration or timedelta())
    outcome = "running for" if record.state == "running" else f"{record.state} after"
    gone = "; its instance is gone, another instance will take it over" if record.is_gone else ""
    return f"{record.worker}: tick {tick}{by_hand}{attempt}, {outcome} {took} on {record.instance_name}{gone}"


def _by_worker(bars: Sequence[Bar]) -> list[list[Bar]]:
    rows: dict[str, list[Bar]] = defaultdict(list)
    for bar in bars:
        rows[bar.record.worker].append(bar)
    return [rows[worker] for worker in sorted(rows)]


def _packed(bars: Sequence[Bar]) -> list[list[Bar]]:
    """Put each bar into the first row that is free at its time. So the bars need the fewest rows."""
    rows: list[list[Bar]] = []
    for bar in bars:
        free = next((row for row in rows if row[-1].record.ended_at <= bar.record.began_at), None)
        if free is None and len(rows) < _MOST_PACKED:
            rows.append(free := [])
        (rows[-1] if free is None else free).append(bar)
    return rows


def _placed(row: Sequence[Bar], y: int, may_stand_beside: bool) -> Sequence[Bar]:
    """Place the bars in their row, and write a name where there is room."""
    for bar, following in zip(row, [*row[1:], None], strict=True):
        bar.y, name = y + (ROW - BAR) // 2, bar.record.worker
        needed = len(name) * _PER_LETTER + _MARGIN
        if needed <= bar.width:
            bar.text, bar.text_x, bar.is_text_inside = name, bar.x, True
        elif may_stand_beside and bar.end_x + _MARGIN + needed <= (following.x if following else _RIGHT):
            bar.text, bar.text_x = name, bar.end_x
    return row


# -- arrows and the axis -------------------------------------------------------------------------


def _arrows(bars: Iterable[Bar]) -> Iterator[Arrow]:
    attempts: dict[tuple[str, datetime, str], list[Bar]] = defaultdict(list)
    for bar in bars:
        if bar.record.started_at:
            attempts[bar.record.worker, bar.record.tick, bar.record.trigger].append(bar)
    for same in attempts.values():
        for attempt, following in pairwise(sorted(same, key=lambda bar: bar.record.id)):
            if attempt.record.state in _AGAIN:
                yield Arrow(attempt.end_x, attempt.middle, following.x, following.middle, attempt.record.state)


def _lines(scale: _Scale) -> Iterator[Line]:
    since, until = scale.window.since, scale.window.until
    step = next((each for each in _STEPS if (until - since) / each <= _MOST_LINES), _STEPS[-1])
    shape = "%H:%M:%S" if step < timedelta(minutes=1) else "%H:%M"
    midnight = since.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    at = midnight + (-((midnight - since) // step)) * step
    while at <= until:
        if at >= since:
            yield Line(scale.x(at), at, at.strftime(shape))
        at += step
