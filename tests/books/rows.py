"""Books and orders, and the pages that show them, for the tests."""

from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask

from models import Book, Order, User, db

EVERYONES = {"shop.catalogue", "shop.book", "api.books_json", "api.book_json"}
CUSTOMERS = {"shop.order", "shop.orders"}
PAGES = ("/books", "/books/1", "/orders")
JSON = ("/api/books", "/api/books/1")


def add_book(text: str = "Middlemarch") -> None:
    """Add a book with `text` as title, author and description, and an order of the book for each user."""
    book = Book(title=text[:200], author=text[:200], description=text, price_cents=1, stock=10**9)
    db.session.add(book)
    db.session.flush()
    for user_id in db.session.scalars(db.select(User.id)).all():
        db.session.add(Order(user_id=user_id, book_id=book.id, quantity=1, price_cents=1))


@pytest.fixture
def make_book(app: Flask) -> Callable[..., int]:
    """Make and commit a book with the given columns. Return its id."""

    def make(**columns: Any) -> int:
        usual = {"title": "Middlemarch", "author": "George Eliot", "price_cents": 1250, "stock": 5}
        with app.app_context():
            book = Book(**usual | columns)
            db.session.add(book)
            db.session.commit()
            return book.id

    return make
