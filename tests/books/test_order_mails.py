"""The mails about orders reach a real server, and delay no other order."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from flask import Flask
from sqlalchemy import select
from support.databases import on_sqlite
from support.fleet import wait_until
from support.mail_server import MailServer

from background import BackgroundWorkerManager
from background.database.tables import messages
from mail import HourlyLimit
from models import Book, Order, User, db
from tests.shop.test_mail import (  # noqa: F401 - some are fixtures
    end_the_hour,
    mail_about,
    mail_through,
    make_server,
    server,
    states,
    text_of,
)


@pytest.fixture
def make_order(app: Flask, make_user: Callable[..., User]) -> Callable[..., int]:
    def make(name: str = "Nat", status: str = "confirmed", title: str = "Middlemarch") -> int:
        user = make_user(email="nat@example.com", name=name)
        with app.app_context():
            book = Book(title=title, author="George Eliot", price_cents=1250, stock=5)
            order = Order(user_id=user.id, book=book, quantity=2, price_cents=1250, status=status)
            db.session.add(order)
            db.session.commit()
            return order.id

    return make


@pytest.mark.parametrize("topic", ["order_mail", "mail"])  # releases before this one enqueue for `mail`
def test_the_customer_gets_a_mail_about_the_confirmed_order(
    app: Flask, server: MailServer, make_order: Callable[..., int], mail_about: Callable[..., int], topic: str
) -> None:
    mail_through(app, server.url())
    order_id = make_order(title="Ñandú & <b>\nBcc: all@example.com\n.\n")
    message_id = mail_about(order_id, "order", topic)
    wait_until(lambda: states(app) == ["done"])
    [mail] = server.mails
    assert server.recipients == [["nat@example.com"]]
    assert mail["Subject"] == f"Your order {order_id}: confirmed"
    assert mail["Message-ID"].startswith(f"<{topic}.{message_id}.")
    assert mail["Bcc"] is None
    text = text_of(mail)
    assert text.startswith("Hello,\n\nthank you for your order.")
    assert "2 x Ñandú & <b>\nBcc: all@example.com\n.\n (George Eliot), €25.00\n" in text


@on_sqlite
def test_the_customer_gets_a_mail_about_the_sold_out_book(
    app: Flask, server: MailServer, make_order: Callable[..., int], mail_about: Callable[..., int]
) -> None:
    mail_through(app, server.url())
    order_id = make_order(status="sold out")
    mail_about(order_id, "order", "order_mail")
    wait_until(lambda: states(app) == ["done"])
    assert server.mails[0]["Subject"] == f"Your order {order_id}: sold out"
    assert "You will not be charged" in text_of(server.mails[0])


@pytest.mark.promise
@on_sqlite
def test_a_slow_server_delays_no_order(
    app: Flask,
    server: MailServer,
    make_order: Callable[..., int],
    mail_about: Callable[..., int],
    manager: BackgroundWorkerManager,
) -> None:
    """Check that nothing is locked while a mail is being sent, on the database with a single writer."""
    mail_through(app, server.url(), timeout=lambda: 30)
    server.trouble = ["hang"]
    mail_about(make_order(), "order", "order_mail")
    wait_until(lambda: server.mails)
    with app.app_context():
        db.session.add(Book(title="Emma", author="Jane Austen", price_cents=900, stock=1))
        db.session.commit()
    assert states(app) == ["running"]


def test_a_mail_about_an_order_holds_up_no_mail_about_an_account(
    app: Flask,
    server: MailServer,
    make_order: Callable[..., int],
    make_user: Callable[..., User],
    mail_about: Callable[..., int],
) -> None:
    mail_through(app, server.url(), timeout=lambda: 30)
    server.trouble = ["hang"]
    mail_about(make_order(), "order", "order_mail")
    wait_until(lambda: server.mails)
    mail_about(make_user().id)
    wait_until(lambda: sorted(states(app)) == ["done", "running"])


@pytest.mark.parametrize("topic", ["order_mail", "mail"])
def test_mails_about_orders_above_the_limit_of_an_hour_wait_until_it_is_over(
    app: Flask,
    server: MailServer,
    make_order: Callable[..., int],
    mail_about: Callable[..., int],
    manager: BackgroundWorkerManager,
    monkeypatch: pytest.MonkeyPatch,
    topic: str,
) -> None:
    monkeypatch.setattr(HourlyLimit, "most", 2)
    mail_through(app, server.url())
    order_id = make_order()
    for _ in range(4):
        mail_about(order_id, "order", topic)
    wait_until(lambda: sorted(states(app)) == ["done"] * 4 + ["waiting"] * 2)
    assert len(server.mails) == 2
    with app.app_context():
        waiting = db.session.execute(select(messages).where(messages.c.state == "waiting")).all()
    assert {row.topic for row in waiting} == {topic}
    for row in waiting:
        assert timedelta(minutes=58) < row.due_at - row.enqueued_at <= timedelta(hours=1)
    end_the_hour(app)
    manager.messages.retry([row.id for row in waiting])
    wait_until(lambda: len(server.mails) == 4)
    wait_until(lambda: states(app) == ["done"] * 6)


@on_sqlite
def test_no_mail_about_an_order_quotes_the_name_that_a_user_typed(
    app: Flask, server: MailServer, make_order: Callable[..., int], mail_about: Callable[..., int]
) -> None:
    mail_through(app, server.url())
    mail_about(make_order(name="You have won! https://evil.example/"), "order", "order_mail")
    wait_until(lambda: server.mails)
    assert text_of(server.mails[0]).startswith("Hello,\n")
    assert "won" not in f"{server.mails[0]}{text_of(server.mails[0])}"
