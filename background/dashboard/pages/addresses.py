"""Addresses of the pages: this page with other parameters, and the place where a list goes on."""

from contextlib import suppress
from urllib.parse import quote, urlencode

from flask import g, request, url_for

from ...database.tables import LARGEST_ID
from ...history.records import Place
from ...history.text import moment_in, whole_number


def here(*without: str, **more: str) -> str:
    """Return this page's own address, `without` some of its parameters, and with `more` parameters."""
    kept = {key: value for key, value in request.args.items() if key not in without and value}
    path, query = url_for(str(request.endpoint), **(request.view_args or {})), urlencode(kept | more)
    return f"{path}?{query}" if query else path


def worker_url(page: str, name: str) -> str:
    """Return the address of a worker's page, such as "worker" or "pause".

    `url_for` is called once per page and request. One call per worker would take a large part of the time.
    """
    known: dict[str, list[str]] = g.setdefault("background_addresses", {})
    if page not in known:
        known[page] = url_for(f"background.{page}", name="~").rsplit("~", 1)
    start, end = known[page]
    return f"{start}{quote(name, safe='')}{end}"


def place_text(place: Place | None) -> str | None:
    """Write the place where the next page begins, for an address."""
    return f"{place[0].isoformat()}~{place[1]}" if place else None


def place_in(text: str) -> Place | None:
    """Read the text that `place_text` wrote. None, the first page, if it cannot be read."""
    at, _, id = text.partition("~")
    with suppress(ValueError):
        number = whole_number(id)
        return (moment_in(at), min(number, LARGEST_ID)) if number is not None else None
    return None
