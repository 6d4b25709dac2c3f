"""Metrics for Prometheus: those of the fleet, and of the requests to this process."""

import hmac

from flask import Blueprint, Response, current_app, request
from flask.typing import ResponseReturnValue

from .figures import Fleet
from .traffic import Traffic


def metrics() -> Blueprint:
    """GET /metrics, for everybody or, where METRICS_TOKEN is set, for who brings it as a bearer token."""
    blueprint = Blueprint("metrics", __name__)
    traffic, fleet = Traffic(), Fleet()
    blueprint.record_once(lambda state: traffic.watch(state.app))  # type: ignore[arg-type]  # it is a Flask

    @blueprint.get("/metrics")
    def scrape() -> ResponseReturnValue:
        if not _is_allowed():
            return Response("A bearer token is asked for.\n", 401, {"WWW-Authenticate": "Bearer"}, "text/plain")
        from .exposition import CONTENT_TYPE, text  # brings the client library, for who is scraped

        answer = text(fleet.figures(), traffic.registry)
        return Response(answer, headers={"Cache-Control": "no-store"}, content_type=CONTENT_TYPE)

    return blueprint


def _is_allowed() -> bool:
    token = current_app.config.get("METRICS_TOKEN")
    given = request.authorization
    if not token:
        return True
    if given is None or given.type != "bearer" or given.token is None:
        return False
    return hmac.compare_digest(given.token.encode(), token.encode())
