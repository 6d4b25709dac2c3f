"""Metrics for Prometheus, about the fleet and about the requests to this process."""

import hmac

from flask import Blueprint, Response, current_app, request
from flask.typing import ResponseReturnValue

from ..host.dependencies import require
from .fleet_figures import Fleet
from .request_timing import RequestTiming


def metrics() -> Blueprint:
    """Return a blueprint for GET /metrics.

    With METRICS_TOKEN, a request needs it as its bearer token. Otherwise any client may read the metrics. Raises
    MissingDependency if prometheus-client is not installed.
    """
    require(["prometheus_client"], "/metrics")
    blueprint = Blueprint("metrics", __name__)
    timing, fleet = RequestTiming(), Fleet()
    blueprint.record_once(lambda state: timing.watch(state.app))  # type: ignore[arg-type]  # it is a Flask

    @blueprint.get("/metrics")
    def scrape() -> ResponseReturnValue:
        if not _is_allowed():
            return Response("A bearer token is required.\n", 401, {"WWW-Authenticate": "Bearer"}, "text/plain")
        from .prometheus import CONTENT_TYPE, text  # imported here, as only a scraped process needs the client library

        answer = text(fleet.figures(), timing.series)
        return Response(answer, headers={"Cache-Control": "no-store"}, content_type=CONTENT_TYPE)

    return blueprint


def _is_allowed() -> bool:
    token = current_app.config.get("METRICS_TOKEN")
    if not token:
        return True
    # Not `request.authorization`, which parses a token with a "=" inside as parameters.
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())
