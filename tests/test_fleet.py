"""A fleet of real processes on one database: each tick once, and nobody is told that the database is locked.

FLEET_TICKS=120 pytest -s tests/test_fleet.py -k consecutive    runs it at length.
"""

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

from conftest import PASSWORD, on_sqlite
from effects import Effects
from flask import Flask
from processes import environment, eventually, gunicorn, started

from models import User, db

TICKS = int(os.environ.get("FLEET_TICKS", "5"))
PERIOD = timedelta(seconds=float(os.environ.get("FLEET_PERIOD", "1")))


def test_four_gunicorn_workers_run_consecutive_ticks_once_each(database_url: str) -> None:
    effects = Effects(database_url)
    command = gunicorn("-w", "4", "--preload", "probe:create_app()")
    with started(command, environment(database_url, PROBE_PERIOD=PERIOD.total_seconds())) as server:
        server.wait_for("joined", times=4)
        # What the start caught up with may still run when the first tick after it is due, which is skipped then.
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
    rows = effects.history("ticker", found[0].tick)
    assert [(row["state"], row["attempt"]) for row in rows] == [("succeeded", 1)] * len(found)
    late = sorted((effect.at - effect.tick).total_seconds() for effect in found)
    print(
        f"\n{len(found)} ticks of {PERIOD} by {dict(Counter(effect.pid for effect in found))}; "
        f"seconds late: median {late[len(late) // 2]:.3f}, worst {late[-1]:.3f}"
    )


@on_sqlite
def test_eight_processes_of_logins_and_the_sweep_never_meet_a_locked_database(
    app: Flask, database_url: str, make_user: Callable[..., User]
) -> None:
    effects = Effects(database_url)
    users = [make_user() for _ in range(60)]
    command = gunicorn("-w", "8", "--preload", "probe:create_app()")
    with started(command, environment(database_url, PROBE_WORKERS="sweeper")) as server:
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
    """The statuses of logging these users in, one after the other, again and again."""
    statuses = []
    while time.monotonic() < until or len(statuses) < len(users):
        statuses.append(log_in(address, users[len(statuses) % len(users)]))
    return statuses


def log_in(address: str, user: User) -> int:
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()), _NoRedirect())
    data = urllib.parse.urlencode({"email": user.email, "password": PASSWORD}).encode()
    try:
        return int(opener.open(f"{address}/login", data, timeout=60).status)
    except urllib.error.HTTPError as answer:
        answer.close()
        return answer.code


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: object) -> None:
        """A redirect is the answer."""
