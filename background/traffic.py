"""What this process was asked for and how long that took: counted in its memory, for the next scrape of it."""

import threading
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from time import perf_counter

from flask import Flask, Response, request

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"))
_BEGAN, _STATUS = "background.traffic.began", "background.traffic.status"


@dataclass
class Route:
    """The requests of one method that one rule was matched by."""

    method: str
    endpoint: str
    """The rule, such as "/books/<id>", or "none": never what somebody makes up, which would be a series each."""
    statuses: Counter[int] = field(default_factory=Counter)
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    """How many took so long, not cumulative; the last is for those beyond every bound."""
    seconds: float = 0.0


class Traffic:
    """The requests to one app in this process."""

    def __init__(self) -> None:
        self._routes: dict[tuple[str, str], Route] = {}
        self._counting = threading.Lock()

    def watch(self, app: Flask) -> None:
        """Measure every request, from before all that `app` does about it until all of that is done."""
        app.before_request_funcs.setdefault(None, []).insert(0, self._began)
        app.after_request(self._answered)
        app.teardown_request(self._ended)

    def routes(self) -> list[Route]:
        """A copy of what was counted by now, sorted."""
        with self._counting:
            return [
                Route(each.method, each.endpoint, each.statuses.copy(), each.buckets.copy(), each.seconds)
                for _, each in sorted(self._routes.items())
            ]

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
        key = rule.rule if rule else "none", method
        with self._counting:
            route = self._routes.get(key)
            if route is None:
                route = self._routes[key] = Route(method, key[0])
            route.statuses[environ.get(_STATUS, 500)] += 1
            route.buckets[bisect_left(BOUNDS, seconds)] += 1
            route.seconds += seconds
