"""The lock of the shop's preparation, and the write lock that a migration needs."""

import re
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest
from flask import Flask
from sqlalchemy import event, make_url
from support.databases import dispose
from support.shop import settings

from app import create_app
from background.errors import DatabaseNotReady
from migrations import schema
from models import db


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    return sqlite_url


@pytest.fixture
def path(database_url: str) -> Path:
    return Path(str(make_url(database_url).database))


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flask:
    """Give the application on the embedded file of a folder of its own."""
    app = create_app(settings(f"sqlite:///{tmp_path / 'folder' / 'bookstore.sqlite'}", DATABASE_IS_EMBEDDED=True))
    app.config["DATABASE_IS_EMBEDDED"] = True
    monkeypatch.setattr(schema, "LOCK_SECONDS", 0.3)
    return app


@pytest.mark.usefixtures("open_umask")
def test_the_lock_of_the_preparation_is_private_even_if_an_earlier_release_made_it(
    embedded: Flask, tmp_path: Path
) -> None:
    lock = tmp_path / "folder" / ".prepare.sqlite"
    lock.parent.mkdir()
    lock.write_text("")
    lock.chmod(0o666)
    with embedded.app_context():
        schema.ensure_ready()
        dispose()
    assert f"{stat.S_IMODE(lock.stat().st_mode):o}" == "600"


def test_a_lock_of_the_preparation_that_another_process_keeps_ends_the_start_with_a_sentence(
    embedded: Flask, tmp_path: Path
) -> None:
    lock = tmp_path / "folder" / ".prepare.sqlite"
    lock.parent.mkdir()
    with closing(sqlite3.connect(lock, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with embedded.app_context(), pytest.raises(DatabaseNotReady, match=f"Another process has kept the lock {lock}"):
            schema.ensure_ready()


def test_a_write_lock_that_another_process_keeps_ends_a_migration_with_a_sentence(
    path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "LOCK_SECONDS", 0.3)
    app = create_app(settings(database_url))
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with app.app_context():
            with pytest.raises(
                DatabaseNotReady, match=rf"{path} cannot be used \(database is locked.* End that process"
            ):
                schema.upgrade()
            dispose()


def test_a_full_disk_ends_a_command_with_a_sentence(embedded: Flask) -> None:
    with embedded.app_context():
        event.listen(db.engine, "connect", lambda driver, _: driver.execute("PRAGMA max_page_count = 20"))
        dispose()
    ended = embedded.test_cli_runner().invoke(args=["reset-password", "ada@example.com"])
    assert ended.exit_code == 1
    assert re.search(r"^Error: The database file .* cannot be used \(database or disk is full\)", ended.stderr, re.M)
    with embedded.app_context():
        dispose()


def test_a_folder_that_cannot_be_made_ends_a_command_with_a_sentence(embedded: Flask, tmp_path: Path) -> None:
    (tmp_path / "folder").touch()
    ended = embedded.test_cli_runner().invoke(args=["init-db"])
    assert ended.exit_code == 1
    assert re.search(r"^Error: The folder of the database file .* cannot be used .* expected a folder", ended.stderr)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_lock_that_cannot_be_made_ends_a_command_with_a_sentence(
    embedded: Flask, tmp_path: Path, is_there: bool
) -> None:
    lock = tmp_path / "folder" / ".prepare.sqlite"
    lock.mkdir(parents=True)
    if is_there:
        lock.rmdir()
        lock.write_text("no database " * 1_000)
    ended = embedded.test_cli_runner().invoke(args=["init-db"])
    assert ended.exit_code == 1
    assert re.search(r"^Error: The folder of the database file .* cannot be used ", ended.stderr)


def test_a_folder_in_the_place_of_the_file_is_named(embedded: Flask, tmp_path: Path) -> None:
    (tmp_path / "folder" / "bookstore.sqlite").mkdir(parents=True)
    with embedded.app_context(), pytest.raises(DatabaseNotReady, match=r"cannot be used .*expected a SQLite database"):
        schema.ensure_ready()
