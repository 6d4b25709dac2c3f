"""A fleet of real processes on one database: each tick runs once, and no process fails with "database is locked".

FLEET_TICKS=120 pytest -s tests/promise/test_fleet.py -k consecutive runs the test for longer.
"""

import http.client
import http.cookiejar
import os
import signal
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http import HTTPStatus

from flask import Flask
from support.databases import on_sqlite
from support.fork_server import Nursery
from support.processes import WITHOUT_WARNINGS, environment, eventually, gunicorn
from support.run_traces import Effects
from support.shop import PASSWORD

from models import User, db

TICKS = int(os.environ.get("FLEET_TICKS", "5"))
PERIOD = timedelta(seconds=float(os.environ.get("FLEET_PERIOD", "1")))


def test_four_gunicorn_workers_run_consecutive_ticks_once_each(database_url: str, nursery: Nursery) -> None:
    effects = Effects(database_url)
    command = gunicorn("-w", "4", "--preload", "support.traced_app:create_app()")
    with nursery.forked(
        command, environment(database_url, PROBE_PERIOD=PERIOD.total_seconds(), **WITHOUT_WARNINGS)
    ) as server:
        server.wait_for("joined", times=4)
        # The run that catches up at the start may still be on at the first tick after it, which is then skipped.
        assert eventually(lambda: effects.ticks(), 20)
        since = effects.ticks()[0]
        assert eventually(lambda: len(effects.ticks()) > TICKS, TICKS * PERIOD.total_seconds() + 20)
        assert len(effects.instances(alive=True)) == 4
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert "Traceback" not in server.output
        assert "WARNING" not in server.output
    found = effects.check_consecutive(PERIOD, since)
    assert len(found) >= TICKS
    rows = [row for row in effects.history("ticker", found[0].tick) if row["state"] != "skipped"]
    assert [(row["state"], row["attempt"]) for row in rows] == [("succeeded", 1)] * len(found)
    late = sorted((effect.at - effect.tick).total_seconds() for effect in found)
    print(
        f"\n{len(found)} ticks of {PERIOD} by {dict(Counter(effect.pid for effect in found))}; "
        f"seconds late: median {late[len(late) // 2]:.3f}, worst {late[-1]:.3f}"
    )


@on_sqlite
def test_eight_processes_of_logins_and_the_sweep_never_meet_a_locked_database(
    app: Flask, database_url: str, make_user: Callable[..., User], nursery: Nursery
) -> None:
    effects = Effects(database_url)
    users = [make_user() for _ in range(60)]
    command = gunicorn("-w", "8", "--preload", "support.traced_app:create_app()")
    with nursery.forked(command, environment(database_url, PROBE_WORKERS="sweeper")) as server:
        server.wait_for("joined", times=8)
        address = server.wait_for(r"Listening at: (http://\S+)")[1]
        until = time.monotonic() + 4
        with ThreadPoolExecutor(8) as clients:
            answers = Counter(
                answer
                for each in clients.map(lambda mine: log_in_until(until, address, users[mine::8]), range(8))
                for answer in each
            )
        assert eventually(lambda: len(effects.check_once("sweeper")) >= 5)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert "locked" not in server.output
        assert "Traceback" not in server.output
    assert set(answers) == {HTTPStatus.FOUND}, answers
    assert answers[HTTPStatus.FOUND] > 50
    assert {state for state, _ in effects.states("sweeper")} <= {"succeeded", "skipped", "missed", "handed back"}
    with app.app_context():
        assert db.session.query(User).filter(User.last_login_at.is_(None)).count() == 0


def log_in_until(until: float, address: str, users: list[User]) -> list[int]:
    """Log these users in, one after the other, again and again. Return the statuses."""
    statuses = []
    while time.monotonic() < until or len(statuses) < len(users):
        statuses.append(log_in(address, users[len(statuses) % len(users)]))
    return statuses


def log_in(address: str, user: User) -> int:
    return post(browser(), f"{address}/login", email=user.email, password=PASSWORD)


def browser() -> urllib.request.OpenerDirector:
    """Return an opener that keeps its cookies, and returns a redirect as the response."""
    return urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()), _NoRedirect())


def post(opener: urllib.request.OpenerDirector, url: str, **fields: object) -> int:
    try:
        return int(opener.open(url, urllib.parse.urlencode(fields).encode(), timeout=60).status)
    except urllib.error.HTTPError as answer:
        answer.close()
        return answer.code


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: object) -> None:
        """Return a redirect as the response."""
