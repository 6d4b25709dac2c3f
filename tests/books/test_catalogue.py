"""The pages and the JSON of books and orders, requested as a browser does, on both databases."""

import re

from sqlalchemy import select
from support.databases import on_sqlite
from support.shop import PASSWORD

from models import Book, Order, db
from tests.shop.test_routes import assert_own, queries, reader, text_of, walk  # noqa: F401 - one is a fixture


def stock_of(app, book_id: int) -> int:
    with app.app_context():
        return db.session.get_one(Book, book_id).stock


def orders_of(app) -> list[Order]:
    with app.app_context():
        return list(db.session.scalars(select(Order).order_by(Order.id)))


# ---- The catalogue


def test_the_catalogue_is_searched_by_title_and_author(client, make_book):
    make_book(title="Middlemarch", author="George Eliot")
    make_book(title="Beloved", author="Toni Morrison")
    make_book(title="100% Wool", author="A_B")
    for text, titles in {
        "middle": ["Middlemarch"],
        "MORRISON": ["Beloved"],
        "0%": ["100% Wool"],
        "a_b": ["100% Wool"],
        "%": ["100% Wool"],
        " ": ["100% Wool", "Beloved", "Middlemarch"],
        "nothing": [],
    }.items():
        page = client.get("/books", query_string={"q": text})
        assert re.findall(r'<a href="/books/\d+">([^<]*)</a>', page.text) == titles, text


def test_paging_shows_every_book_once_and_the_newest_comes_first(client, make_book):
    ids: list[str] = []
    for number in (0, 19, 20, 21, 45):
        ids += [str(make_book(title=f"Book {index}")) for index in range(len(ids), number)]
        assert walk(client, "/books", r'<a href="/books/(\d+)">') == ids[::-1]


@on_sqlite
def test_paging_keeps_the_search(client, make_book):
    for index in range(50):
        make_book(title=("Odd & odd" if index % 2 else "Even") + f" {index}")
    titles = walk(client, "/books?q=odd+%26", r'<a href="/books/\d+">([^<]*)</a>')
    assert titles == [f"Odd &amp; odd {index}" for index in range(49, 0, -2)]


def test_a_search_of_books_that_no_database_should_see_is_a_form_error(client):
    for query in ("q=%00", "q=" + "x" * 101):
        page = client.get(f"/books?{query}")
        assert page.status_code == 200
        assert "invalid-feedback" in page.text, query


def test_an_invalid_start_is_the_first_page_of_books(client, make_book, reader):
    book_id = make_book()
    for start in ["x", "-1", "0", "1e3", "9" * 30, "9" * 5000, "%00", "²", "name:", "email:0", "name:²:x"]:
        assert f'href="/books/{book_id}"' in client.get(f"/books?after={start}").text, start
        assert client.get(f"/orders?after={start}").status_code == 200, start


def test_a_missing_book_is_not_found(client):
    for book_id in ["0", "-1", "7", "2147483647", "2147483648", "9" * 30, "x"]:
        assert client.get(f"/books/{book_id}").status_code == 404, book_id
        assert client.get(f"/api/books/{book_id}").status_code == 404, book_id


# ---- Orders


def test_an_order_keeps_the_price_of_its_time_and_is_being_processed(app, client, reader, make_book):
    book_id = make_book(stock=5, price_cents=1250)
    assert client.post(f"/books/{book_id}", data={"quantity": "2"}).location == "/orders"
    [order] = orders_of(app)
    assert (order.user_id, order.book_id, order.quantity, order.price_cents, order.status) == (
        reader.id,
        book_id,
        2,
        1250,
        "received",
    )
    text = text_of(client.get("/orders"))
    assert "Thank you, your order is placed. We will confirm it by e-mail." in text
    assert re.search(r"Middlemarch 2 €25.00 .* being processed", text)


def test_the_orders_page_shows_the_outcome_of_each_order(app, client, reader, make_book):
    book_id = make_book()
    with app.app_context():
        for status in ("received", "placed", "confirmed", "sold out"):
            db.session.add(Order(user_id=reader.id, book_id=book_id, quantity=1, price_cents=900, status=status))
        db.session.commit()
    found = re.findall(r'data-label="Status">([^<]*)<', client.get("/orders").text)
    assert found == ["sold out", "confirmed", "confirmed", "being processed"]


def test_an_order_above_the_stock_is_refused(app, client, reader, make_book):
    book_id = make_book(stock=2)
    response = client.post(f"/books/{book_id}", data={"quantity": "3"})
    assert "Only 2 left: please order fewer." in text_of(response)
    assert stock_of(app, book_id) == 2
    assert orders_of(app) == []


def test_the_page_of_a_sold_out_book_says_so(app, client, reader, make_book):
    book_id = make_book(stock=0)
    assert "sold out" in text_of(client.get("/books"))
    assert 'name="quantity"' not in client.get(f"/books/{book_id}").text
    response = client.post(f"/books/{book_id}", data={"quantity": "1"})
    assert "Sorry, this book has just been sold out." in text_of(response)
    assert orders_of(app) == []


@on_sqlite
def test_a_quantity_is_a_number_from_1_to_100(app, client, reader, make_book):
    book_id = make_book(stock=500)
    for quantity in ["", "0", "-1", "101", "1.5", "two", "9" * 30, "9" * 5000, "\0"]:
        response = client.post(f"/books/{book_id}", data={"quantity": quantity})
        assert response.status_code == 200
        assert "invalid-feedback" in response.text, quantity
    assert stock_of(app, book_id) == 500


@on_sqlite
def test_a_stranger_who_orders_logs_in_and_returns_to_the_book(app, client, make_user, make_book):
    book_id = make_book()
    make_user(email="nat@example.com")
    response = client.post(f"/books/{book_id}", data={"quantity": "1"})
    assert orders_of(app) == []
    response = client.post(response.location, data={"email": "nat@example.com", "password": PASSWORD})
    assert response.location == f"/books/{book_id}"


def test_a_missing_book_cannot_be_ordered(app, client, reader):
    assert client.post("/books/7", data={"quantity": "1"}).status_code == 404
    assert orders_of(app) == []


def test_my_orders_are_mine_alone_and_the_newest_comes_first(app, client, reader, make_user, make_book):
    other = make_user(email="other@example.com")
    book_id = make_book(stock=100)
    with app.app_context():
        for index in range(45):
            for user, price in ((reader, 100 + index), (other, 900)):
                db.session.add(Order(user_id=user.id, book_id=book_id, quantity=1, price_cents=price))
        db.session.commit()
    totals = walk(client, "/orders", r"€(\d\.\d\d)")
    assert totals == [f"{(100 + index) / 100:.2f}" for index in range(44, -1, -1)]


# ---- JSON


def test_the_books_are_available_as_json_page_by_page(client, make_book):
    ids = [make_book(title=f"Book {index}") for index in range(45)]
    found, path = [], "/api/books?q=book"
    while path:
        answer = client.get(path).json
        found += [book["id"] for book in answer["books"]]
        path = answer["next"]
    assert found == ids[::-1]


@on_sqlite
def test_a_book_is_available_as_json(client, make_book):
    book_id = make_book(description="Long.", isbn="9780141439549")
    assert client.get(f"/api/books/{book_id}").json == {
        "id": book_id,
        "title": "Middlemarch",
        "author": "George Eliot",
        "isbn": "9780141439549",
        "description": "Long.",
        "price_cents": 1250,
        "stock": 5,
    }


@on_sqlite
def test_an_error_below_api_is_json(client):
    missing = client.get("/api/books/7")
    assert (missing.status_code, missing.json["error"]) == (404, "Not Found")
    wrong = client.get("/api/books?q=%00")
    assert (wrong.status_code, wrong.json["message"]) == (400, "q: Please leave out control characters.")
    assert set(client.post("/api/books").allow) == {"GET", "HEAD", "OPTIONS"}


@on_sqlite
def test_a_page_of_books_costs_as_many_queries_for_many_rows_as_for_one(client, reader, make_book):
    paths = ["/books", "/api/books", "/orders"]

    def order(index):
        book_id = make_book(title=f"Book {index}")
        client.post(f"/books/{book_id}", data={"quantity": "1"})

    order(0)
    client.get("/orders")
    with_one_row = {path: queries(client, path) for path in paths}
    for index in range(1, 15):
        order(index)
    client.get("/orders")
    assert {path: queries(client, path) for path in paths} == with_one_row
    assert max(with_one_row.values()) <= 3


@on_sqlite
def test_no_page_of_books_has_an_inline_script_or_style_or_a_foreign_address(client, reader, make_book):
    assert make_book() == 1
    for path in ("/", "/books", "/books/1", "/orders"):
        assert_own(client.get(path).text, path)


@on_sqlite
def test_no_cache_keeps_json_that_is_made_for_one_visitor(client, reader):
    for path in ("/orders", "/api/books"):
        assert client.get(path).headers["Cache-Control"] == "no-store", path


@on_sqlite
def test_a_network_searches_sixty_times_a_minute_at_most_and_looks_at_pages_as_often_as_it_likes(client, make_book):
    make_book()
    for path in ("/books", "/api/books"):
        assert {client.get(path).status_code for _ in range(70)} == {200}
        assert [client.get(f"{path}?q=x").status_code for _ in range(61)] == [200] * 60 + [429], path
        assert client.get(path).status_code == 200
        elsewhere = {"REMOTE_ADDR": "192.0.2.2"}
        assert client.get(f"{path}?q=x", environ_overrides=elsewhere).status_code == 200
    refused = client.get("/api/books?q=x")
    assert refused.json["message"].startswith("There were too many attempts from your network.")
    assert 0 < int(refused.headers["Retry-After"]) <= 61
