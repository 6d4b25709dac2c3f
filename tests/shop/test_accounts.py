"""Accounts: sessions that end, passwords that are stored and renewed, and the audit of the admins' actions."""

import json
import logging
import re
import time
import traceback
from collections.abc import Callable, Iterator
from email import message_from_bytes
from email.policy import default
from itertools import count
from pathlib import Path
from threading import Barrier
from typing import Any
from urllib.parse import unquote

import pytest
from flask import Flask
from flask.testing import FlaskClient
from itsdangerous import URLSafeTimedSerializer
from sqlalchemy import Engine, create_engine, event, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool
from support.databases import on_postgresql, on_sqlite
from support.fleet import at_once, in_threads, wait_until
from support.shop import PASSWORD, PASSWORD_HASH, PASSWORD_METHOD
from werkzeug.security import generate_password_hash
from werkzeug.test import TestResponse

import models
from background import BackgroundWorkerManager
from background.database.tables import messages
from background.errors import first_line
from models import AuditEntry, User, UserRepository, db

NEW = "tulips are not enough"
Make = Callable[..., User]
Login = Callable[..., None]


@pytest.fixture
def admin(client: FlaskClient, make_user: Make, login: Login) -> User:
    user = make_user(email="you@your.shop", is_admin=True)
    login(client, user)
    return user


@pytest.fixture
def clients(app: Flask) -> list[FlaskClient]:
    return [app.test_client() for _ in range(2)]


def change(client: FlaskClient, current: str = PASSWORD, password: str = NEW, repeated: str = NEW) -> TestResponse:
    return client.post("/account/password", data={"current": current, "password": password, "repeated": repeated})


def log_in(client: FlaskClient, email: str, password: str) -> bool:
    return client.post("/login", data={"email": email, "password": password}).status_code == 302


def is_logged_in(client: FlaskClient) -> bool:
    return client.get("/account").status_code == 200


def stored(app: Flask, user: User) -> User:
    with app.app_context():
        return db.session.get_one(User, user.id)


# ---- Sessions


def test_no_session_begins_under_a_password_that_was_changed_during_its_check(
    app: Flask, clients: list[FlaskClient], make_user: Make, login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, (owner, thief), check = make_user(), clients, User.check_password
    login(owner, user)

    def changed_meanwhile(checked: User, password: str) -> bool:
        monkeypatch.setattr(User, "check_password", check)
        right = check(checked, password)
        in_threads(lambda: change(owner))
        return right

    monkeypatch.setattr(User, "check_password", changed_meanwhile)
    assert not log_in(thief, user.email, PASSWORD)
    assert not is_logged_in(thief)
    assert log_in(owner, user.email, NEW)


@on_sqlite
def test_a_user_who_changes_the_password_stays_logged_in_only_here(
    app: Flask, clients: list[FlaskClient], make_user: Make, login: Login
) -> None:
    user, (here, elsewhere) = make_user(), clients
    for client in clients:
        login(client, user)
    assert change(here).location == "/account"
    assert "Your password has been changed." in here.get("/account").text
    assert not is_logged_in(elsewhere)
    assert not log_in(app.test_client(), user.email, PASSWORD)
    assert log_in(app.test_client(), user.email, NEW)


@on_sqlite
def test_a_password_is_changed_only_by_a_user_who_knows_it_and_repeats_the_new_one(
    app: Flask, client: FlaskClient, make_user: Make, login: Login
) -> None:
    user = make_user()
    login(client, user)
    for given, complaint in [
        ({"current": "wrong horse"}, "This is not your current password."),
        ({"current": ""}, "This field is required."),
        ({"repeated": "tulips"}, "The two passwords differ."),
        ({"password": "short", "repeated": "short"}, "use 8 to 128 characters"),
    ]:
        assert complaint in change(client, **given).text
    assert stored(app, user).password_hash == user.password_hash


@on_sqlite
def test_a_session_ends_when_its_user_becomes_an_admin_or_is_no_longer_an_admin(
    client: FlaskClient, app: Flask, make_user: Make, login: Login, admin: User
) -> None:
    user, theirs = make_user(), app.test_client()
    for action, code in (("make-admin", 200), ("unmake-admin", 403)):
        login(theirs, user)
        client.post(f"/admin/users/{user.id}/{action}")
        assert not is_logged_in(theirs)
        login(theirs, user)
        assert theirs.get("/admin/users").status_code == code
        theirs.post("/logout")


@on_sqlite
def test_a_session_of_the_previous_release_is_logged_out(app: Flask, client: FlaskClient, make_user: Make) -> None:
    user = make_user()
    for known_as in (str(user.id), f"{user.id}.", f"{user.id}.ñ", f"{user.id}.{'0' * 32}"):
        with client.session_transaction() as session:
            session["_user_id"] = known_as
        assert not is_logged_in(client), known_as


@on_sqlite
def test_a_token_is_invalid_after_logging_in_or_out(app: Flask, client: FlaskClient, make_user: Make) -> None:
    app.config["WTF_CSRF_ENABLED"] = True
    form = {"email": make_user().email, "password": PASSWORD, "name": "Nat"}
    given_before = {**form, "csrf_token": token_on(client, "/login")}
    assert client.post("/login", data=given_before).status_code == 302
    assert client.post("/account", data=given_before).status_code == 400
    given_within = {**form, "csrf_token": token_on(client, "/account")}
    assert client.post("/logout", data=given_within).status_code == 302
    assert client.post("/login", data=given_within).status_code == 400


def token_on(client: FlaskClient, path: str, **more: Any) -> str:
    return re.search(r'name="csrf_token"[^>]* value="([^"]*)"', client.get(path, **more).text)[1]  # type: ignore[index]


@on_sqlite
def test_a_session_is_invalid_under_another_key(app: Flask, make_user: Make) -> None:
    user = make_user()
    with app.app_context():
        before = user.fingerprint
        app.config["SECRET_KEY"] = b"another"
        assert user.fingerprint != before


# ---- Hashes, and the responses to a stranger


@on_sqlite
def test_a_hash_of_another_method_is_valid_and_renewed_at_the_next_login(
    app: Flask, clients: list[FlaskClient], make_user: Make
) -> None:
    old = generate_password_hash(PASSWORD, "pbkdf2:sha1:1")
    user = make_user(password_hash=old)
    assert not log_in(clients[0], user.email, "wrong horse")
    assert stored(app, user).password_hash == old
    for client in clients:
        assert log_in(client, user.email, PASSWORD)
    assert stored(app, user).password_hash.startswith(f"{User.password_method}$")
    assert all(is_logged_in(client) for client in clients)


def test_one_of_several_requests_that_change_a_password_at_once_changes_it(app: Flask, make_user: Make) -> None:
    user = make_user()

    def replace(index: int) -> bool:
        with app.app_context():
            users = UserRepository(db.session)
            mine = users.get(user.id)
            assert mine is not None
            seen.wait(10)
            changed = users.replace_password(mine, f"password {index}")
            db.session.commit()
            return changed

    seen = Barrier(4)
    found = at_once(4, replace)
    assert sorted(found) == [False, False, False, True]
    assert stored(app, user).check_password(f"password {found.index(True)}")


NO_HASHES = [
    "!",
    "",
    "x",
    "$",
    "$$",
    "md5$a$b",
    "scrypt:1:2$a$b",
    "scrypt:x:8:1$a$b",
    "pbkdf2:sha256:-1$a$b",
    "scrypt:3$",
]


@on_sqlite
def test_an_account_without_a_usable_password_is_refused_like_a_stranger(client: FlaskClient, make_user: Make) -> None:
    answers = set()
    for number, password_hash in enumerate(NO_HASHES):
        user = make_user(password_hash=password_hash)
        for password in (PASSWORD, password_hash or "x"):
            response = client.post("/login", data={"email": user.email, "password": password})
            assert response.status_code == 200, password_hash
            answers.add(response.text.replace(user.email, ""))
        client.environ_base["REMOTE_ADDR"] = f"192.0.2.{number}"
    stranger = client.post("/login", data={"email": "stranger@example.com", "password": PASSWORD})
    assert {*answers} == {stranger.text.replace("stranger@example.com", "")}


@on_sqlite
def test_login_failures_take_equally_long(
    client: FlaskClient, make_user: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(User, "password_method", PASSWORD_METHOD)
    known = make_user(password_hash=generate_password_hash(PASSWORD, PASSWORD_METHOD)).email
    others = [make_user(password_hash=each).email for each in ("!", "scrypt:3$")]

    quickest = dict.fromkeys((known, "stranger@example.com", *others), float("inf"))

    def shares() -> dict[str, float]:
        return {email: seconds / quickest[known] for email, seconds in quickest.items()}

    for number in range(10):  # the eleventh is not checked
        for email in quickest:
            start = time.process_time()
            assert not log_in(client, email, "wrong horse")
            quickest[email] = min(quickest[email], time.process_time() - start)
        if number >= 2 and all(0.6 < share < 1.6 for share in shares().values()):
            break
    else:
        pytest.fail(str(shares()))


@pytest.fixture
def work_of(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Post a form, each time from another network. Return the statements and hashes that it took, in order."""
    done: list[str] = []
    networks = count(1)

    def post(path: str, code: int, **form: str) -> list[str]:
        done.clear()
        origin = {"REMOTE_ADDR": f"192.0.2.{next(networks)}"}
        assert client.post(path, data=form, environ_overrides=origin).status_code == code
        return [*done]

    for name in ("generate_password_hash", "check_password_hash"):
        monkeypatch.setattr(models, name, noted(getattr(models, name), done))
    listeners = {
        "before_cursor_execute": lambda _connection, _cursor, statement, *_: done.append(statement),
        "commit": lambda _connection: done.append("COMMIT"),
        "rollback": lambda _connection: done.append("ROLLBACK"),
    }
    for event_name, listener in listeners.items():
        event.listen(Engine, event_name, listener)
    yield post
    for event_name, listener in listeners.items():
        event.remove(Engine, event_name, listener)


def noted(hashing: Callable[..., Any], done: list[str]) -> Callable[..., Any]:
    def note(*arguments: Any) -> Any:
        done.append("HASH")
        return hashing(*arguments)

    return note


def test_registering_does_the_same_whether_the_email_has_an_account_or_not(
    app: Flask, work_of: Callable[..., list[str]], make_user: Make
) -> None:
    enqueued: list[int] = []

    def work(email: str) -> list[str]:
        found = work_of("/register", 302, name="Nat", email=email, password=PASSWORD, repeated=PASSWORD)
        enqueued.append(len(states_of_messages(app)))
        return found

    known = make_user().email
    first, *others = [work(email) for email in ("nat@example.com", "pat@example.com", known, known, known)]
    assert others == [first] * 4
    assert enqueued == [1, 2, 3, 4, 5]  # so each request had something to commit
    assert first.count("HASH") == 1
    assert [each.split()[0] for each in first[-5:]] == ["HASH", "INSERT", "SELECT", "INSERT", "COMMIT"]


def test_refusing_does_the_same_for_a_known_and_an_unknown_email(
    work_of: Callable[..., list[str]], make_user: Make
) -> None:
    users = [make_user(), make_user(status="passive"), make_user(is_admin=True), make_user(password_hash="!")]
    emails = ["stranger@example.com", *(user.email for user in users)]
    first, *others = [work_of("/login", 200, email=email, password="wrong horse") for email in emails]
    assert others == [first] * 4
    assert first.count("HASH") == 1


def register(client: FlaskClient, email: str = "nat@example.com", **fields: str) -> TestResponse:
    form = {"name": "Nat", "email": email, "password": PASSWORD, "repeated": PASSWORD} | fields
    return client.post("/register", data=form, follow_redirects=True)


def test_registering_an_existing_email_gives_the_same_response_and_changes_nothing(
    app: Flask, clients: list[FlaskClient]
) -> None:
    first = register(clients[0])
    again = register(clients[1], "NAT@example.com", name="Other", password=NEW, repeated=NEW)
    assert "If this e-mail had no account yet, it has one now" in first.text
    hide = re.compile(r'value="[^"]*"')
    assert hide.sub("", first.text) == hide.sub("", again.text)
    with app.app_context():
        [user] = db.session.scalars(select(User))
        assert (user.name, user.check_password(PASSWORD)) == ("Nat", True)


def test_the_owner_of_an_email_gets_one_mail_however_often_strangers_register_it(
    app: Flask, client: FlaskClient, manager: BackgroundWorkerManager, outbox: Path
) -> None:
    for _ in range(3):
        register(client)
    manager.start()
    wait_until(lambda: states_of_messages(app) == ["done"] * 4, "the mails")
    assert sorted((mail["To"], mail["Subject"]) for mail in mails(outbox)) == [
        ("nat@example.com", "Welcome to the Bookstore"),
        ("nat@example.com", "You have an account already"),
    ]


def states_of_messages(app: Flask) -> list[str]:
    with app.app_context():
        return list(db.session.scalars(select(messages.c.state)))


def mails(outbox: Path) -> list[Any]:
    paths = sorted(outbox.glob("*.eml")) if outbox.exists() else []
    return [message_from_bytes(path.read_bytes(), policy=default) for path in paths]


# ---- The password link


@pytest.fixture
def link_of(app: Flask) -> Callable[[User], str]:
    def link(user: User) -> str:
        with app.app_context():
            return f"/account/reset/{db.session.get_one(User, user.id).password_token()}"

    return link


def choose(client: FlaskClient, link: str, password: str = NEW) -> TestResponse:
    return client.post(link, data={"password": password, "repeated": password})


@on_sqlite
def test_an_admin_has_a_link_mailed_that_sets_a_password_once(
    app: Flask, client: FlaskClient, manager: BackgroundWorkerManager, make_user: Make, admin: User, outbox: Path
) -> None:
    user, theirs = make_user(password_hash="!"), app.test_client()
    response = client.post(f"/admin/users/{user.id}/password-link?q=re&status=active&_scheme=javascript")
    assert response.location == "/admin/users?q=re&status=active"
    with app.app_context():
        [payload] = db.session.scalars(select(messages.c.payload))
    assert "token" not in str(payload)
    assert "localhost" in str(payload)
    manager.start()
    wait_until(lambda: mails(outbox), "the mail")
    [mail] = mails(outbox)
    assert mail["To"] == user.email
    link = re.search(r"http://localhost(/account/reset/\S+)", mail.get_content())[1]  # type: ignore[index]
    for _ in range(2):
        assert user.email in theirs.get(link).text
    assert choose(theirs, link).location == "/login"
    assert log_in(theirs, user.email, NEW)
    for response in (theirs.get(link), choose(theirs, link, "another password")):
        assert response.status_code == 404
        assert "This link is no longer valid. Each link works once, and for one hour." in response.text
    assert is_logged_in(theirs)


@on_sqlite
def test_a_password_link_ends_the_existing_sessions(
    app: Flask, clients: list[FlaskClient], make_user: Make, login: Login, link_of: Callable[[User], str]
) -> None:
    user = make_user()
    login(clients[0], user)
    choose(clients[1], link_of(user))
    assert not is_logged_in(clients[0])


def test_one_of_several_simultaneous_uses_of_a_password_link_sets_the_password(
    app: Flask, make_user: Make, link_of: Callable[[User], str]
) -> None:
    user = make_user()
    link = link_of(user)
    found = at_once(5, lambda index: choose(app.test_client(), link, f"password {index}").status_code)
    assert sorted(found) == [302, 404, 404, 404, 404]
    assert stored(app, user).check_password(f"password {found.index(302)}")


@on_sqlite
def test_an_old_used_or_invalid_password_link_changes_nothing(
    app: Flask,
    client: FlaskClient,
    make_user: Make,
    link_of: Callable[[User], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    user = make_user()
    link = link_of(user)
    forged = URLSafeTimedSerializer("guessed", salt="password link").dumps([user.id, "x"])
    for wrong in (
        f"{link}x",
        link[:-1],
        f"/account/reset/{forged}",
        "/account/reset/%00",
        "/account/reset/" + "x" * 5000,
    ):
        assert choose(client, wrong).status_code == 404, wrong
    assert "The two passwords differ." in client.post(link, data={"password": NEW, "repeated": PASSWORD}).text
    monkeypatch.setattr(UserRepository, "link_seconds", -1)
    assert choose(client, link).status_code == 404
    monkeypatch.undo()
    with app.app_context():
        UserRepository(db.session).make_admin(user.id)
        db.session.commit()
    assert choose(client, link).status_code == 404
    assert stored(app, user).password_hash == user.password_hash


@on_sqlite
def test_a_password_link_leads_to_the_public_url_whatever_host_the_admin_used(
    app: Flask, client: FlaskClient, manager: BackgroundWorkerManager, make_user: Make, admin: User, outbox: Path
) -> None:
    app.config["PUBLIC_URL"] = "https://your.shop/books/"
    client.post(f"/admin/users/{make_user().id}/password-link", headers={"X-Forwarded-Host": "evil.example"})
    manager.start()
    wait_until(lambda: mails(outbox), "the mail")
    assert "\nhttps://your.shop/books/account/reset/" in mails(outbox)[0].get_content().replace("\r", "")


@on_sqlite
def test_a_password_link_is_in_no_log(
    app: Flask, client: FlaskClient, caplog: pytest.LogCaptureFixture, make_user: Make, link_of: Callable[[User], str]
) -> None:
    link, atoms = link_of(make_user()), "%(r)s %(f)s"
    logging.getLogger("werkzeug").warning('"%s" %s', f"GET {link} HTTP/1.1", 200)
    logging.getLogger("gunicorn.access").warning(atoms, {"r": f"GET {link} HTTP/1.1", "f": f"https://your.shop{link}"})
    logging.getLogger(app.name).warning("Exception on %s [GET]", link)
    assert link.rpartition("/")[2] not in caplog.text
    assert '"GET /account/reset/... HTTP/1.1" 200' in caplog.text
    assert "GET /account/reset/... HTTP/1.1 https://your.shop/account/reset/...\n" in caplog.text


@on_sqlite
def test_a_password_link_is_in_no_log_however_its_address_is_written(
    caplog: pytest.LogCaptureFixture, make_user: Make, link_of: Callable[[User], str]
) -> None:
    token = link_of(make_user()).rpartition("/")[2]
    for path in ("/account//reset/", "/account/%72eset/", "/account/reset%2F", "/account/reset/%0A"):
        for written in (token, token.replace(".", "%2E"), "".join(f"%{ord(sign):02x}" for sign in token)):
            logging.getLogger("gunicorn.access").warning('"GET %s%s HTTP/1.1" "%s"', path, written, token)
    assert token not in unquote(caplog.text)
    assert len(caplog.text.splitlines()) == 12
    logging.getLogger("gunicorn.access").warning('"GET /books?q=%2541%0A HTTP/1.1"')
    assert caplog.messages[-1] == '"GET /books?q=%2541%0A HTTP/1.1"'


@pytest.mark.usefixtures("app")
@on_sqlite
def test_no_requested_address_slows_the_log_down() -> None:
    began = time.process_time()
    for word in ("a", "aaaaaa.", ".aaaaaa." + "a" * 26, "%61", "%2e%"):
        logging.getLogger("werkzeug").warning('"GET /%s HTTP/1.1" 404', (word * 60_000)[:60_000])
    assert time.process_time() - began < 3  # a pattern that began at every letter took a minute


@on_sqlite
def test_the_path_of_a_failed_request_is_one_line_of_the_log(
    app: Flask, client: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    app.config["PROPAGATE_EXCEPTIONS"] = False
    with app.app_context():
        db.session.execute(text("DROP TABLE rate_limits"))
        db.session.commit()
    assert client.post("/account/reset/x%0AINFO forged%1B[2J").status_code == 500
    assert r"Exception on /account/reset/x\nINFO forged\x1b[2J [POST]" in caplog.messages


# ---- Admins, and the audit


def entries(app: Flask) -> list[AuditEntry]:
    with app.app_context():
        return list(db.session.scalars(select(AuditEntry).order_by(AuditEntry.id)))


def test_an_admins_change_is_recorded_with_admin_action_time_and_address(
    app: Flask, client: FlaskClient, make_user: Make, admin: User
) -> None:
    user = make_user()
    data = {"csrf_token": "t0ken", "new_password": "t0psecret", "note": "<b>\0\x1b" + "x" * 5000}
    client.post(f"/admin/users/{user.id}/make-admin", data=data)
    [entry] = entries(app)
    assert (entry.user_id, entry.action, entry.address) == (admin.id, "admin.make_admin", "127.0.0.1")
    details = json.loads(entry.details)
    assert details == {"user_id": str(user.id), "note": "<b>\0\x1b" + "x" * 195}
    page = client.get("/admin/audit").text
    for shown in ("you@your.shop", "admin.make_admin", "127.0.0.1", "&lt;b&gt;"):
        assert shown in page
    assert len(entries(app)) == 1  # reading is not recorded


@on_sqlite
def test_no_field_of_a_form_replaces_a_part_of_the_address(
    app: Flask, client: FlaskClient, make_user: Make, admin: User
) -> None:
    user = make_user()
    junk = {f"junk{number}": "" for number in range(50)}
    client.post(f"/admin/users/{user.id}/make-admin", data={**junk, "user_id": "4711"})
    [entry] = entries(app)
    details = json.loads(entry.details)
    assert details["user_id"] == str(user.id)
    assert details["..."] == "31 more fields"


def test_an_admins_failed_attempt_is_recorded(app: Flask, client: FlaskClient, admin: User) -> None:
    assert client.post("/admin/users/99/make-admin").status_code == 404
    with app.app_context():
        db.session.execute(text("DROP TABLE background_message_errors"))
        db.session.execute(text("DROP TABLE background_messages"))
        db.session.commit()
    with pytest.raises(DBAPIError):
        client.post(f"/admin/users/{admin.id}/password-link")
    assert [entry.action for entry in entries(app)] == ["admin.make_admin", "admin.send_password_link"]


@on_sqlite
def test_the_audit_is_paged_the_newest_first(app: Flask, client: FlaskClient, admin: User) -> None:
    with app.app_context():
        for number in range(25):
            db.session.add(AuditEntry(user_id=admin.id, action=f"did.{number}", details="{}", address="::1"))
        db.session.commit()
    first = client.get("/admin/audit").text
    following = re.search(r'rel="next" href="([^"]*)"', first)[1]  # type: ignore[index]
    found = [re.findall(r"did\.(\d+)", page) for page in (first, client.get(following).text)]
    assert found == [[str(number) for number in range(24, 4, -1)], ["4", "3", "2", "1", "0"]]


def test_an_admin_makes_and_unmakes_admins_but_the_last_admin_stays(
    app: Flask, client: FlaskClient, make_user: Make, admin: User
) -> None:
    user = make_user()

    def press(user: User, action: str) -> str:
        return client.post(f"/admin/users/{user.id}/{action}", follow_redirects=True).text

    assert "is the last admin, or is not an admin" in press(admin, "unmake-admin")
    assert "is the last admin, or is not an admin" in press(user, "unmake-admin")
    assert f"{user.email} is an admin." in press(user, "make-admin")
    assert f"{user.email} is an admin already." in press(user, "make-admin")
    assert f"{user.email} is no longer an admin." in press(user, "unmake-admin")
    press(user, "make-admin")
    client.post(f"/admin/users/{admin.id}/unmake-admin")
    assert not is_logged_in(client)
    assert (stored(app, admin).is_admin, stored(app, user).is_admin) == (False, True)


def test_admins_who_unmake_each_other_at_once_leave_one_admin(app: Flask, make_user: Make) -> None:
    admins = [make_user(is_admin=True) for _ in range(4)]

    def unmake(index: int) -> bool:
        with app.app_context():
            changed = UserRepository(db.session).unmake_admin(admins[index].id)
            db.session.commit()
            return changed

    assert sorted(at_once(4, unmake)) == [False, True, True, True]
    assert sum(stored(app, each).is_admin for each in admins) == 1


# ---- Headers and cookies


@on_sqlite
def test_every_answer_forbids_foreign_and_inline_content(app: Flask, client: FlaskClient) -> None:
    app.config["PROPAGATE_EXCEPTIONS"] = False
    app.add_url_rule("/fault", view_func=lambda: 1 / 0)
    paths = {"/": 200, "/login": 200, "/static/style.css": 200, "/nowhere": 404, "/logout": 405}
    for path, code in {**paths, "/account": 302, "/fault": 500}.items():
        response = client.get(path, buffered=True)
        assert response.status_code == code
        policy = response.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'; form-action 'self'" in policy
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "same-origin"
        assert "Strict-Transport-Security" not in response.headers
        secure = client.get(path, base_url="https://localhost", buffered=True)
        assert secure.headers["Strict-Transport-Security"] == "max-age=31536000"


@on_sqlite
def test_no_cache_keeps_a_page_made_for_one_visitor(client: FlaskClient, make_user: Make, login: Login) -> None:
    assert "Cache-Control" not in client.get("/").headers
    login(client, make_user())
    for path in ("/", "/account", "/admin/users", "/nowhere"):
        assert client.get(path).headers["Cache-Control"] == "no-store", path
    assert client.get("/static/style.css", buffered=True).headers.get("Cache-Control") != "no-store"


@on_sqlite
def test_no_script_or_other_site_gets_the_session_cookie(app: Flask, client: FlaskClient, make_user: Make) -> None:
    user = make_user()
    form = {"email": user.email, "password": PASSWORD}
    cookie = client.post("/login", data=form).headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert "Secure" not in cookie
    app.config["SESSION_COOKIE_SECURE"] = True
    cookie = app.test_client().post("/login", data=form, base_url="https://localhost").headers["Set-Cookie"]
    assert "Secure" in cookie


@on_sqlite
def test_a_form_over_https_is_accepted_with_the_referrer_that_our_policy_allows(
    app: Flask, client: FlaskClient
) -> None:
    app.config["WTF_CSRF_ENABLED"] = True
    token = token_on(client, "/login", base_url="https://localhost")
    form = {"csrf_token": token, "email": "nat@example.com", "password": PASSWORD}
    for referrer, code in [("https://localhost/login", 200), ("https://evil.example/", 400), (None, 400)]:
        headers = {"Referer": referrer} if referrer else {}
        assert client.post("/login", data=form, base_url="https://localhost", headers=headers).status_code == code


# ---- Secrets stay out of the log


def test_an_error_of_the_database_shows_no_parameters(app: Flask, manager: BackgroundWorkerManager) -> None:
    with app.app_context():
        engines = [db.engine, manager.stores.main.engine]
        for engine in engines:
            with engine.connect() as connection, pytest.raises(DBAPIError) as raised:
                connection.execute(
                    text("SELECT nonsense FROM users WHERE password_hash = :given"), {"given": PASSWORD_HASH}
                )
            assert PASSWORD_HASH not in str(raised.value)
            assert "hide_parameters" in str(raised.value)


def test_an_error_of_the_database_shows_no_row(app: Flask, manager: BackgroundWorkerManager, make_user: Make) -> None:
    user = make_user()
    with app.app_context():
        for engine in (db.engine, manager.stores.main.engine):
            for change in ("status = 'gone'", "name = NULL", "id = id + 1, email = 'other', status = NULL"):
                with engine.connect() as connection, pytest.raises(DBAPIError) as raised:
                    connection.execute(text(f"UPDATE users SET {change}"))
                shown = "".join(traceback.format_exception(raised.value))
                assert PASSWORD_HASH not in shown
                assert user.email not in shown
                assert "constraint" in shown


@on_postgresql
def test_an_error_of_the_database_shows_no_email_that_is_taken(app: Flask, make_user: Make) -> None:
    user = make_user()
    with pytest.raises(DBAPIError, match="uq_users_email") as raised:
        make_user(email=user.email)
    assert user.email not in "".join(traceback.format_exception(raised.value))
    with pytest.raises(DBAPIError, match="cannot contain NUL"):  # psycopg says so, without asking the server
        make_user(name="\0")


@on_postgresql
def test_another_sqlalchemy_engine_of_the_process_is_left_alone(app: Flask, make_user: Make) -> None:
    user = make_user()
    with app.app_context():
        other = create_engine(db.engine.url, poolclass=NullPool)
    with other.connect() as connection, pytest.raises(DBAPIError, match="Failing row contains") as raised:
        connection.execute(text("UPDATE users SET name = NULL"))
    assert user.email in str(raised.value)


def test_the_first_line_of_an_error_is_fit_for_a_log() -> None:
    assert first_line(ValueError("red \x1b[31m\u202eñ 🙂\nsecond line")) == r"red \x1b[31m\u202eñ 🙂"
    assert first_line(ValueError("a\0b")) == r"a\x00b"
    assert first_line(ValueError()) == "ValueError"
