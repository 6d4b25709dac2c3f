"""The shop: its pages, JSON, worker, mail and demo books. Delete this file to have an application without a shop."""

from collections.abc import Sequence
from hashlib import sha256
from secrets import token_urlsafe
from typing import Any

import svcs
from flask import Blueprint, Flask, abort, flash, jsonify, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_login import current_user, login_required
from sqlalchemy import Connection, func, insert, or_, select
from sqlalchemy.orm import joinedload
from wtforms import HiddenField, IntegerField
from wtforms.validators import InputRequired, NumberRange

import demo
from background import BackgroundWorkerManager, Message, MessageWorker, WorkerContext, current_workers
from forms import PostedForm, SearchForm
from mail import CAN_WAIT, MAILS, Mail, Payload
from models import Book, Order, OrderRepository, db
from routes import JSON, NOTHING, Page, newest_first
from throttle import throttled, user
from workers import MailWorker

ORDERS_OF_USER = "60 per hour"
SEARCHES_OF_NETWORK = "60 per minute"  # a search reads the whole table

shop = Blueprint("shop", __name__)
api = Blueprint("api", __name__, url_prefix=JSON)


def register(app: Flask, workers: BackgroundWorkerManager) -> None:
    """Add the shop to the app. Call this after the application's own pages are registered."""
    svcs.flask.register_factory(app, OrderRepository, lambda: OrderRepository(db.session))
    workers.add(OrderWorker)
    workers.add(OrderMailWorker)
    MAILS["order"] = about_order
    CAN_WAIT.add("order")
    demo.CONTENTS.add(stock_books)
    app.jinja_env.filters["money"] = money
    app.extensions["navigation"].for_all.append(("shop.catalogue", "Books"))
    app.extensions["navigation"].for_users.append(("shop.orders", "My orders"))
    app.register_blueprint(shop)
    app.register_blueprint(api)


def money(cents: int) -> str:
    return f"€{cents // 100:,}.{cents % 100:02d}"


class WholeNumberField(IntegerField):
    """A field for ASCII digits. Python's own `int` also reads 1_0 and digits of other scripts."""

    def process_formdata(self, valuelist: list[str]) -> None:
        texts = map(str.strip, valuelist)
        super().process_formdata([text if text.isascii() and text.isdecimal() else "" for text in texts])


class OrderForm(PostedForm):
    number = HiddenField(default=lambda: token_urlsafe(16))  # the form orders once, even if it is posted several times
    quantity = WholeNumberField(
        "Quantity",
        default=1,
        validators=[InputRequired(), NumberRange(min=1, max=100)],
        render_kw={"inputmode": "numeric"},
    )


# ---- Pages


def is_no_search() -> bool:
    return not request.args.get("q")


search_throttled = throttled(SEARCHES_OF_NETWORK, methods=None, exempt_when=is_no_search)


@shop.get("/books")
@search_throttled
def catalogue() -> ResponseReturnValue:
    form = SearchForm(request.args)
    page = find_books(form.q.data) if form.validate() else NOTHING
    return render_template("books/catalogue.html", form=form, page=page)


def find_books(text: str | None) -> Page:
    """Return the books whose title or author contains `text`."""
    query = select(Book)
    if text:
        query = query.where(
            or_(Book.title.icontains(text, autoescape=True), Book.author.icontains(text, autoescape=True))
        )
    return newest_first(query, Book.id)


@shop.get("/books/<id:book_id>")
def book(book_id: int) -> ResponseReturnValue:
    return book_page(book_id, OrderForm())


# The form posts to the book's own address, so that a visitor who logs in first comes back to the book.
@shop.post("/books/<id:book_id>")
@login_required
@throttled(ORDERS_OF_USER, user)
def order(book_id: int) -> ResponseReturnValue:
    form = OrderForm()
    if not form.validate():
        return book_page(book_id, form)
    if not place_order(current_user.id, book_id, form.quantity.data, form.number.data):
        return book_page(book_id, form, too_few=True)
    flash("Thank you, your order is placed. We will confirm it by e-mail.", "success")
    return redirect(url_for("shop.orders"))


def book_page(book_id: int, form: OrderForm, too_few: bool = False) -> ResponseReturnValue:
    book = db.get_or_404(Book, book_id)
    if too_few:
        form.quantity.errors = [not_enough(book)]
    return render_template("books/book.html", book=book, form=form)


def not_enough(book: Book) -> str:
    if book.stock:
        return f"Only {book.stock} left: please order fewer."
    return "Sorry, this book has just been sold out."


def place_order(user_id: int, book_id: int, quantity: int, number: str) -> bool:
    """Write the order and the message that settles it, in one transaction. Return False if the stock is too small.

    Concurrency: another request may post the same form. Only one enqueues the message's key, and both return True.
    """
    order_id = svcs.flask.get(OrderRepository).place(user_id, book_id, quantity)
    key = sha256(f"{user_id} {book_id} {quantity} {number}".encode()).hexdigest()
    is_new = current_workers.enqueue("orders", {"order": order_id}, key=key) is not None
    if is_new and order_id is not None:
        db.session.commit()
        return True
    db.session.rollback()
    return not is_new


@shop.get("/orders")
@login_required
def orders() -> ResponseReturnValue:
    own = select(Order).where(Order.user_id == current_user.id).options(joinedload(Order.book))
    return render_template("books/orders.html", page=newest_first(own, Order.id))


# ---- JSON


@api.get("/books")
@search_throttled
def books_json() -> ResponseReturnValue:
    form = SearchForm(request.args)
    if not form.validate():
        abort(400, f"q: {form.q.errors[0]}")
    page = find_books(form.q.data)
    following = page.following and url_for("api.books_json", q=form.q.data, after=page.following)
    return jsonify(books=[book_as_json(book) for book in page.rows], next=following)


@api.get("/books/<id:book_id>")
def book_json(book_id: int) -> ResponseReturnValue:
    return jsonify(book_as_json(db.get_or_404(Book, book_id)))


def book_as_json(book: Book) -> dict[str, Any]:
    names = ("id", "title", "author", "isbn", "description", "price_cents", "stock")
    return {name: getattr(book, name) for name in names}


# ---- The workers, and the mail


class OrderWorker(MessageWorker):
    """Take the books of the placed orders from the stock, once for each order, and mail the customers."""

    topic = "orders"

    def handle_many(self, messages: Sequence[Message], context: WorkerContext) -> None:
        orders = sorted({message.payload["order"] for message in messages})
        # Each order is settled once, so each customer gets one mail.
        settled = context.services.get(OrderRepository).settle(orders)
        current_workers.enqueue_many(OrderMailWorker.topic, [{"order": order_id} for order_id in settled])


class OrderMailWorker(MailWorker):
    """Send the mails about orders. Their own topic keeps them from delaying a link that a reader waits for.

    `MailWorker` still sends the mails about orders that an earlier release enqueued.
    """

    topic = "order_mail"


def about_order(order_id: int, _payload: Payload, context: WorkerContext) -> Mail | None:
    order = context.services.get(OrderRepository).get(order_id)
    if order is None or order.user.is_deleted:
        return None
    text = render_template("books/order_mail.txt", order=order)
    return Mail(order.user.email, f"Your order {order.id}: {order.status}", text)


# ---- The demo shop

BOOKS = [
    ("Pride and Prejudice", "Jane Austen", 1290, "Elizabeth Bennet, Mr Darcy, and the price of first impressions."),
    ("Frankenstein", "Mary Shelley", 1150, "A student makes a creature, and leaves it to make itself."),
    ("Moby-Dick", "Herman Melville", 1690, "One captain, one whale, and everything there is to know about whaling."),
    ("Jane Eyre", "Charlotte Brontë", 1390, "A governess, a house with a locked attic, and an unbending will."),
    ("Great Expectations", "Charles Dickens", 1450, "Pip comes into money, and learns the giver's name."),
    ("The Moonstone", "Wilkie Collins", 1250, "A diamond vanishes from a country house. The first detective novel."),
    ("Middlemarch", "George Eliot", 1790, "A provincial town, and the people who wanted more of it."),
    ("Treasure Island", "Robert Louis Stevenson", 990, "A map, a sea cook with one leg, and pieces of eight."),
    ("Around the World in Eighty Days", "Jules Verne", 1090, "A wager, a timetable, and a forgotten time zone."),
    ("The Time Machine", "H. G. Wells", 890, "A traveller comes late to dinner, from the year 802,701."),
    ("Dracula", "Bram Stoker", 1190, "Diaries, letters and telegrams about a guest from Transylvania."),
    ("The Adventures of Sherlock Holmes", "Arthur Conan Doyle", 1350, "Twelve cases from 221B Baker Street."),
]


def stock_books(connection: Connection) -> None:
    """Write the demo shop's books, unless there are books."""
    if connection.scalar(select(func.count()).select_from(Book)):
        return
    connection.execute(
        insert(Book),
        [
            {"title": title, "author": author, "price_cents": price, "stock": 5 + 3 * i, "description": description}
            for i, (title, author, price, description) in enumerate(BOOKS)
        ],
    )
