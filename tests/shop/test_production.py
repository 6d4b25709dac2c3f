"""Production refuses to start with well-known secrets, and trusts only its own proxies."""

import secrets
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, request
from sqlalchemy import create_engine, text
from support.bad_http import said
from support.databases import close, on_sqlite
from support.fork_server import Nursery
from support.processes import environment, flask, gunicorn
from support.shop import settings

from app import create_app
from background.errors import InvalidConfig
from config import KEYS
from demo import refuse_in_production
from models import User
from tests.shop.test_config import load

SECRET = secrets.token_hex()


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*KEYS, "SERVER_SOFTWARE", "FLASK_DEBUG"):
        monkeypatch.delenv(name, raising=False)


# ---- What production is


def test_production_is_set_by_gunicorn_with_a_database_url_or_by_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = {"DATABASE_URL": "postgresql://db/shop", "SECRET_KEY": SECRET}
    assert load(tmp_path, url)["PRODUCTION"] is False
    assert load(tmp_path, {**url, "PRODUCTION": "true"})["PRODUCTION"] is True
    monkeypatch.setenv("SERVER_SOFTWARE", "gunicorn/27.1")
    assert load(tmp_path, url)["PRODUCTION"] is True
    assert load(tmp_path, {**url, "PRODUCTION": "no"})["PRODUCTION"] is False
    assert load(tmp_path, {})["PRODUCTION"] is False  # the demo shop


def test_logging_in_needs_https_in_production_by_default(tmp_path: Path) -> None:
    for given, secure in [
        ({}, False),
        ({"PRODUCTION": True, "SECRET_KEY": SECRET}, True),
        ({"PRODUCTION": True, "SECRET_KEY": SECRET, "SESSION_COOKIE_SECURE": "no"}, False),
    ]:
        config = load(tmp_path, given)
        assert (config["SESSION_COOKIE_SECURE"], config["SESSION_COOKIE_HTTPONLY"]) == (secure, True)
        assert config["SESSION_COOKIE_SAMESITE"] == "Lax"


def test_the_kept_key_is_not_enough_in_production(tmp_path: Path) -> None:
    load(tmp_path)
    assert (tmp_path / "secret_key").exists()
    with pytest.raises(InvalidConfig, match=r"^SECRET_KEY is not set in production.*`python -c .*token_hex\(\)"):
        load(tmp_path, {"PRODUCTION": True})


@pytest.mark.parametrize(
    "known",
    [
        *("dev", "secret", "changeme", "change-me", "your-secret-key", "...", "fifteen letters"),
        *("You-Will-Never-Guess", " super-secret-key ", "a" * 40, b'_5#y2L"F4Q8z\n\xec]/', b"secret"),
    ],
)
def test_a_well_known_or_short_key_is_refused_in_production(tmp_path: Path, known: str | bytes) -> None:
    assert load(tmp_path, {"SECRET_KEY": known})["SECRET_KEY"] == known
    with pytest.raises(InvalidConfig, match=r"^SECRET_KEY is short or well known in production") as raised:
        load(tmp_path, {"SECRET_KEY": known, "PRODUCTION": True})
    assert len(known) < 10 or str(known) not in str(raised.value)


def test_a_random_key_is_accepted_in_production(tmp_path: Path) -> None:
    for key in (SECRET, secrets.token_bytes(24), secrets.token_urlsafe(12)):
        assert load(tmp_path, {"SECRET_KEY": key, "PRODUCTION": True})["PRODUCTION"] is True


def test_the_debugger_is_refused_in_production(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidConfig, match=r"^The debugger is on in production"):
        load(tmp_path, {"SECRET_KEY": SECRET, "PRODUCTION": True, "DEBUG": True})
    monkeypatch.setenv("FLASK_DEBUG", "1")
    with pytest.raises(InvalidConfig, match=r"^The debugger is on in production"):
        load(tmp_path, {"SECRET_KEY": SECRET, "PRODUCTION": True})


def test_the_demo_admin_is_refused_in_production_until_it_is_no_longer_an_admin(
    app: Flask, make_user: Callable[..., User]
) -> None:
    make_user(email="admin@example.com", is_admin=True)
    with app.app_context():
        refuse_in_production()
        app.config["PRODUCTION"] = True
        with pytest.raises(
            InvalidConfig, match=r"^The demo shop's admin@example.com is an admin .*init-db --admin you@"
        ):
            refuse_in_production()
    app.test_cli_runner().invoke(args=["init-db"])
    with app.app_context():
        refuse_in_production()


# ---- As an operator meets it


@pytest.mark.parametrize("more", [(), ("--preload",)], ids=["gunicorn", "preload"])
def test_gunicorn_ends_with_a_sentence_without_a_secret_key(
    sqlite_url: str, more: tuple[str, ...], nursery: Nursery
) -> None:
    code, output = nursery.run(gunicorn("-w", "2", *more, "app:create_app()"), environment(sqlite_url, SECRET_KEY=""))
    assert code == (1 if more else 3)
    assert output.count("SECRET_KEY is not set in production") == 1
    assert "Booting worker" not in output
    assert "Traceback" not in output


@pytest.mark.parametrize("enabled", ["yes", "no"])
def test_gunicorn_ends_with_a_sentence_if_its_database_has_the_demo_admin(
    sqlite_url: str, enabled: str, nursery: Nursery
) -> None:
    add_demo_admin(sqlite_url)
    code, output = nursery.run(
        gunicorn("-w", "1", "app:create_app()"), environment(sqlite_url, WORKERS_ENABLED=enabled)
    )
    assert code == 3
    assert "The demo shop's admin@example.com is an admin of this database in production" in output
    assert "flask init-db --admin you@your.shop" in output
    assert "Traceback" not in output


def test_flask_run_is_production_if_the_setting_says_so(sqlite_url: str, nursery: Nursery) -> None:
    add_demo_admin(sqlite_url)
    command = flask("run", "--port", "0")
    code, output = nursery.run(command, environment(sqlite_url, FLASK_APP="app", PRODUCTION="true"))
    assert code == 1
    assert "Error: The demo shop's admin@example.com is an admin" in output
    assert "Traceback" not in output
    with nursery.forked(command, environment(sqlite_url, FLASK_APP="app", SECRET_KEY="dev")) as server:
        server.wait_for("Running on http")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def add_demo_admin(url: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO users (email, name, password_hash, is_admin, created_at) "
                "VALUES ('admin@example.com', 'Admin', '!', true, '2026-11-21 00:00:00.000000')"
            )
        )
    engine.dispose()


# ---- Proxies


@on_sqlite
@pytest.mark.parametrize(
    ("proxies", "seen"),
    [
        (0, "127.0.0.1 http localhost"),
        (1, "192.0.2.3 https your.shop"),
        (2, "192.0.2.2 http also.your.shop"),
    ],
)
def test_only_the_configured_proxies_name_the_visitor(database_url: str, proxies: int, seen: str) -> None:
    app = create_app(settings(database_url, PROXIES=proxies))
    app.add_url_rule("/seen", view_func=lambda: f"{request.remote_addr} {request.scheme} {request.host}")
    headers = {
        "X-Forwarded-For": "192.0.2.1, 192.0.2.2, 192.0.2.3",  # the first address is the visitor's invention
        "X-Forwarded-Proto": "http, https",
        "X-Forwarded-Host": "also.your.shop, your.shop",
    }
    assert app.test_client().get("/seen", headers=headers).text == seen
    close(app)


def test_under_gunicorn_no_header_changes_the_path_of_the_shop(sqlite_url: str, nursery: Nursery) -> None:
    command = gunicorn("-w", "1", "app:create_app()")
    with nursery.forked(command, environment(sqlite_url, WORKERS_ENABLED="no")) as server:
        port = int(server.wait_for(r"Listening at: http://127.0.0.1:(\d+)")[1])
        for path, header in [
            ("/", "X-Forwarded-Proto: https"),
            ("/", "X-Forwarded-Ssl: on"),
            ("/", "SCRIPT_NAME: /evil"),
            ("//evil.example/", "SCRIPT_NAME: //evil.example"),
            ("/", "PATH_INFO: /nowhere"),
        ]:
            asked = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{header}\r\nConnection: close\r\n\r\n"
            answer = said(port, asked.encode())
            assert answer.startswith(b"HTTP/1.1 200 OK" if path == "/" else b"HTTP/1.1 404"), header
            assert b"Strict-Transport-Security" not in answer, header
            assert b'href="//evil' not in answer, header


@on_sqlite
def test_production_without_a_proxy_warns_at_the_start(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    for production, proxies, times in [(True, 0, 1), (True, 1, 0), (False, 0, 0), (False, 2, 0)]:
        caplog.clear()
        close(create_app(settings(database_url, SECRET_KEY=SECRET, PRODUCTION=production, PROXIES=proxies)))
        assert caplog.text.count("PROXIES is 0 in production") == times, (production, proxies)


def test_a_command_that_serves_nothing_does_not_warn_of_proxies(sqlite_url: str, nursery: Nursery) -> None:
    env = environment(sqlite_url, FLASK_APP="app", PRODUCTION="true")
    code, output = nursery.run(flask("workers", "list"), env)
    assert code == 0
    assert "PROXIES" not in output


@pytest.mark.parametrize(("given", "kept"), [("0", 0), (0, 0), ("2", 2), (10, 10)])
def test_the_number_of_proxies_may_be_zero(tmp_path: Path, given: Any, kept: int) -> None:
    assert load(tmp_path, {"PROXIES": given})["PROXIES"] == kept


@pytest.mark.parametrize("given", [-1, 11, "one", True, False, 1.5])
def test_an_invalid_number_of_proxies_is_refused(tmp_path: Path, given: Any) -> None:
    with pytest.raises(InvalidConfig, match=r"^PROXIES is .*expected a whole number from 0 to 10"):
        load(tmp_path, {"PROXIES": given})


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://your.shop", "https://your.shop/"),
        ("http://10.0.0.7:8000/books/", "http://10.0.0.7:8000/books/"),
    ],
)
def test_the_public_url_may_have_a_path(tmp_path: Path, given: str, kept: str) -> None:
    assert load(tmp_path, {"PUBLIC_URL": given})["PUBLIC_URL"] == kept


@pytest.mark.parametrize(
    "given",
    [
        "your.shop",
        "ftp://your.shop",
        "https://",
        "https://a b",
        "https://x@y",
        "https://a/?q",
        "https://a:0",
        "https://a..b",
        "https://" + "a" * 64,
        5,
    ],
)
def test_an_invalid_public_url_is_refused(tmp_path: Path, given: Any) -> None:
    with pytest.raises(InvalidConfig, match=r"^PUBLIC_URL is .*expected https:// and a host"):
        load(tmp_path, {"PUBLIC_URL": given})
