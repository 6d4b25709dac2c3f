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
from contextlib import suppress
from datetime import timedelta
from http import HTTPStatus

from flask import Flask
from support.databases import on_sqlite
from support.fork_server import Nursery
from support.mail_server import MailServer
from support.processes import environment, eventually, gunicorn
from support.run_traces import Effects
from support.shop import PASSWORD

from background.database.tables import messages
from models import Book, Order, User, db

TICKS = int(os.environ.get("FLEET_TICKS", "5"))
PERIOD = timedelta(seconds=float(os.environ.get("FLEET_PERIOD", "1")))


def test_four_gunicorn_workers_run_consecutive_ticks_once_each(database_url: str, nursery: Nursery) -> None:
    effects = Effects(database_url)
    command = gunicorn("-w", "4", "--preload", "support.traced_app:create_app()")
    with nursery.forked(command, environment(database_url, PROBE_PERIOD=PERIOD.total_seconds(), PROXIES=1)) as server:
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


def test_stock_orders_and_mails_of_four_processes_agree_even_if_one_is_killed(
    app: Flask,
    database_url: str,
    make_user: Callable[..., User],
    make_book: Callable[..., int],
    nursery: Nursery,
) -> None:
    users = [make_user() for _ in range(6)]
    stocks = {make_book(stock=stock): stock for stock in (30, 60, 1_000)}
    mails = MailServer().start()
    more = {"PROBE_WORKERS": "order_worker,mail_worker", "MAIL_URL": mails.url(), "WORKERS_LEASE_SECONDS": 2}
    try:
        command = gunicorn("-w", "4", "--preload", "support.traced_app:create_app()")
        with nursery.forked(command, environment(database_url, **more)) as server:
            server.wait_for("joined", times=4)
            address = server.wait_for(r"Listening at: (http://\S+)")[1]
            with ThreadPoolExecutor(6) as clients:
                answers = [clients.submit(place_orders, address, user, list(stocks)) for user in users]
                assert eventually(lambda: len(mails.mails) > 10)
                os.kill(Effects(database_url).instances(alive=True).pop(), signal.SIGKILL)
            placed = sum(answer.result() for answer in answers)
            assert eventually(lambda: set(states_of_messages(app)) == {"done"}), states_of_messages(app)
            server.signal(signal.SIGTERM)
            assert server.wait() == 0
    finally:
        mails.close()
    with app.app_context():
        orders = list(db.session.scalars(db.select(Order)))
        left = {book.id: book.stock for book in db.session.scalars(db.select(Book))}
    # A client whose process was killed during its request cannot know whether the order was placed.
    assert placed <= len(orders) <= placed + len(users)
    assert {order.status for order in orders} <= {"confirmed", "sold out"}
    assert min(left.values()) < 3  # the books with the smallest stock are sold out
    for book_id, stock in stocks.items():
        taken = [order.quantity for order in orders if (order.book_id, order.status) == (book_id, "confirmed")]
        assert left[book_id] == stock - sum(taken) >= 0
    assert len({mail["Message-ID"] for mail in mails.mails}) == len(orders)
    assert {mail["Subject"] for mail in mails.mails} == {f"Your order {order.id}: {order.status}" for order in orders}


def place_orders(address: str, user: User, books: list[int]) -> int:
    """Place 25 orders. Return the number of orders that were certainly accepted."""
    shop, taken = browser(), 0
    assert post(shop, f"{address}/login", email=user.email, password=PASSWORD) == HTTPStatus.FOUND
    for number in range(25):
        with suppress(OSError, http.client.HTTPException):  # the process was killed before it responded
            url = f"{address}/books/{books[number % len(books)]}"
            taken += post(shop, url, quantity=1 + number % 3) == HTTPStatus.FOUND
    return taken


def states_of_messages(app: Flask) -> Counter[str]:
    with app.app_context():
        return Counter(db.session.scalars(db.select(messages.c.state)))


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
