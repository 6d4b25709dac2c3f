"""Admins: their rights, what they do to accounts, and the audit of it."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from support.account_forms import (
    NEW,
    Login,
    Make,
    choose,
    is_logged_in,
    link_in,
    log_in,
    payloads,
    send_mails,
    stored,
)
from support.databases import on_sqlite
from support.fleet import at_once
from support.shop import PASSWORD

from models import AuditEntry, User, UserRepository, db


@pytest.fixture
def admin(client: FlaskClient, make_user: Make, login: Login) -> User:
    user = make_user(email="you@your.shop", is_admin=True)
    login(client, user)
    return user


# ---- Rights


def test_an_admin_makes_and_unmakes_admins_but_the_last_admin_stays(
    app: Flask, client: FlaskClient, make_user: Make, admin: User
) -> None:
    user = make_user()

    def press(user: User, action: str) -> str:
        return client.post(f"/admin/users/{user.id}/{action}", follow_redirects=True).text

    assert "is the last admin, or is not an admin" in press(admin, "unmake-admin")
    assert "is the last admin, or is not an admin" in press(user, "unmake-admin")
    assert f"{user.email} is an admin now." in press(user, "make-admin")
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


def press(client: FlaskClient, user: User, action: str) -> str:
    return client.post(f"/admin/users/{user.id}/{action}", follow_redirects=True).text


@on_sqlite
def test_a_new_admin_is_told_by_mail_and_chooses_a_new_password(
    app: Flask, client: FlaskClient, make_user: Make, admin: User, outbox: Path
) -> None:
    user, theirs = make_user(), app.test_client()
    assert "We have sent a mail with a link to choose a new password." in press(client, user, "make-admin")
    assert stored(app, user).password is None
    assert not log_in(theirs, user.email, PASSWORD)
    assert payloads(app) == [{"admin link": user.id}]
    [mail] = send_mails(app, outbox)
    assert mail["To"] == user.email
    assert "an admin has made you an admin" in mail.get_content()
    assert choose(theirs, link_in(mail)).location == "/login"
    assert log_in(theirs, user.email, NEW)
    assert theirs.get("/admin/users").status_code == 200


@on_sqlite
def test_an_unconfirmed_or_disabled_user_does_not_become_an_admin(
    app: Flask, client: FlaskClient, make_user: Make, admin: User
) -> None:
    columns: list[dict[str, Any]] = [{"confirmed_at": None}, {"active": False}]
    for user in [make_user(**each) for each in columns]:
        assert "is disabled or has not confirmed the e-mail: nothing was changed." in press(client, user, "make-admin")
        assert not stored(app, user).is_admin
    assert payloads(app) == []
    page = client.get("/admin/users").text
    assert "not confirmed" in page
    assert "Make an admin" not in page


@on_sqlite
def test_a_viewer_sees_the_workers_without_buttons_until_an_admin_takes_the_right(
    app: Flask, client: FlaskClient, make_user: Make, login: Login, admin: User
) -> None:
    user, theirs = make_user(), app.test_client()
    assert f"{user.email} sees the workers&#39; pages now" in press(client, user, "make-viewer")
    assert "sees them already" in press(client, user, "make-viewer")
    login(theirs, stored(app, user))
    assert 'action="/workers/worker' not in theirs.get("/workers/").text
    assert theirs.post("/workers/worker/passive_user_checker_worker/pause").status_code == 403
    assert 'href="/workers/"' in theirs.get("/").text
    assert 'href="/admin' not in theirs.get("/").text
    assert "no longer sees the workers" in press(client, user, "unmake-viewer")
    assert not is_logged_in(theirs)
    login(theirs, stored(app, user))
    assert theirs.get("/workers/").status_code == 403
    press(client, user, "make-viewer")
    press(client, user, "make-admin")
    assert not stored(app, user).is_viewer
    assert "sees them already" in press(client, user, "make-viewer")
    with app.app_context():
        recorded = set(db.session.scalars(select(AuditEntry.action)))
    assert {"admin.make_viewer", "admin.unmake_viewer"} <= recorded
    assert "background.pause" not in recorded, "it was refused"


# ---- Accounts end


@on_sqlite
def test_a_disabled_account_is_logged_out_and_stays_out_until_it_is_enabled(
    app: Flask, client: FlaskClient, make_user: Make, login: Login, admin: User
) -> None:
    user, theirs = make_user(), app.test_client()
    login(theirs, user)
    assert f"{user.email} is logged out, and cannot log in again" in press(client, user, "disable")
    assert "is disabled already, or is an admin" in press(client, user, "disable")
    assert not is_logged_in(theirs)
    assert not log_in(theirs, user.email, PASSWORD)
    assert f"{user.email} can log in again." in press(client, user, "enable")
    assert "is enabled already" in press(client, user, "enable")
    assert log_in(theirs, user.email, PASSWORD)


@on_sqlite
def test_an_admin_is_not_disabled_so_one_remains(app: Flask, client: FlaskClient, make_user: Make, admin: User) -> None:
    other = make_user(is_admin=True)
    for user in (admin, other):
        assert "Remove the admin rights first." in press(client, user, "disable")
        assert stored(app, user).active


def test_disabling_a_user_who_is_made_an_admin_at_once_leaves_no_disabled_admin(app: Flask, make_user: Make) -> None:
    make_user(is_admin=True)
    for _ in range(4):
        user = make_user()
        hows = UserRepository.make_admin, UserRepository.disable
        at_once(2, lambda index, user=user, hows=hows: change(app, user, hows[index]))  # type: ignore[misc]
        found = stored(app, user)
        assert (found.is_admin, found.active) in [(True, True), (False, False)]


def change(app: Flask, user: User, how: Any) -> bool:
    with app.app_context():
        changed: bool = how(UserRepository(db.session), user.id)
        db.session.commit()
        return changed


@on_sqlite
def test_a_user_deletes_the_account_by_the_password_and_the_row_stays_without_personal_data(
    app: Flask, client: FlaskClient, make_user: Make, login: Login
) -> None:
    user, elsewhere = make_user(email="nat@example.com", name="Nat Turner"), app.test_client()
    for each in (client, elsewhere):
        login(each, user)
    assert "This is not your password." in client.post("/account/delete", data={"password": "wrong"}).text
    assert (
        "Your account has been deleted."
        in client.post("/account/delete", data={"password": PASSWORD}, follow_redirects=True).text
    )
    assert not is_logged_in(client)
    assert not is_logged_in(elsewhere)
    assert not log_in(client, "nat@example.com", PASSWORD)
    left = stored(app, user)
    assert (left.email, left.name, left.password) == (f"deleted {user.id}", "Deleted user", None)
    assert (left.is_deleted, left.active, left.last_login_at) == (True, False, None)
    make_user(email="nat@example.com")  # the e-mail is free


@on_sqlite
def test_an_admin_cannot_delete_their_account_and_a_deleted_account_stays_deleted(
    app: Flask, client: FlaskClient, make_user: Make, admin: User
) -> None:
    page = client.post("/account/delete", data={"password": PASSWORD}).text
    assert "Another admin must take your rights first." in page
    gone = make_user()
    with app.app_context():
        assert UserRepository(db.session).delete(db.session.get_one(User, gone.id))
        db.session.commit()
    assert "or has deleted the account: nothing was changed." in press(client, gone, "enable")
    assert not stored(app, gone).active
    assert f"deleted {gone.id}" in client.get("/admin/users").text


@on_sqlite
def test_a_deleted_user_gets_no_mail(
    app: Flask, client: FlaskClient, make_user: Make, admin: User, outbox: Path
) -> None:
    user = make_user()
    press(client, user, "password-link")
    with app.app_context():
        UserRepository(db.session).delete(db.session.get_one(User, user.id))
        db.session.commit()
    assert send_mails(app, outbox) == []


# ---- A recent login


def age(client: FlaskClient, minutes: int) -> None:
    with client.session_transaction() as content:
        content.update(fs_paa=time.time() - 60 * minutes)
        content.pop("fs_gexp", None)


@on_sqlite
def test_a_change_by_an_admin_needs_a_recent_login(
    app: Flask, client: FlaskClient, make_user: Make, admin: User
) -> None:
    user = make_user()
    age(client, 16)
    page = "http://localhost/admin/users?q=reader"
    for path in (f"/admin/users/{user.id}/make-admin", "/workers/messages/change"):
        response = client.post(path, headers={"Referer": page})
        assert response.location == "/account/verify?next=/admin/users?q%3Dreader"
    assert not stored(app, user).is_admin
    question = response.location
    assert "Please enter your password again." in client.get(question).text
    assert "This is not your password." in client.post(question, data={"password": "wrong"}).text
    assert client.post(question, data={"password": PASSWORD}).location == "/admin/users?q=reader"
    press(client, user, "make-admin")
    assert stored(app, user).is_admin


@on_sqlite
def test_the_question_for_the_password_leads_to_no_other_host(
    client: FlaskClient, make_user: Make, admin: User
) -> None:
    user = make_user()
    for sender in ("https://evil.example//evil.example/", "//evil.example", "x", ""):
        age(client, 16)
        location = client.post(f"/admin/users/{user.id}/log-out", headers={"Referer": sender}).location
        assert "evil" not in location
    for target in ("https://evil.example/", "//evil.example/"):
        response = client.post(f"/account/verify?next={target}", data={"password": PASSWORD})
        assert response.location == "/"


@on_sqlite
def test_an_admin_who_works_on_is_not_asked_again(client: FlaskClient, make_user: Make, admin: User) -> None:
    user = make_user()
    press(client, user, "log-out")
    with client.session_transaction() as content:
        content["fs_paa"] = time.time() - 3600
    assert "has been logged out everywhere." in press(client, user, "log-out")


# ---- The audit


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
