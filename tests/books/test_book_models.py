"""The tables of books and orders enforce their rules."""

from collections.abc import Callable

import pytest
from flask import Flask
from sqlalchemy.exc import IntegrityError

from models import Book, Order, User, db


@pytest.mark.parametrize(
    "wrong",
    [{"stock": -1}, {"price_cents": -1}],
)
def test_a_book_has_no_negative_stock_or_price(app: Flask, wrong: dict[str, int]) -> None:
    with app.app_context():
        db.session.add(Book(**{"title": "Emma", "author": "Jane Austen", "price_cents": 1, "stock": 1, **wrong}))
        with pytest.raises(IntegrityError):
            db.session.commit()
        db.session.rollback()


def test_an_order_has_a_positive_quantity(app: Flask, make_user: Callable[..., User]) -> None:
    user = make_user()
    with app.app_context():
        book = Book(title="Emma", author="Jane Austen", price_cents=1290)
        db.session.add(Order(user_id=user.id, book=book, quantity=1, price_cents=1290))
        db.session.commit()
        db.session.add(Order(user_id=user.id, book=book, quantity=0, price_cents=1290))
        with pytest.raises(IntegrityError):
            db.session.commit()
        db.session.rollback()


def test_an_order_belongs_to_a_user_that_exists(app: Flask) -> None:
    with app.app_context():
        db.session.add(Order(user_id=99, book_id=99, quantity=1, price_cents=1))
        with pytest.raises(IntegrityError):
            db.session.commit()
        db.session.rollback()
