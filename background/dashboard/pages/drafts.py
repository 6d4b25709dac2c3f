"""The form for another schedule, which shows a refused schedule again."""

from urllib.parse import urlencode

from flask import request, url_for

from ...errors import InvalidSchedule
from ...schedule.parsing import typed_schedule

LONGEST_NAME = 200
_DRAFT = ("edit", "schedule", "timezone")  # parameters of an address that shows a refused form again


def draft() -> dict[str, str] | None:
    """Return the refused input of a schedule's form, with the worker's name and the error. None without such input."""
    name, schedule, timezone = (request.args.get(key, "")[:LONGEST_NAME] for key in _DRAFT)
    try:
        if name:
            typed_schedule(schedule, timezone)
    except InvalidSchedule as error:
        return {"name": name, "schedule": schedule, "timezone": timezone, "error": error.message}
    return None


def here() -> str:
    """Return this page's own address, without the draft."""
    kept = [(key, value) for key, value in request.args.items() if key not in _DRAFT and value]
    path = url_for(str(request.endpoint), **(request.view_args or {}))
    return f"{path}?{urlencode(kept)}" if kept else path
