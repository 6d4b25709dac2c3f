"""Four processes of the shop, and orders that arrive while one of them is killed."""

import http.client
import os
import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus

from flask import Flask
from support.fork_server import Nursery
from support.mail_server import MailServer
from support.processes import environment, eventually, gunicorn
from support.run_traces import Effects
from support.shop import PASSWORD

from background.database.tables import messages
from models import Book, Order, User, db
from tests.promise.test_fleet import browser, post


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
    more = {"PROBE_WORKERS": "order_worker,order_mail_worker", "MAIL_URL": mails.url(), "WORKERS_LEASE_SECONDS": 2}
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
    # A client cannot know whether its order was placed if the server's process was killed during the request.
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
