"""The workers settle placed orders, each once, and never sell more than the stock."""

import re
import threading
from collections.abc import Callable, Iterator
from email import message_from_bytes
from email.policy import default
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import svcs
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import Engine, event, select, text, update
from support.databases import close, on_postgresql, on_sqlite
from support.fleet import at_once, in_threads, wait_until
from support.shop import settings

from app import create_app
from background import BackgroundWorkerManager, current_workers
from background.database.tables import message_errors, messages
from mail import HourlyLimit, Mailer
from models import Book, Order, OrderRepository, db

Make = Callable[..., Any]


@pytest.fixture
def place(app: Flask, make_user: Make) -> Callable[..., int]:
    """Place an order with its message, as the shop does. Return its id."""
    user = make_user(email="nat@example.com", name="Nat")

    def place(book_id: int, quantity: int = 1, times: int = 1) -> int:
        with app.app_context():
            order_id = OrderRepository(db.session).place(user.id, book_id, quantity)
            for _ in range(times):
                current_workers.enqueue("orders", {"order": order_id})
            db.session.commit()
        assert order_id is not None
        return order_id

    return place


@pytest.fixture
def other(app: Flask, database_url: str, outbox: Path) -> Iterator[BackgroundWorkerManager]:
    """Give another instance of the shop on the same database, with the same outbox."""
    other = create_app(settings(database_url))
    svcs.flask.register_factory(other, Mailer, lambda: Mailer(None, "shop@example.com", outbox))
    yield other.extensions["background_workers"]
    close(other)


def statuses(app: Flask) -> list[str]:
    with app.app_context():
        return list(db.session.scalars(select(Order.status).order_by(Order.id)))


def stock_of(app: Flask, book_id: int) -> int:
    with app.app_context():
        return db.session.get_one(Book, book_id).stock


def queue(app: Flask) -> list[tuple[str, str]]:
    """Return the topic and state of every message."""
    with app.app_context():
        return [tuple(row) for row in db.session.execute(select(messages.c.topic, messages.c.state))]


def settle_and_commit(app: Flask, orders: list[int]) -> list[int]:
    with app.app_context():
        settled = OrderRepository(db.session).settle(orders)
        db.session.commit()
        return settled


def wait_until_all_is_done(app: Flask) -> None:
    wait_until(lambda: {state for _, state in queue(app)} <= {"done", "dead"}, "every message")
    with app.app_context():
        assert list(db.session.scalars(select(message_errors.c.error))) == []


def subjects(outbox: Path) -> list[str]:
    mails = outbox.glob("*.eml")  # without the temporary drafts
    return sorted(message_from_bytes(path.read_bytes(), policy=default)["Subject"] for path in mails)


def test_an_order_takes_the_stock_is_confirmed_and_leads_to_a_mail(
    app: Flask,
    client: FlaskClient,
    manager: BackgroundWorkerManager,
    make_user: Make,
    login: Make,
    make_book: Make,
    outbox: Path,
) -> None:
    login(client, make_user(email="nat@example.com"))
    book_id = make_book(stock=5)
    client.post(f"/books/{book_id}", data={"quantity": "2"})
    assert (statuses(app), stock_of(app, book_id)) == (["received"], 5)
    manager.start()
    wait_until(lambda: subjects(outbox), "the mail")
    wait_until_all_is_done(app)
    assert (statuses(app), stock_of(app, book_id)) == (["confirmed"], 3)
    assert subjects(outbox) == ["Your order 1: confirmed"]
    assert "confirmed" in client.get("/orders").text


def number_of(client: FlaskClient, book_id: int) -> str:
    """Return the number in the book's form."""
    found = re.search(r'name="number"[^>]* value="([^"]+)"', client.get(f"/books/{book_id}").text)
    assert found is not None
    return found[1]


def test_a_form_that_is_posted_several_times_at_once_orders_once(
    app: Flask, client: FlaskClient, make_user: Make, login: Make, make_book: Make
) -> None:
    book_id = make_book(stock=5)
    user = make_user()
    clients = [app.test_client() for _ in range(4)]
    for each in (client, *clients):
        login(each, user)
    form = {"quantity": "2", "number": number_of(client, book_id)}
    answers = at_once(4, lambda index: clients[index].post(f"/books/{book_id}", data=form))
    assert {(answer.status_code, answer.location) for answer in answers} == {(302, "/orders")}
    assert (statuses(app), queue(app)) == (["received"], [("orders", "waiting")])


def test_a_form_that_is_posted_again_is_answered_as_before_also_when_the_book_is_sold_out(
    app: Flask, client: FlaskClient, make_user: Make, login: Make, make_book: Make
) -> None:
    login(client, make_user())
    book_id = make_book(stock=2)
    form = {"quantity": "2", "number": number_of(client, book_id)}
    assert client.post(f"/books/{book_id}", data=form).location == "/orders"
    settle_and_commit(app, [1])
    assert stock_of(app, book_id) == 0
    assert client.post(f"/books/{book_id}", data=form).location == "/orders"
    assert "sold out" in client.post(f"/books/{book_id}", data=form | {"number": "another"}).text
    assert (statuses(app), len(queue(app))) == (["confirmed"], 1)


@on_sqlite
def test_each_page_user_and_quantity_makes_an_order_of_its_own(
    app: Flask, client: FlaskClient, make_user: Make, login: Make, make_book: Make
) -> None:
    book_id, other = make_book(), app.test_client()
    login(client, make_user())
    login(other, make_user())
    number = number_of(client, book_id)
    assert number != number_of(client, book_id)
    for each, form in [
        (client, {"quantity": "1", "number": number}),
        (client, {"quantity": "2", "number": number}),
        (client, {"quantity": "1", "number": number_of(client, book_id)}),
        (client, {"quantity": "1"}),
        (client, {"quantity": "1"}),
        (other, {"quantity": "1", "number": number}),
    ]:
        assert each.post(f"/books/{book_id}", data=form).location == "/orders"
    assert len(statuses(app)) == 6


@on_sqlite
def test_a_quantity_is_of_ascii_digits(
    app: Flask, client: FlaskClient, make_user: Make, login: Make, make_book: Make
) -> None:
    login(client, make_user())
    book_id = make_book(stock=500)
    for quantity in ("1_0", "٣", "+3", "-1", "0", "101", "1.0", "1e1", "3 0", "０", "²", "9" * 5_000, "", " "):
        answer = client.post(f"/books/{book_id}", data={"quantity": quantity})
        assert (answer.status_code, "invalid-feedback" in answer.text) == (200, True), quantity
    assert statuses(app) == []
    assert client.post(f"/books/{book_id}", data={"quantity": " 3 "}).location == "/orders"


@on_sqlite
def test_one_user_orders_sixty_times_an_hour_at_most(
    app: Flask, client: FlaskClient, make_user: Make, login: Make, make_book: Make
) -> None:
    login(client, make_user())
    book_id = make_book(stock=500)
    found = [client.post(f"/books/{book_id}", data={"quantity": "1"}).status_code for _ in range(61)]
    assert found == [302] * 60 + [429]
    assert len(statuses(app)) == 60


def test_a_late_order_is_sold_out_and_leads_to_a_mail(
    app: Flask, manager: BackgroundWorkerManager, make_book: Make, place: Make, outbox: Path
) -> None:
    book_id = make_book(stock=5)
    for quantity in (4, 2, 1):
        place(book_id, quantity)
    manager.start()
    wait_until_all_is_done(app)
    assert (statuses(app), stock_of(app, book_id)) == (["confirmed", "sold out", "confirmed"], 0)
    assert subjects(outbox) == ["Your order 1: confirmed", "Your order 2: sold out", "Your order 3: confirmed"]


@pytest.mark.promise
def test_two_instances_sell_no_more_than_the_stock(
    app: Flask,
    manager: BackgroundWorkerManager,
    other: BackgroundWorkerManager,
    make_book: Make,
    place: Make,
    outbox: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Name the books in both orders and each order twice, so that careless code deadlocks or sells too much."""
    monkeypatch.setattr(HourlyLimit, "most", 60)
    first, second = make_book(stock=20), make_book(stock=13)
    for index in range(60):
        place((first, second, second, first)[index % 4], 1 + index % 3, times=2)
    manager.start()
    other.start()
    wait_until_all_is_done(app)
    with app.app_context():
        sold = select(Order.book_id, Order.quantity).where(Order.status == "confirmed")
        taken = list(db.session.execute(sold))
    for book_id, stock in ((first, 20), (second, 13)):
        left = stock - sum(quantity for book, quantity in taken if book == book_id)
        assert left == stock_of(app, book_id) == 0
    assert statuses(app).count("received") == 0
    assert len(subjects(outbox)) == 60


def test_an_order_that_many_instances_settle_at_once_takes_its_books_once(
    app: Flask, make_book: Make, place: Make
) -> None:
    book_id = make_book(stock=5)
    order_id = place(book_id, 2)

    settled = in_threads(*[partial(settle_and_commit, app, [order_id])] * 6)
    assert sorted(settled) == [[]] * 5 + [[order_id]]
    assert stock_of(app, book_id) == 3


@on_postgresql
def test_an_instance_that_settles_orders_holds_no_book_while_it_waits_for_an_earlier_book(
    app: Flask, engine: Engine, make_book: Make, place: Make
) -> None:
    """Check that two batches with the same books in opposite order cannot wait for each other."""
    first, second = make_book(), make_book()
    orders = [place(second), place(first)]
    thread = threading.Thread(target=settle_and_commit, args=(app, orders))
    with engine.begin() as holder:
        holder.execute(update(Book).where(Book.id == first).values(stock=5))
        thread.start()
        is_waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
        with engine.connect() as connection:
            wait_until(lambda: connection.scalar(is_waiting), "the wait")
            assert connection.scalar(select(Book.id).where(Book.id == second).with_for_update(nowait=True)) == second
    thread.join()
    assert statuses(app) == ["confirmed", "confirmed"]


@on_postgresql
def test_placing_an_order_does_not_wait_for_instances_that_settle_other_orders(
    app: Flask, make_book: Make, place: Make
) -> None:
    book_id = make_book()
    order_id = place(book_id)
    with app.app_context():
        OrderRepository(db.session).settle([order_id])
        with app.app_context():
            db.session.execute(text("SET LOCAL lock_timeout = '5s'"))
            assert OrderRepository(db.session).place(1, book_id, 1)
            db.session.rollback()
        db.session.rollback()


def test_a_request_that_fails_leaves_neither_order_nor_message(
    app: Flask, client: FlaskClient, make_user: Make, login: Make, make_book: Make
) -> None:
    login(client, make_user())
    book_id = make_book()

    def fail(_session: Any) -> None:
        raise ZeroDivisionError

    event.listen(db.session, "before_commit", fail)
    try:
        with pytest.raises(ZeroDivisionError):
            client.post(f"/books/{book_id}", data={"quantity": "1"})
    finally:
        event.remove(db.session, "before_commit", fail)
    assert (statuses(app), queue(app)) == ([], [])


@on_sqlite
def test_a_deleted_order_is_skipped(
    app: Flask, manager: BackgroundWorkerManager, make_book: Make, place: Make, outbox: Path
) -> None:
    book_id = make_book(stock=5)
    gone, kept = place(book_id), place(book_id)
    with app.app_context():
        db.session.delete(db.session.get_one(Order, gone))
        db.session.commit()
    manager.start()
    wait_until_all_is_done(app)
    assert (statuses(app), stock_of(app, book_id)) == (["confirmed"], 4)
    assert subjects(outbox) == [f"Your order {kept}: confirmed"]


@on_sqlite
def test_a_message_without_an_order_does_not_block_its_neighbours(
    app: Flask, manager: BackgroundWorkerManager, make_book: Make, place: Make, outbox: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(manager.topics["orders"], "max_attempts", 1)
    place(make_book())
    with app.app_context():
        current_workers.enqueue("orders", {"ordre": 1})
        db.session.commit()
    manager.start()
    wait_until(lambda: sorted(queue(app)) == [("order_mail", "done"), ("orders", "dead"), ("orders", "done")])
    assert statuses(app) == ["confirmed"]
