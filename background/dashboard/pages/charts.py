"""The charts of the fleet, and the part of other pages with the charts of one worker or topic."""

from dataclasses import dataclass

from flask import Blueprint, abort, render_template, request
from flask.typing import ResponseReturnValue

from ...manager import the_manager
from ...tallies.charts import SPANS, Chart
from .. import chart as drawing
from .addresses import here

_USUAL = "24h"


def add_to(blueprint: Blueprint) -> None:
    blueprint.add_url_rule("/charts", "charts", charts_page)


@dataclass(frozen=True)
class Charts:
    """The pictures of one subject, and what stands around them."""

    chart: Chart
    pictures: list[drawing.Picture]
    keys: list[str]
    """The counts that the table shows."""
    of_runs: bool


def charts_page() -> ResponseReturnValue:
    topic = request.args.get("topic")
    if topic and not topic.isprintable():
        abort(404)
    return render_template(
        "background/charts.html",
        topic=topic,
        topics=list(the_manager().topics),
        runs=None if topic else run_charts(),
        messages=message_charts(topic),
        spans=span_links(),
        span=_span(),
    )


def run_charts(worker: str | None = None) -> Charts:
    """Draw the runs of a worker, or of the fleet, in the span that the address names."""
    chart = the_manager().charts.runs(worker, _span())
    pictures = drawing.runs(chart)
    return Charts(chart, pictures, [part.key for part in pictures[0].parts], True)


def message_charts(topic: str | None = None) -> Charts:
    """Draw the messages of a topic, or of all topics, in the span that the address names."""
    chart = the_manager().charts.messages(topic, _span())
    return Charts(chart, drawing.messages(chart), ["enqueued", "done", "failed", "dead", "discarded"], False)


def span_links() -> list[tuple[str, str, bool]]:
    """Return the text and the address of each span, and whether this page shows it."""
    return [(span.text, f"{here(span=key)}#charts", key == _span()) for key, span in SPANS.items()]


def _span() -> str:
    key = request.args.get("span", _USUAL)
    return key if key in SPANS else _USUAL
