"""The look of the commands: colour, tables as wide as the terminal, and moments in the shown time zone.

A terminal gets short moments, and colour. A pipe or a file gets whole moments and whole tables, without colour.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from textwrap import wrap
from typing import IO, Any

import click

from ..errors import spelled_out
from ..history.text import clipped, in_zone, moment, second
from ..manager import BackgroundWorkerManager

COLOURS = {
    "alive": "green",
    "succeeded": "green",
    "done": "green",
    "running": "cyan",
    "handed back": "bright_blue",
    "failed": "red",
    "dead": "red",
    "overdue": "red",
    "stuck": "red",
    "lost": "magenta",
    "timed out": "yellow",
    "cancelled": "yellow",
    "paused": "yellow",
    "skipped": "bright_black",
    "missed": "bright_black",
    "discarded": "bright_black",
    "signed off": "bright_black",
}
"""The colour of each state, with the meaning that it has on the dashboard."""
_LAST = ("NOTE", "HOLDS")  # the columns that may stand below their rows
_NOTED = ("overdue", "stuck", "paused")  # the states that colour a note

_GAP = 2  # spaces between two columns
_LEAST_NOTE = 24  # characters of a column that wraps its notes
_LEAST_ELASTIC = 12
_HOUR = timedelta(hours=1)
_UTC = "background.utc"
_MOMENT = re.compile(r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?(?:Z|\+00:00)")


# -- options -------------------------------------------------------------------------------------


def _keep_utc(context: click.Context, _parameter: click.Parameter, is_utc: bool) -> None:
    context.meta[_UTC] = is_utc


utc_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--utc", is_flag=True, expose_value=False, callback=_keep_utc, help="Show times in UTC, not in the local zone."
)


def shown_zone() -> tzinfo | None:
    """Return the zone of the moments that this command shows. None means the zone of this machine."""
    context = click.get_current_context(silent=True)
    return UTC if context and context.meta.get(_UTC) else None


def zone_name(at: datetime) -> str:
    """Return the name of the shown zone at the moment `at`, such as CET."""
    local = in_zone(at, shown_zone())
    name = f"{local:%Z}"
    return name if name.isalpha() else f"UTC{local.isoformat()[-6:]}"


# -- sentences -----------------------------------------------------------------------------------


def say(sentence: str, err: bool = False) -> None:
    """Print the sentence, with its moments in the shown zone."""
    click.echo(localised(spelled_out(sentence)), err=err)


def localised(text: str) -> str:
    """Write each moment of the text, which is in UTC, in the shown zone."""
    return _MOMENT.sub(_localised, text)


def _localised(match: re.Match[str]) -> str:
    try:
        return moment(datetime.fromisoformat(match[0]), shown_zone())
    except ValueError:  # it looks like a moment, but is a text of the application
        return match[0]


def coloured(text: str, colour: str, stream: IO[str] | None = None) -> str:
    """Return the text in the colour if the stream, by default the standard output, shows colour."""
    return click.style(text, fg=colour) if _shows_colour(stream or sys.stdout) else text


def _shows_colour(stream: IO[str]) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


# -- moments and tables --------------------------------------------------------------------------


@dataclass(frozen=True)
class Screen:
    """The place that a command prints to: a terminal of some width, or a pipe."""

    clock: datetime
    width: int | None
    """The columns of the terminal. None for a pipe."""

    @classmethod
    def of(cls, clock: datetime) -> "Screen":
        return cls(clock, shutil.get_terminal_size().columns if sys.stdout.isatty() else None)

    def since(self, at: datetime | None) -> str:
        """Write the moment by its distance, such as "in 12 s" or "3 min ago". For moments that are not ticks."""
        return second(at, shown_zone()) if self.width is None else self._near(at)

    def next(self, tick: datetime | None) -> str:
        """Write the tick by its distance, such as "in 12 s" or "3 min ago"."""
        return moment(tick, shown_zone()) if self.width is None else self._near(tick)

    def at(self, at: datetime | None) -> str:
        """Write the moment to the second, with the date if it is not today."""
        return self.tick(at and at.replace(microsecond=0))

    def tick(self, tick: datetime | None) -> str:
        """Write the moment with its fraction of a second, with the date if it is not today."""
        if self.width is None or tick is None:
            return moment(tick, shown_zone())
        fraction = f"{tick:.%f}".rstrip("0") if tick.microsecond else ""
        return self._dated(tick, "%H:%M:%S") + fraction

    def table(
        self,
        headers: Sequence[str],
        rows: Iterable[Sequence[str]],
        elastic: Sequence[str] = (),
        spare: Sequence[str] = (),
        has_moments: bool = True,
    ) -> str:
        """Write the rows as a table. In a terminal, a line above names the zone of the moments.

        Where the terminal is narrow, shorten the cells of the columns `elastic`. If that is not enough, leave out the
        columns `spare`, in their order.
        """
        if self.width is None:
            return table(headers, rows)
        style = _styled if _shows_colour(sys.stdout) else _plain
        text = table(headers, rows, self.width, elastic, spare, style)
        return f"{self._zone()}\n{text}" if has_moments else text

    def facts(self, facts: Mapping[str, str]) -> str:
        """Write one fact per line. In a terminal, a line above names the zone of the moments."""
        width = max(map(len, facts))
        style = _styled if _shows_colour(sys.stdout) else _plain
        lines = [
            f"{name.ljust(width)}  {style(name.upper(), spelled_out(text), spelled_out(text))}"
            for name, text in facts.items()
        ]
        return "\n".join(lines if self.width is None else [self._zone(), *lines])

    def _zone(self) -> str:
        text = f"Times are in {zone_name(self.clock)}."
        return click.style(text, dim=True) if _shows_colour(sys.stdout) else text

    def _near(self, at: datetime | None) -> str:
        if at is None:
            return "-"
        distance = abs(at - self.clock)
        if distance >= _HOUR:
            return self._dated(at, "%H:%M")
        seconds = int(distance.total_seconds())
        length = f"{seconds // 60} min" if seconds >= 60 else f"{seconds} s"
        return "now" if seconds == 0 else f"in {length}" if at > self.clock else f"{length} ago"

    def _dated(self, at: datetime, form: str) -> str:
        local = in_zone(at, shown_zone())
        days = (local.date() - in_zone(self.clock, shown_zone()).date()).days
        day = {0: "", -1: "yesterday ", 1: "tomorrow "}.get(days, f"{local:%Y-%m-%d} ")
        return f"{day}{local.strftime(form)}"


def screen_of(manager: BackgroundWorkerManager) -> Screen:
    """Return the screen of this command. Distances are measured by the database's clock."""
    return Screen.of(manager.history.clock())


Style = Callable[[str, str, str], str]
"""Styles the padded text of a cell, from its header, the text, and the whole cell."""


def _plain(_header: str, text: str, _cell: str) -> str:
    return text


def _styled(header: str, text: str, cell: str) -> str:
    if header == cell:
        return click.style(text, bold=True)
    if header == "STATE":
        colour = next((COLOURS[state] for state in COLOURS if cell.startswith(state)), None)
    else:
        colour = next((COLOURS[state] for state in _NOTED if header == "NOTE" and re.search(rf"{state}\b", cell)), None)
    return click.style(text, fg=colour) if colour else text


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    width: int | None = None,
    elastic: Sequence[str] = (),
    spare: Sequence[str] = (),
    style: Style = _plain,
) -> str:
    """Write left-aligned columns, two spaces apart, without the empty columns.

    A table that is wider than `width` wraps its notes, or has them below their rows. If that is not enough, it shortens
    the cells of the columns `elastic`. Then it leaves out the columns `spare` in their order, and wraps the widest.
    """
    lines = [[header.upper() for header in headers], *([spelled_out(cell) for cell in row] for row in rows)]
    columns = [column for column in zip(*lines, strict=True) if any(column[1:])]
    notes: tuple[str, ...] = ()
    if width is not None:
        columns, notes = _fitting(columns, width, elastic, spare)
    widths = _widths(columns, width)
    text = []
    for number, line in enumerate(zip(*columns, strict=True)):
        text += _wrapped([column[0] for column in columns], line, widths, style)
        if notes and notes[number] and number:
            text += [
                style("NOTE", f"    {part}", notes[number]) for part in wrap(notes[number], max(8, (width or 0) - 4))
            ]
    return "\n".join(text)


Columns = list[tuple[str, ...]]


def _fitting(
    columns: Columns, width: int, elastic: Sequence[str], spare: Sequence[str]
) -> tuple[Columns, tuple[str, ...]]:
    """Return the columns that are shown, and the notes that do not fit in a column."""
    notes: tuple[str, ...] = ()
    if _total(map(_widest, columns)) > width and columns[-1][0] in _LAST:
        *others, last = columns
        if _total(map(_least, columns)) > width:
            columns, notes = others, last
    for header in elastic:
        excess = _total(map(_least, columns)) - width
        columns = [_shortened(each, excess) if each[0] == header.upper() else each for each in columns]
    for header in spare:
        if _total(map(_least, columns)) > width:
            columns = [each for each in columns if each[0] != header.upper()]
    return columns, notes


def _shortened(column: tuple[str, ...], excess: int) -> tuple[str, ...]:
    most = max(_LEAST_ELASTIC, _widest(column) - max(0, excess))
    return tuple(clipped(cell, most) for cell in column)


def _least(column: Sequence[str]) -> int:
    """Return the least width of a column that is not wrapped, except for notes."""
    widest = _widest(column)
    return min(widest, max(_LEAST_NOTE, widest * 6 // 10)) if column[0] in _LAST else widest  # two lines, then


def _widths(columns: Columns, width: int | None) -> list[int]:
    """Return the width of each column. Make the last note, or else the widest column, narrower until all fit."""
    widths = [_widest(column) for column in columns]
    while width is not None and (excess := _total(widths) - width) > 0:
        if columns[-1][0] in _LAST and widths[-1] > _LEAST_NOTE:
            widths[-1] = max(_LEAST_NOTE, widths[-1] - excess)
            continue
        words = [max(len(word) for cell in column for word in cell.split() or [""]) for column in columns]
        may_shrink = [number for number in range(len(widths)) if widths[number] > words[number]]
        widest = max(may_shrink or range(len(widths)), key=widths.__getitem__)
        if widths[widest] <= 4:
            break  # no terminal is as narrow as that
        widths[widest] -= 1
    return widths


def _widest(column: Sequence[str]) -> int:
    return max(map(len, column))


def _total(widths: Iterable[int]) -> int:
    return sum(width + _GAP for width in widths) - _GAP


def _wrapped(headers: list[str], line: Sequence[str], widths: list[int], style: Style) -> list[str]:
    """Return the lines of one row."""
    cells = [
        wrap(cell, width, break_on_hyphens=False) if len(cell) > width else [cell]
        for cell, width in zip(line, widths, strict=True)
    ]
    text = []
    for number in range(max(map(len, cells), default=0)):
        parts = [cell[number] if number < len(cell) else "" for cell in cells]
        last = max((index for index, part in enumerate(parts) if part), default=-1)
        padded = [
            style(headers[index], part.ljust(widths[index]) if index < last else part, line[index])
            if part
            else " " * widths[index]
            for index, part in enumerate(parts[: last + 1])
        ]
        text.append((" " * _GAP).join(padded))
    return text
