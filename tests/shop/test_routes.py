"""The shop's pages and JSON, requested as a browser does, on both databases."""

import re
from datetime import UTC, datetime, timedelta
from html import unescape
from io import BytesIO

import pytest
from flask import Flask
from sqlalchemy import Engine, select
from support.databases import on_sqlite
from support.fleet import at_once, statements
from support.shop import PASSWORD, has_password

from models import User, db

# ---- Helpers


@pytest.fixture
def reader(client, make_user, login):
    """Give a user who is logged in with `client`."""
    user = make_user(email="reader@example.com", name="Reader")
    login(client, user)
    return user


@pytest.fixture
def admin(client, make_user, login):
    user = make_user(email="admin@example.com", name="Admin", is_admin=True)
    login(client, user)
    return user


def text_of(response) -> str:
    """Return the visible text of the page in one line."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", response.text)).split())


def user_of(app, email: str) -> User | None:
    with app.app_context():
        return db.session.scalar(select(User).where(User.email == email))


def register(client, **fields):
    form = {"name": "Nat", "email": "nat@example.com", "password": PASSWORD, "password_confirm": PASSWORD} | fields
    return client.post("/register", data=form)


def log_in(client, email: str, password: str = PASSWORD, target: str = ""):
    query = {"next": target} if target else None
    return client.post("/login", query_string=query, data={"email": email, "password": password})


def walk(client, path: str, pattern: str) -> list[str]:
    """Return every match of the pattern on the page and on all pages that its `Next page` leads to."""
    found: list[str] = []
    while path:
        page = client.get(path)
        assert page.status_code == 200
        found += re.findall(pattern, page.text)
        link = re.search(r'rel="next" href="([^"]*)"', page.text)
        path = unescape(link[1]) if link else ""
    return found


# ---- Home


@on_sqlite
def test_the_home_page_links_to_the_pages_about_the_worker(client):
    text = text_of(client.get("/"))
    assert "PassiveUserCheckerWorker" in text
    assert "have not logged in for 30 days" in text
    for place in ("The log output", "The workers, for an admin", "flask workers list"):
        assert place in text


@on_sqlite
def test_every_link_of_the_home_page_works_for_its_visitor(client, make_user, login):
    for _ in ("a stranger", "an admin"):
        page = client.get("/").text
        links = [unescape(link) for link in re.findall(r'<a [^>]*href="(/[^"]*)"', page)]
        assert links
        assert {link: client.get(link).status_code for link in links} == dict.fromkeys(links, 200)
        login(client, make_user(is_admin=True))
    assert "The passive users" in client.get("/").text


@on_sqlite
def test_the_home_page_of_the_demo_says_how_to_log_in(app, client):
    assert "reset-password" not in client.get("/").text
    app.config["DATABASE_IS_EMBEDDED"] = True
    assert "flask reset-password admin@example.com" in client.get("/").text


def test_the_home_page_asks_the_database_nothing_for_a_stranger(app, client):
    with statements(Engine) as asked:
        assert client.get("/").status_code == 200
    assert asked == []


# ---- Register


def test_registering_makes_an_active_user_with_a_lower_case_email_and_an_argon2_hash(app, client, monkeypatch):
    response = register(client, name="  Nat ", email=" Nat@Example.COM ")
    assert response.location == "/login"
    user = user_of(app, "nat@example.com")
    assert (user.name, user.status, user.is_admin, user.last_login_at) == ("Nat", "active", False, None)
    assert user.confirmed_at is None
    assert user.password.startswith("$argon2id$")
    assert has_password(user, PASSWORD)


def test_of_several_registrations_of_one_email_at_once_one_gets_the_account_and_all_get_the_same_response(app):
    responses = at_once(6, lambda index: register(app.test_client(), name=f"Nat {index}"))
    assert {(response.status_code, response.location) for response in responses} == {(302, "/login")}
    with app.app_context():
        [name] = db.session.scalars(select(User.name))
    assert re.fullmatch(r"Nat \d", name)


def test_text_that_the_database_cannot_store_is_a_form_error(app, client):
    for field, value, complaint in [
        ("name", "", "This field is required."),
        ("name", "   ", "This field is required."),
        ("name", "Nat\0", "leave out control characters"),
        ("name", "Nat\nBcc: everyone", "leave out control characters"),
        ("name", "N" * 121, "longer than 120 characters"),
        ("name", "N" * 400_000, "longer than 120 characters"),
        ("email", "unknown", "Invalid email address"),
        ("email", "nat\0@example.com", "Invalid email address"),
        ("email", "n" * 400_000 + "@example.com", "Invalid email address"),
        ("password", "short", "use 8 to 128 characters"),
        ("password", "p" * 400_000, "use 8 to 128 characters"),
        ("password_confirm", "correct house", "The two passwords differ."),
    ]:
        response = register(client, **{field: value})
        assert response.status_code == 200
        assert complaint in text_of(response), (field, value[:20])
    assert user_of(app, "nat@example.com") is None


@on_sqlite
def test_a_name_that_hides_itself_or_its_neighbours_is_refused(app, client, reader):
    for name, complaint in [
        ("\u200b\u200d", "use characters that can be seen"),
        ("\u3164", "use characters that can be seen"),
        ("\u0301", "use characters that can be seen"),
        ("\u202eretaeR", "leave out control characters"),
        ("Nat\u2066", "leave out control characters"),
        ("Nat\u2028Turner", "leave out control characters"),
        ("N" + "\u0301" * 5, "at most 4 accents on one letter"),
        ("N" + "\u0301\u200d" * 5, "at most 4 accents on one letter"),
    ]:
        assert complaint in text_of(client.post("/account", data={"name": name})), ascii(name)
    assert user_of(app, "reader@example.com").name == "Reader"


@on_sqlite
def test_names_of_many_languages_are_welcome(app, client, reader):
    for name in ["Nguye\u0302\u0303n", "مهدی‌پور", "บุญเรือง", "בְּרֵאשִׁ֖ית", "རྐྱེན", "क्षत्रिय", "👩‍👩‍👧", "O’Brien-Łoś"]:
        client.post("/account", data={"name": name})
        assert user_of(app, "reader@example.com").name == name


def test_a_name_may_be_in_any_script_and_is_shown_as_text(client, reader):
    client.post("/account", data={"name": "<b>Ңąţ</b> 🙂"})
    page = client.get("/account")
    assert 'value="&lt;b&gt;Ңąţ&lt;/b&gt; 🙂"' in page.text


@on_sqlite
def test_an_uploaded_file_or_json_is_not_taken_as_text_of_a_field(client):
    file = (BytesIO(b"Nat"), "name.txt")
    assert client.post("/register", data={"name": file}).status_code == 200
    for json in ([1], {"name": 5}, "text"):
        assert client.post("/register", json=json).status_code == 415


@on_sqlite
def test_a_megabyte_is_refused_before_it_is_read(client):
    assert register(client, name="N" * 1_000_000).status_code == 413


# ---- Log in and out


def test_logging_in_records_the_time_and_makes_a_passive_user_active(app, client, make_user):
    long_ago = datetime.now(UTC) - timedelta(days=90)
    make_user(email="nat@example.com", status="passive", last_login_at=long_ago)
    before = datetime.now(UTC)
    assert log_in(client, "NAT@example.com ").location == "/"
    user = user_of(app, "nat@example.com")
    assert user.status == "active"
    assert before <= user.last_login_at <= datetime.now(UTC)


def test_a_wrong_password_and_an_unknown_email_give_the_same_answer(app, client, make_user):
    make_user(email="nat@example.com")
    wrong = log_in(client, "nat@example.com", "wrong horse")
    unknown = log_in(client, "tan@example.com")
    assert "Wrong e-mail or password" in text_of(wrong)
    assert wrong.text.replace("nat@", "") == unknown.text.replace("tan@", "")
    assert user_of(app, "nat@example.com").last_login_at is None


def test_logging_in_with_a_nul_is_a_form_error(client):
    assert "Wrong e-mail or password" in text_of(log_in(client, "nat\0@example.com"))


@on_sqlite
def test_logging_in_leads_to_the_requested_page(client, make_user):
    make_user(email="nat@example.com")
    asked = client.get("/account?from=7")
    assert asked.status_code == 302
    response = client.post(asked.location, data={"email": "nat@example.com", "password": PASSWORD})
    assert response.location == "/account?from=7"


@on_sqlite
def test_logging_in_never_leads_to_another_host(client, make_user):
    make_user(email="nat@example.com")
    for target in [
        "https://evil.example/",
        "//evil.example/",
        "/\\evil.example/",
        "\\\\evil.example/",
        "/\t/evil.example/",
        "/\n/evil.example/",
        " //evil.example/",
        "javascript:alert(1)",
        "orders",
    ]:
        location = log_in(client, "nat@example.com", target=target).location
        assert not re.match(r"\w+:|[/\\]{2}|/\\", location), target
        client.post("/logout")


@on_sqlite
def test_registering_keeps_the_requested_page(client):
    form = {"name": "Nat", "email": "nat@example.com", "password": PASSWORD, "password_confirm": PASSWORD}
    response = client.post("/register", query_string={"next": "/books/3"}, data=form)
    assert response.location == "/books/3"


@on_sqlite
def test_logging_out_needs_a_post(client, reader):
    assert client.get("/logout").status_code == 405
    assert client.get("/account").status_code == 200
    assert client.post("/logout").location == "/"
    assert client.get("/account").location == "/login?next=/account"


# ---- My account


@on_sqlite
def test_my_account_shows_the_status_and_the_last_login(client, make_user):
    make_user(email="nat@example.com", status="passive")
    log_in(client, "nat@example.com")
    text = text_of(client.get("/account"))
    assert "Status active" in text
    assert re.search(r"Last login \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", text)


def test_a_user_can_change_the_name_and_nothing_else(app, client, reader):
    client.post("/account", data={"name": " New Name ", "is_admin": "1", "status": "passive"})
    user = user_of(app, "reader@example.com")
    assert (user.name, user.is_admin, user.status) == ("New Name", False, "active")


def test_a_name_with_a_nul_is_refused(app, client, reader):
    assert "leave out control" in text_of(client.post("/account", data={"name": "N\0"}))
    assert user_of(app, "reader@example.com").name == "Reader"


# ---- The admin's users


@on_sqlite
def test_only_an_admin_sees_the_users(client, make_user, login):
    asked = client.get("/admin/users?status=passive")
    assert asked.location == "/login?next=/admin/users?status%3Dpassive"
    assert client.options("/admin/users").location.startswith("/login?")
    login(client, make_user(email="nat@example.com"))
    assert client.get("/admin/users").status_code == 403
    assert "Users" not in text_of(client.get("/"))


def test_the_admin_filters_users_by_status_and_searches_them(client, admin, make_user):
    make_user(email="nat@example.com", name="Nat Turner")
    make_user(email="pat@example.com", name="Pat Turner", status="passive")
    make_user(email="turner@example.com", name="Zoe", status="passive")

    def found(query):
        return re.findall(r">([^<]*)@example.com<", client.get(f"/admin/users?{query}").text)

    assert found("") == ["admin", "nat", "pat", "turner"]
    assert found("status=passive") == ["pat", "turner"]
    assert found("status=active") == ["admin", "nat"]
    assert found("q=NAT") == ["nat"]
    assert found("q=pat+t&status=passive") == ["pat"]
    assert found("q=pat+t&status=active") == []
    assert found("status=unknown") == []


def test_paging_shows_every_user_once(client, admin, make_user):
    for index in range(45):
        make_user(email=f"u{index:02}@example.com", name=f"Reader {index}", status="passive")
    for query in ("", "?status=passive", "?q=u", "?q=reader", "?q=reader&status=passive"):
        emails = walk(client, f"/admin/users{query}", r">(u\d\d)@example.com<")
        assert sorted(emails) == [f"u{index:02}" for index in range(45)], query


def test_a_search_that_the_database_cannot_handle_is_a_form_error(client, admin):
    for query in ("q=%00", "q=" + "x" * 101):
        page = client.get(f"/admin/users?{query}")
        assert page.status_code == 200
        assert "invalid-feedback" in page.text, query


def test_an_invalid_start_is_the_first_page(client, admin):
    for start in ["x", "-1", "0", "1e3", "9" * 30, "9" * 5000, "%00", "²", "name:", "email:0", "name:²:x"]:
        assert "admin@example.com" in client.get(f"/admin/users?after={start}").text, start


# ---- Errors, and rules for every page


@on_sqlite
def test_an_error_has_a_page_with_a_sentence(client, reader):
    for path, code, sentence in [
        ("/nowhere", 404, "There is no such page."),
        ("/logout", 405, "This page does not accept this kind of request."),
        ("/admin/users", 403, "You may not see or change this page."),
    ]:
        response = client.get(path)
        assert response.status_code == code
        assert sentence in text_of(response)
        assert "My account" in text_of(response)


@on_sqlite
def test_an_invalid_host_is_a_bad_request(client):
    for host in ("a..b", "x" * 64):
        assert client.get("/", headers={"Host": host}).status_code == 400, host


def test_a_server_error_has_a_page_even_without_a_database(app, client, reader):
    app.config["PROPAGATE_EXCEPTIONS"] = False
    with app.app_context():
        db.drop_all()
    response = client.get("/account")
    assert response.status_code == 500
    assert "Something went wrong on our side, and the error is in the log." in text_of(response)


PAGES = [
    *("/", "/login", "/register", "/account", "/account/password", "/account/reset/x"),
    *("/admin/users", "/admin/audit", "/nowhere"),
]


@on_sqlite
def test_no_page_has_an_inline_script_or_style_or_a_foreign_address(client, admin):
    for path in PAGES:
        assert_own(client.get(path).text, path)


def assert_own(html: str, path: str) -> None:
    assert not re.search(r"<script(?! src=[^>]*></script>)|<style|\sstyle=|\son\w+=|javascript:", html), path
    assert not re.search(r"""(src|href|action)=["'](https?:)?//""", html), path


def test_a_page_costs_as_many_queries_for_many_rows_as_for_one(client, admin, make_user):
    def make_an_admin(index):
        user = make_user(email=f"u{index}@example.com")
        client.post(f"/admin/users/{user.id}/make-admin")

    paths = ["/", "/account", "/admin/users", "/admin/users?q=u", "/admin/audit"]
    make_an_admin(0)
    client.get("/account")
    with_one_row = {path: queries(client, path) for path in paths}
    for index in range(1, 15):
        make_an_admin(index)
    client.get("/account")
    assert {path: queries(client, path) for path in paths} == with_one_row
    assert max(with_one_row.values()) <= 3


def queries(client, path: str) -> int:
    with statements(Engine) as asked:
        assert client.get(path).status_code == 200
    return len(asked)


def test_a_session_with_an_impossible_user_is_logged_out(client):
    for user_id in ("x", "-1", "9" * 40):
        with client.session_transaction() as session:
            session["_user_id"] = user_id
        assert client.get("/account").status_code == 302, user_id


@on_sqlite
def test_a_form_by_plain_http_is_refused_with_a_sentence_if_sessions_need_https(
    app: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    app.config.update(WTF_CSRF_ENABLED=True, SESSION_COOKIE_SECURE=True)
    answer = app.test_client().post("/login", data={"email": "a@example.com", "password": "b"})
    assert answer.status_code == 400
    assert "This shop needs HTTPS" in answer.text
    assert "PROXIES=1" in caplog.text
    by_https = app.test_client().post("/login", base_url="https://localhost", data={"email": "a@example.com"})
    assert "HTTPS" not in by_https.text
