"""Secrets and personal data stay out of the errors of the database."""

import traceback

import pytest
from flask import Flask
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool
from support.account_forms import Make
from support.databases import on_postgresql
from support.shop import PASSWORD_HASH

from background import BackgroundWorkerManager
from background.errors import first_line
from models import db


def test_an_error_of_the_database_shows_no_parameters(app: Flask, manager: BackgroundWorkerManager) -> None:
    with app.app_context():
        engines = [db.engine, manager.stores.main.engine]
        for engine in engines:
            with engine.connect() as connection, pytest.raises(DBAPIError) as raised:
                connection.execute(text("SELECT nonsense FROM users WHERE password = :given"), {"given": PASSWORD_HASH})
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
