"""Counts and times the requests of this process, in memory, for Prometheus."""

import os
import socket
from time import perf_counter
from typing import TYPE_CHECKING

from flask import Flask, Response, request

from ..database.connections import made_once

if TYPE_CHECKING:
    from .prometheus import RequestSeries

_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"))
_BEGAN, _STATUS = "background.request.began", "background.request.status"


class RequestTiming:
    """Counts and times the requests to one application in this process."""

    def watch(self, app: Flask) -> None:
        """Measure every request, from before the first hook of `app` until after its last hook."""
        app.before_request_funcs.setdefault(None, []).insert(0, self._began)
        app.after_request(self._answered)
        app.teardown_request(self._ended)

    @made_once
    def series(self) -> "RequestSeries":
        from .prometheus import RequestSeries  # here, because a process that serves nothing needs no client library

        return RequestSeries()

    def _began(self) -> None:
        request.environ[_BEGAN] = perf_counter()

    def _answered(self, response: Response) -> Response:
        request.environ[_STATUS] = response.status_code
        return response

    def _ended(self, _error: BaseException | None) -> None:
        environ, rule = request.environ, request.url_rule
        began = environ.pop(_BEGAN, None)
        if began is None:
            return
        seconds = perf_counter() - began
        method = request.method if request.method in _METHODS else "other"
        # The rule, such as "/books/<id>", not the path: a client could make up paths, and each would be a series.
        labels = (method, rule.rule if rule else "none", f"{socket.gethostname()}:{os.getpid()}")
        self.series.requests.labels(*labels, str(environ.get(_STATUS, 500))).inc()
        self.series.durations.labels(*labels).observe(seconds)
