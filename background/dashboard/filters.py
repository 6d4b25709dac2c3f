"""Template filters of the dashboard, and the redirect and the message after a button."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from flask import Blueprint, flash, redirect, request, session, url_for
from flask.sessions import NullSession
from markupsafe import Markup
from werkzeug.wrappers import Response

from ..history.text import ahead, span
from .origin import is_own_path


def back(otherwise: str = "background.overview") -> Response:
    """Redirect to the page of the dashboard that the form names in `next`, or to `otherwise`."""
    target = request.form.get("next", "")
    is_ours = is_own_path(target) and target.startswith(url_for("background.overview"))
    return redirect(target if is_ours else url_for(otherwise), 303)


def say(text: str, category: str) -> None:
    """Show `text` on the next page. Without a SECRET_KEY no message is kept, and only the page shows the change."""
    if not isinstance(session, NullSession):
        flash(text, category)


# -- filters -------------------------------------------------------------------------------------


def add_filters(blueprint: Blueprint) -> None:
    for name, function in FILTERS.items():
        blueprint.add_app_template_filter(function, name)


def time_tag(at: datetime | None) -> str:
    """Write a moment, to the second. The script converts it to the viewer's zone."""
    if at is None:
        return "–"
    at = at.astimezone(UTC)
    text = utc_text(at)
    return Markup(f'<time datetime="{at.isoformat()}" title="{text}">{text}</time>')  # noqa: S704 - digits and signs


def utc_text(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(" ", "seconds").replace("+00:00", " UTC")


def state_tag(state: str) -> str:
    return Markup('<span class="state {}">{}</span>').format(state_class(state), state)


def state_class(state: str) -> str:
    return "state-" + state.replace(" ", "-")


def span_text(length: timedelta | float | None) -> str:
    """Write a length of time. A number means seconds."""
    if length is None:
        return "–"
    return span(length if isinstance(length, timedelta) else timedelta(seconds=length))


def countdown_tag(at: datetime, clock: datetime) -> str:
    """Write the time from `clock` to `at`. The script counts down."""
    seconds = int((at - clock).total_seconds())
    left = "now" if seconds < 1 else f"in {span(timedelta(seconds=seconds)) if seconds >= 60 else f'{seconds} s'}"
    return Markup(f'<time datetime="{at.isoformat()}" title="{utc_text(at)}" data-countdown>{left}</time>')  # noqa: S704


def number_text(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


FILTERS: dict[str, Callable[..., str]] = {
    "time_tag": time_tag,
    "utc_text": utc_text,
    "state_tag": state_tag,
    "state_class": state_class,
    "span_text": span_text,
    "countdown_tag": countdown_tag,
    "number_text": number_text,
    "ahead_text": ahead,
}
