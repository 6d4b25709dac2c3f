"""The alert of an incident: its title, its text and its JSON, for readers and programs."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from flask import Flask
from werkzeug.routing import BuildError

from ..errors import spelled_out
from ..history.text import moment, second, span
from .incidents import Incident

OPENED, ENDED, TEST = "incident.opened", "incident.ended", "test"

_TITLES = {
    "failing": ("The worker {} is failing", "The worker {} is no longer failing"),
    "overdue": ("The worker {} is overdue", "The worker {} is no longer overdue"),
    "stuck": ("The worker {} is stuck", "The worker {} is no longer stuck"),
    "dead": ("Messages of the topic {} died", "The topic {} has no dead message"),
    "clock": ("The clock of {} is off", "The clock of {} is right again"),
    "silent": ("No instance is alive", "No instance was alive"),
    "test": ("A test of the alerts", ""),
}
_OF_WORKERS = ("failing", "overdue", "stuck")


def title(incident: Incident) -> str:
    """Return one line about the incident: that it is open, or that it has ended."""
    return _TITLES[incident.kind][incident.ended_at is not None].format(spelled_out(incident.subject))


def page_about(incident: Incident) -> tuple[str, dict[str, Any]]:
    """Return the endpoint of the dashboard's page about the incident, and its arguments."""
    if incident.kind in _OF_WORKERS:
        return "background.worker", {"name": incident.subject}
    if incident.kind == "dead":
        return "background.messages", {"topic": incident.subject, "state": "dead"}
    return "background.instances", {}


def alert(app: Flask, incident: Incident) -> dict[str, Any]:
    """Return the alert as the payload of a message. The random id stays the same in each attempt to send it."""
    return {
        "id": uuid4().hex,
        "type": OPENED if incident.ended_at is None else ENDED,
        "application": name_of(app),
        "kind": incident.kind,
        "subject": incident.subject,
        "title": title(incident),
        "opened_at": moment(incident.opened_at),
        "ended_at": moment(incident.ended_at) if incident.ended_at else None,
        "detail": incident.at_opening if incident.ended_at else incident.detail,
        "url": _url(app, incident),
    }


def trial(app: Flask) -> dict[str, Any]:
    """Return an alert without an incident, for a user who tries the configuration."""
    detail = "A user asked for this alert with `flask workers alerts --test`. Nothing is wrong."
    incident = Incident(0, "test", "", datetime.now(UTC), None, detail)
    return {**alert(app, incident), "type": TEST, "url": None}


def name_of(app: Flask) -> str:
    return str(app.config.get("APP_NAME") or app.name)


def subject_line(alerts: Sequence[Mapping[str, Any]]) -> str:
    """Return the subject of the mail."""
    more = f" (and {len(alerts) - 1} more)" if len(alerts) > 1 else ""
    return f"[{alerts[0]['application']}] {alerts[0]['title']}{more}"


def text(alerts: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of the mail."""
    return "\n----\n\n".join(map(_text, alerts))


def _text(alert: Mapping[str, Any]) -> str:
    opened, ended = (datetime.fromisoformat(each) if each else None for each in (alert["opened_at"], alert["ended_at"]))
    lines = [f"{alert['title']}.", "", alert["detail"], ""]
    if opened and ended and alert["kind"] != "silent":
        lines.append(f"From {second(opened)} to {second(ended)}, for {span(ended - opened)}.")
    elif alert["type"] == OPENED:
        lines += [f"Noticed at {second(opened)}.", "A second mail follows when the incident has ended."]
    if alert["url"]:
        lines += ["", alert["url"]]
    return "\n".join(lines).rstrip() + "\n"


def _url(app: Flask, incident: Incident) -> str | None:
    """Return the address of the page about the incident. None without a dashboard or its public address."""
    if not (address := app.config.get("PUBLIC_URL")):
        return None
    root = urlsplit(address)
    site = app.url_map.bind(root.netloc, root.path or "/", url_scheme=root.scheme)
    try:
        return str(site.build(*page_about(incident), force_external=True))
    except BuildError:
        return None
