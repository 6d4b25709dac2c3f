"""The shop's tables enforce their rules, and the search pages through users by its indexes."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import product
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from models import User, UserRepository, db


@pytest.fixture
def users(app: Flask) -> Iterator[UserRepository]:
    with app.app_context():
        yield UserRepository(db.session)
        db.session.remove()


def pages(users: UserRepository, limit: int = 2, **search: Any) -> list[list[str]]:
    found, after = [], None
    while True:
        page = users.search(after=after, limit=limit, **search)
        found.append([user.name for user in page.users])
        after = page.after
        if after is None:
            return found


@pytest.fixture
def readers(make_user: Callable[..., User]) -> None:
    for email, name, status in [
        ("zoe@example.com", "Ada", "active"),
        ("ada@example.com", "Zoe", "passive"),
        ("bob@example.com", "Adam", "active"),
        ("adrian@example.com", "Émile", "active"),
        ("100%@example.com", "Adam", "passive"),
    ]:
        make_user(email=email, name=name, status=status)


def test_sql_of_an_earlier_release_adds_a_user_with_sessions_of_its_own(users: UserRepository) -> None:
    columns = "email, name, password_hash, created_at"
    for email in ("nat@example.com", "ada@example.com"):
        statement = f"INSERT INTO users ({columns}) VALUES ('{email}', 'Nat', '!', '2026-01-02 03:04:05.000006')"
        db.session.execute(text(statement))
    db.session.add(User(email="bob@example.com", name="Bob", password_hash="!"))
    db.session.commit()
    found = list(db.session.scalars(select(User)))
    assert [user.password for user in found] == ["!"] * 3
    assert len({user.fs_uniquifier for user in found}) == 3
    assert all(user.active for user in found)


def test_a_user_is_active_by_default(make_user: Callable[..., User]) -> None:
    user = make_user()
    assert (user.status, user.is_admin, user.last_login_at) == ("active", False, None)
    assert user.created_at.tzinfo is UTC


def test_created_at_is_the_databases_clock(app: Flask) -> None:
    with app.app_context():
        user = User(email="new@example.com", name="New")
        db.session.add(user)
        db.session.commit()
        assert abs((datetime.now(UTC) - user.created_at).total_seconds()) < 60


def test_two_users_cannot_have_one_email(make_user: Callable[..., User]) -> None:
    make_user(email="ada@example.com")
    with pytest.raises(IntegrityError):
        make_user(email="ada@example.com")


def test_a_user_is_found_by_the_email(users: UserRepository, readers: None) -> None:
    found = users.by_email("ada@example.com")
    assert found is not None
    assert found.name == "Zoe"
    assert users.by_email("stranger@example.com") is None


SEARCHES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["Ada", "Zoe", "Adam", "Émile", "Adam"]),
    ({"status": "passive"}, ["Zoe", "Adam"]),
    ({"status": "active"}, ["Ada", "Adam", "Émile"]),
    ({"status": "unheard of"}, []),
    ({"prefix": "ad"}, ["Zoe", "Émile", "Ada", "Adam", "Adam"]),
    ({"prefix": " AD "}, ["Zoe", "Émile", "Ada", "Adam", "Adam"]),
    ({"prefix": "ad", "status": "active"}, ["Émile", "Ada", "Adam"]),
    ({"prefix": "adam"}, ["Adam", "Adam"]),
    ({"prefix": "Ém"}, ["Émile"]),
    ({"prefix": "100%"}, ["Adam"]),
    ({"prefix": "%"}, []),
    ({"prefix": "stranger"}, []),
    ({"prefix": "a\0d"}, ["Zoe", "Émile", "Ada", "Adam", "Adam"]),
]


@pytest.mark.usefixtures("readers")
def test_the_pages_of_a_search_have_each_user_once_and_in_order(users: UserRepository) -> None:
    for (search, expected), limit in product(SEARCHES, (1, 2, 3, 50)):
        found = pages(users, limit, **search)
        assert [name for page in found for name in page] == expected, (search, limit)
        assert all(len(page) == limit for page in found[:-1]), (search, limit)


@pytest.mark.usefixtures("readers")
def test_a_page_after_an_invalid_position_is_the_first_page(users: UserRepository) -> None:
    for after in ("", "nonsense", "id:x:", "name", "::", "id:99999999999999999999:", "\0"):
        assert [user.name for user in users.search(after=after, limit=1).users] == ["Ada"], after
