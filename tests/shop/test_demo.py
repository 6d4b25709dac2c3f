"""The commands that fill a database."""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient, FlaskCliRunner
from sqlalchemy import URL, Engine, text
from support.databases import close
from support.databases import text as as_text
from support.shop import has_password, settings

from app import create_app
from migrations import schema
from models import User, UserRepository, db


def count(engine: Engine, condition: str = "true") -> int:
    with engine.connect() as connection:
        return int(connection.execute(text(f"SELECT count(*) FROM users WHERE {condition}")).scalar_one())


def test_demo_adds_the_given_number_of_users_a_tenth_of_them_stale(runner: FlaskCliRunner, engine: Engine) -> None:
    result = runner.invoke(args=["demo", "--users", "1000"])
    assert result.exit_code == 0, result.output
    assert count(engine) == 1000
    assert 0 < count(engine, "last_login_at IS NULL") < 300
    users = UserRepository(db.session)
    assert users.update_inactive_user_statuses(datetime.now(UTC) - timedelta(days=30)) == 100
    user = db.session.get(User, 1)
    assert user is not None
    assert user.created_at < datetime.now(UTC)
    assert user.password is None
    db.session.remove()


def test_demo_can_be_run_again(runner: FlaskCliRunner, engine: Engine) -> None:
    for number in (10, 25):
        result = runner.invoke(args=["demo", "--users", str(number)])
        assert result.exit_code == 0, result.output
    assert count(engine) == 35


def test_demo_refuses_an_invalid_number_in_one_sentence(runner: FlaskCliRunner, engine: Engine) -> None:
    for number in ("0", "-3", "many", "1.5", "1000000000000", "9" * 5_000, "", "²"):
        result = runner.invoke(args=["demo", f"--users={number}"])
        assert result.exit_code == 1
        assert result.output == f"Error: --users is {number!r}; expected a whole number from 1 to 100000000.\n"
    assert count(engine) == 0


def test_init_db_makes_the_admin_once_and_shows_the_password_once(
    runner: FlaskCliRunner, engine: Engine, client: FlaskClient
) -> None:
    first, second = (runner.invoke(args=["init-db"]) for _ in range(2))
    assert (first.exit_code, second.exit_code) == (0, 0), first.output + second.output
    found = re.search(r"the password (\S+) ", first.output)
    assert found
    assert "exists already" in second.output
    admin = UserRepository(db.session).by_email("admin@localhost")
    assert admin is not None
    assert admin.is_admin
    assert has_password(admin, found[1])
    assert admin.confirmed_at is not None
    form = {"email": "admin@localhost", "password": found[1]}
    assert client.post("/login", data=form).status_code == 302
    assert count(engine) == 1
    db.session.remove()


def test_init_db_makes_the_given_admin_and_removes_the_rights_of_the_demo_admin(
    runner: FlaskCliRunner, engine: Engine, make_user: Callable[..., User]
) -> None:
    make_user(email="admin@example.com", is_admin=True)
    result = runner.invoke(args=["init-db", "--admin", " You@Your.Shop"])
    assert result.exit_code == 0, result.output
    assert "The admin is you@your.shop, the password" in result.output
    assert "The demo shop's admin@example.com is no longer an admin." in result.output
    assert count(engine, "is_admin AND email = 'you@your.shop'") == count(engine, "is_admin") == 1


def test_init_db_refuses_an_invalid_address_the_demo_shops_address_and_a_customers_address(
    runner: FlaskCliRunner, engine: Engine, make_user: Callable[..., User]
) -> None:
    make_user(email="admin@example.com", is_admin=True)
    make_user(email="nat@example.com")
    for given, complaint in [
        ("", "expected an e-mail address of yours"),
        ("me", "expected an e-mail address of yours"),
        ("Admin@example.com", "expected an e-mail address of yours"),
        ("nat@example.com", "has an account without admin rights"),
    ]:
        result = runner.invoke(args=["init-db", "--admin", given])
        assert result.exit_code == 1
        assert complaint in result.output
    assert count(engine) == 2
    assert count(engine, "is_admin") == 1


def test_reset_password_shows_a_new_password_once(
    runner: FlaskCliRunner, make_user: Callable[..., User], engine: Engine
) -> None:
    user = make_user(email="ada@example.com")
    result = runner.invoke(args=["reset-password", " Ada@Example.com"])
    found = re.search(r"The password of ada@example.com is (\S+) \(shown this once\)", result.output)
    assert found, result.output
    changed = db.session.get(User, user.id)
    assert changed is not None
    assert has_password(changed, found[1])
    assert changed.fs_uniquifier != user.fs_uniquifier
    db.session.remove()


@pytest.mark.parametrize("email", ["ada@example.com", "%", "ada\0@example.com", "\udcff@example.com"])
def test_reset_password_of_no_user_is_one_sentence(runner: FlaskCliRunner, engine: Engine, email: str) -> None:
    result = runner.invoke(args=["reset-password", email])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: No user has the e-mail {email!r}; expected the e-mail of an account")


def test_reset_password_of_an_email_beyond_the_encoding_of_the_database_is_one_sentence(
    postgresql_server: URL, databases: Callable[[str], object]
) -> None:
    databases("CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    app = create_app(settings(as_text(postgresql_server.set(database="latin"))))
    with app.app_context():
        schema.upgrade()
    result = app.test_cli_runner().invoke(args=["reset-password", "漢@example.com"])
    assert result.output.startswith("Error: No user has the e-mail '漢@example.com'; expected the e-mail of an account")
    close(app)
    databases("DROP DATABASE latin WITH (FORCE)")


@pytest.mark.parametrize("command", [["init-db"], ["demo"], ["reset-password", "ada@example.com"]])
def test_a_command_names_the_remedy_for_a_missing_schema(tmp_path: Path, command: list[str]) -> None:
    app: Flask = create_app(settings(f"sqlite:///{tmp_path / 'missing.sqlite'}"))
    result = app.test_cli_runner().invoke(args=command)
    assert result.exit_code == 1
    assert "does not exist. Make it with `flask db upgrade`." in result.output
    assert not (tmp_path / "missing.sqlite").exists()
