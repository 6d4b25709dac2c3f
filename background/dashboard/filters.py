"""Template filters of the dashboard, and the redirect and the message after a button."""

import re
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from flask import Blueprint, flash, redirect, request, session, url_for
from flask.sessions import NullSession
from markupsafe import Markup
from werkzeug.wrappers import Response

from ..history.text import ahead, moment, postponed, span
from .origin import is_own_path
from .tracebacks import parts


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
    """Write a moment, to the second. The script converts it to the browser's zone."""
    if at is None:
        return "–"
    at = at.astimezone(UTC)
    text = utc_text(at)
    return Markup(f'<time datetime="{at.isoformat()}" title="{text}">{text}</time>')  # noqa: S704 - digits and signs


def utc_text(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(" ", "seconds").replace("+00:00", " UTC")


def field_text(at: datetime) -> str:
    """Write the moment in UTC, for a field of the type datetime-local."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S")


@lru_cache(maxsize=100)
def state_tag(state: str) -> str:
    return Markup('<span class="state {}">{}</span>').format(state_class(state), state)


def state_class(state: str) -> str:
    return "state-" + state.replace(" ", "-")


def span_text(length: timedelta | float | None) -> str:
    """Write a length of time. A number means seconds."""
    if length is None:
        return "–"
    return span(length if isinstance(length, timedelta) else timedelta(seconds=length))


def length_text(seconds: float | None) -> str:
    """Write a length of time: 31.2 ms, 4.05 s or 2 min 3 s."""
    if seconds is None:
        return "–"
    if seconds >= 60:
        return span(timedelta(seconds=seconds))
    number, unit = (seconds, "s") if seconds >= 1 else (seconds * 1000, "ms")
    return f"{float(f'{number:.3g}'):g} {unit}"


def countdown_tag(at: datetime, clock: datetime) -> str:
    """Write the time from `clock` to `at`. The script counts down."""
    seconds = int((at - clock).total_seconds())
    left = "now" if seconds < 1 else f"in {span(timedelta(seconds=seconds)) if seconds >= 60 else f'{seconds} s'}"
    return Markup(f'<time datetime="{at.isoformat()}" title="{utc_text(at)}" data-countdown>{left}</time>')  # noqa: S704


def number_text(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def percent_text(share: float) -> str:
    """Write a share from 0.0 to 1.0. Rounded down, so that 100 % means all."""
    return f"{int(share * 1_000) / 10:g} %"


def sentence_text(sentence: str) -> str:
    """Write a sentence whose moments the script converts to the browser's zone."""
    return Markup("").join(
        _moment_tag(text) if number % 2 else text for number, text in enumerate(_MOMENT.split(sentence))
    )


def _moment_tag(text: str) -> str:
    with suppress(ValueError):  # an error's text may have any digits
        at = datetime.fromisoformat(text)
        return Markup('<time datetime="{}" title="{}">{}</time>').format(at.isoformat(), utc_text(at), text)
    return text


def log_text(lines: str) -> str:
    """Write the log lines of a run. The script converts their moments to the browser's zone."""
    tag = Markup('<time data-exact="{0}" title="{0}">{0}</time>')
    parts = (tag.format(text) if number % 2 else text for number, text in enumerate(_LOGGED_AT.split(lines)))
    return Markup("").join(parts)


_MOMENT = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{3,6})?Z)", re.ASCII)
_LOGGED_AT = re.compile(rf"^{_MOMENT.pattern}(?= )", re.MULTILINE | re.ASCII)


FILTERS: dict[str, Callable[..., object]] = {
    "time_tag": time_tag,
    "utc_text": utc_text,
    "state_tag": state_tag,
    "state_class": state_class,
    "span_text": span_text,
    "length_text": length_text,
    "countdown_tag": countdown_tag,
    "number_text": number_text,
    "percent_text": percent_text,
    "ahead_text": ahead,
    "iso_text": moment,
    "field_text": field_text,
    "sentence_text": sentence_text,
    "log_text": log_text,
    "traceback_parts": parts,
    "postponed_text": postponed,
}
