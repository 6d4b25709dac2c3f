"""Metrics for Prometheus, about the fleet and about the requests to this process."""

import hmac
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from flask import Blueprint, Response, current_app, request
from flask.typing import ResponseReturnValue

from ..host.dependencies import require
from .fleet_figures import Fleet
from .peer import is_of_this_machine
from .request_timing import RequestTiming

if TYPE_CHECKING:
    from prometheus_client import Metric

_ONLY_HERE = (
    "METRICS_TOKEN is not set, so only programs on this machine may read the metrics, without a proxy; "
    "expected such a program. Set METRICS_TOKEN, and send it as the bearer token.\n"
)
_PARTS = ("", "fleet", "process")
_UNKNOWN = (
    "The scrape asks for of={!r} and detail={!r}; expected of=fleet, of=process or no `of`, and detail=full or no "
    "`detail`. Correct `params` in Prometheus's configuration.\n"
)


def metrics(more: "Callable[[], Iterable[Metric]]" = tuple) -> Blueprint:
    """Return a blueprint for GET /metrics. `more` returns metrics of the application, for each scrape.

    `?of=fleet` has the metrics of the fleet, which are the same from each process. `?of=process` has the metrics of
    this process, and reads no database. Of more than 250 workers, only `?detail=full` has the buckets of each.

    With METRICS_TOKEN, a request needs it as its bearer token. Otherwise only programs on this machine may read the
    metrics, and not through a proxy. Raises MissingDependency if prometheus-client is not installed.
    """
    require(["prometheus_client"], "/metrics")
    blueprint = Blueprint("metrics", __name__)
    timing, fleet = RequestTiming(), Fleet()
    blueprint.record_once(lambda state: timing.watch(state.app))  # type: ignore[arg-type]  # it is a Flask

    @blueprint.get("/metrics")
    def scrape() -> ResponseReturnValue:
        if (refusal := _refusal()) is not None:
            return refusal
        part, detail = request.args.get("of", ""), request.args.get("detail", "")
        if part not in _PARTS or detail not in ("", "full"):
            return Response(_UNKNOWN.format(part, detail), 400, mimetype="text/plain")
        from . import prometheus  # here, because a process that is not scraped needs no client library

        answer = b"" if part == "process" else prometheus.of_fleet(fleet.figures(detail == "full"))
        if part != "fleet":
            answer += prometheus.of_process(timing.series, more)
        return Response(answer, headers={"Cache-Control": "no-store"}, content_type=prometheus.CONTENT_TYPE)

    return blueprint


def _refusal() -> Response | None:
    """Return the response to a request that may not read the metrics. None if it may."""
    token = current_app.config.get("METRICS_TOKEN")
    if not token:
        return None if is_of_this_machine(request) else Response(_ONLY_HERE, 403, mimetype="text/plain")
    # Not `request.authorization`, which parses a token with a "=" inside as parameters.
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode()):
        return None
    return Response("A bearer token is required.\n", 401, {"WWW-Authenticate": "Bearer"}, "text/plain")
