"""Production: the servers that are in it, the complaints that refuse their start, and the proxies that they trust."""

import secrets
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, request
from itsdangerous import URLSafeTimedSerializer
from sqlalchemy import create_engine, text
from support.bad_http import said
from support.databases import close, on_sqlite
from support.fork_server import Nursery
from support.processes import environment, flask, gunicorn, started
from support.servers import served
from support.shop import settings

import production
from app import create_app
from background.errors import InvalidConfig
from config import KEYS
from models import User
from tests.shop.test_config import load

SECRET = secrets.token_hex()
SAFE = {"SECRET_KEY": SECRET, "PUBLIC_URL": "https://127.0.0.1", "METRICS_TOKEN": SECRET}
COMPLETE = {**SAFE, "MAIL_URL": "smtp://mail", "PROXIES": "1"}


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*KEYS, "FLASK_DEBUG"):
        monkeypatch.delenv(name, raising=False)


def answer(address: str, path: str = "/login", **headers: str) -> tuple[int, str]:
    """Return the status of the page, and the cookie that it sets."""
    try:
        asked = urllib.request.Request(address + path, headers=headers)
        with urllib.request.urlopen(asked, timeout=30) as response:
            return response.status, response.headers["Set-Cookie"] or ""
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Set-Cookie"] or ""


# ---- The servers that are in production


@on_sqlite
def test_the_first_request_of_a_server_with_a_database_url_begins_production(database_url: str) -> None:
    app = create_app({"DATABASE_URL": database_url, "WORKERS_ENABLED": False, **SAFE})
    assert not app.config["PRODUCTION"]
    assert app.test_client().get("/login").status_code == 200
    assert not app.config["PRODUCTION"]
    with served(app) as address:
        status, cookie = answer(address)
    assert (status, app.config["PRODUCTION"]) == (200, True)
    assert cookie.startswith("__Host-session=")
    assert {"Secure", "HttpOnly", "Path=/", "SameSite=Lax"} <= set(cookie.split("; "))
    assert "Domain" not in cookie
    close(app)


@on_sqlite
@pytest.mark.parametrize("more", [{"PRODUCTION": "no"}, {"TESTING": True}, {"DATABASE_URL": "sqlite://"}])
def test_neither_a_demo_nor_a_test_is_in_production(database_url: str, more: dict[str, Any]) -> None:
    app = create_app({"DATABASE_URL": database_url, "WORKERS_ENABLED": False, **more})
    with served(app) as address:
        status, cookie = answer(address)
    assert status == 200
    assert cookie.startswith("session=")
    assert not app.config["PRODUCTION"]
    close(app)


@on_sqlite
def test_a_process_whose_workers_began_before_it_served_is_refused_too(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app({"DATABASE_URL": database_url, "WORKERS_ENABLED": False, **SAFE, "WTF_CSRF_ENABLED": False})
    app.extensions["background_workers"].serve()
    with served(app) as address:
        assert [answer(address)[0] for _ in range(2)] == [503, 503]
    assert caplog.text.count("WTF_CSRF_ENABLED or WTF_CSRF_CHECK_DEFAULT is false in production") == 1
    close(app)


@pytest.mark.promise
def test_another_server_answers_503_to_each_request_until_its_settings_are_safe(
    database_url: str, nursery: Nursery
) -> None:
    command = [sys.executable, "-m", "waitress", "--listen=127.0.0.1:0", "--call", "app:create_app"]
    with nursery.forked(command, environment(database_url, PUBLIC_URL="http://your.shop")) as server:
        address = server.wait_for(r"Serving on (http://\S+)")[1]
        assert [answer(address, path)[0] for path in ("/", "/login", "/health/live", "/static/style.css")] == [503] * 4
        server.wait_for("PUBLIC_URL is http://your.shop/ in production")
        assert server.output.count("PUBLIC_URL is http://your.shop/ in production") == 1
        assert "joined" not in server.output
    with nursery.forked(command, environment(database_url, PUBLIC_URL="https://127.0.0.1")) as server:
        address = server.wait_for(r"Serving on (http://\S+)")[1]
        status, cookie = answer(address)
        assert status == 200
        assert cookie.startswith("__Host-session=")
        assert server.output.count("PROXIES is 0 in production") == 1
        server.wait_for("joined")


@pytest.mark.promise
def test_flask_run_is_production_if_the_setting_says_so(sqlite_url: str, nursery: Nursery) -> None:
    add_demo_admin(sqlite_url)
    command = flask("run", "--port", "0")
    unsafe = environment(sqlite_url, FLASK_APP="app", SECRET_KEY="dev", PUBLIC_URL="http://your.shop")
    code, output = nursery.run(command, {**unsafe, "PRODUCTION": "true"})
    assert code == 1
    assert "Error: SECRET_KEY is short or well known in production" in output
    assert "PUBLIC_URL is http://your.shop/ in production" in output
    code, output = nursery.run(command, environment(sqlite_url, FLASK_APP="app", PRODUCTION="true"))
    assert code == 1
    assert "Error: The demo shop's admin@example.com is an admin" in output
    assert "Traceback" not in output
    with nursery.forked(command, unsafe) as server:
        address = server.wait_for(r"Running on (http://\S+)")[1]
        assert answer(address)[0] == 200
        assert "in production" not in server.output
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_logging_in_needs_https_in_production_by_default(tmp_path: Path) -> None:
    for given, secure, name in [
        ({}, False, "session"),
        ({"PRODUCTION": True, **SAFE}, True, "__Host-session"),
        ({"PRODUCTION": True, **SAFE, "SESSION_COOKIE_SECURE": "no"}, False, "session"),
        ({"SESSION_COOKIE_SECURE": "yes"}, True, "__Host-session"),
        ({"SESSION_COOKIE_SECURE": "yes", "SESSION_COOKIE_DOMAIN": "your.shop"}, True, "session"),
        ({"SESSION_COOKIE_SECURE": "yes", "SESSION_COOKIE_PATH": "/books"}, True, "session"),
        ({"SESSION_COOKIE_SECURE": "yes", "SESSION_COOKIE_NAME": "mine"}, True, "mine"),
    ]:
        config = load(tmp_path, given)
        assert (config["SESSION_COOKIE_SECURE"], config["SESSION_COOKIE_NAME"]) == (secure, name)
        assert config["SESSION_COOKIE_HTTPONLY"] is True
        assert config["SESSION_COOKIE_SAMESITE"] == "Lax"


# ---- The complaints


def grave(folder: Path, given: dict[str, Any]) -> list[str]:
    return production.complaints_about(load(folder, {"PRODUCTION": True, **given}), is_grave=True)


def warned(folder: Path, given: dict[str, Any]) -> list[str]:
    return production.complaints_about(load(folder, {"PRODUCTION": True, **given}), is_grave=False)


def test_safe_settings_have_no_complaint(tmp_path: Path) -> None:
    assert grave(tmp_path, COMPLETE) == warned(tmp_path, COMPLETE) == []


@pytest.mark.parametrize(
    ("given", "beginning"),
    [
        ({"DEBUG": True}, "The debugger is on in production"),
        ({"TESTING": True}, "TESTING is True in production"),
        ({"SECRET_KEY": None}, "SECRET_KEY is not set in production"),
        ({"SECRET_KEY": "dev"}, "SECRET_KEY is short or well known in production"),
        ({"PUBLIC_URL": "http://your.shop"}, "PUBLIC_URL is http://your.shop/ in production"),
        ({"WTF_CSRF_ENABLED": False}, "WTF_CSRF_ENABLED or WTF_CSRF_CHECK_DEFAULT is false in production"),
        ({"WTF_CSRF_CHECK_DEFAULT": False}, "WTF_CSRF_ENABLED or WTF_CSRF_CHECK_DEFAULT is false in production"),
        ({"RATELIMIT_ENABLED": False}, "RATELIMIT_ENABLED is false in production"),
        ({"METRICS_TOKEN": "fifteen-letters"}, "METRICS_TOKEN is short in production"),
        ({"SESSION_COOKIE_HTTPONLY": False}, "SESSION_COOKIE_HTTPONLY is False"),
        ({"SESSION_COOKIE_SAMESITE": None}, "SESSION_COOKIE_HTTPONLY is True and SESSION_COOKIE_SAMESITE None"),
    ],
)
def test_a_grave_complaint_says_the_value_the_expectation_and_the_remedy(
    tmp_path: Path, given: dict[str, Any], beginning: str
) -> None:
    [sentence] = grave(tmp_path, {**COMPLETE, **given})
    assert sentence.startswith(beginning)
    assert "; expected " in sentence
    assert "fifteen" not in sentence
    assert "\n" not in sentence
    assert warned(tmp_path, {**COMPLETE, **given}) == []


@pytest.mark.parametrize(
    ("given", "beginning"),
    [
        ({"SESSION_COOKIE_SECURE": False}, "SESSION_COOKIE_SECURE is false in production"),
        ({"PUBLIC_URL": None}, "PUBLIC_URL is not set in production"),
        ({"METRICS_TOKEN": None}, "METRICS_TOKEN is not set in production"),
        ({"MAIL_URL": None}, "MAIL_URL is not set in production"),
        ({"PROXIES": 0}, "PROXIES is 0 in production"),
    ],
)
def test_the_other_complaints_warn(tmp_path: Path, given: dict[str, Any], beginning: str) -> None:
    [sentence] = warned(tmp_path, {**COMPLETE, **given})
    assert sentence.startswith(beginning)
    assert "; expected " in sentence
    assert grave(tmp_path, {**COMPLETE, **given}) == []


@pytest.mark.parametrize(
    "weak",
    [
        *("dev", "secret", "changeme", "change-me", "your-secret-key", "...", "fifteen letters", b"secret"),
        *("You-Will-Never-Guess", " super-secret-key ", "a" * 40, b'_5#y2L"F4Q8z\n\xec]/', "1234567890" * 4),
        *("change-me-in-production", "replace-with-a-secret", "password12345678", "abcdefabcdefabcdef", "aB3-" * 10),
        *("bookstorebookstore", "Bookstore-2026-xK7pQ2wR9z", "correct horse battery staple", "correct-HORSE-1"),
        *("8b785540c06807fb8212bca02a56a6", "6Rgavnbf_fjX0yWA", b"\xfb^o*\xecY\xb3\xad.\x1a\x98"),
        "192b9bdd22ab9ed4d12e236c78afcb9a393ec15f71bbf5dc987d54727823bcbf",
    ],
)
def test_a_key_that_a_visitor_could_guess_is_refused_in_production(tmp_path: Path, weak: str | bytes) -> None:
    assert load(tmp_path, {"SECRET_KEY": weak})["SECRET_KEY"] == weak
    [sentence] = grave(tmp_path, {**COMPLETE, "SECRET_KEY": weak})
    assert sentence.startswith("SECRET_KEY is short or well known in production")
    assert len(weak) < 10 or str(weak) not in sentence


@pytest.mark.parametrize("make", [secrets.token_hex, secrets.token_urlsafe, secrets.token_bytes])
@pytest.mark.parametrize("size", [16, 24, 32, 64, 500])
def test_each_random_key_of_128_bits_is_accepted(make: Callable[[int], str | bytes], size: int) -> None:
    assert not [key for key in (make(size) for _ in range(50)) if production.is_weak(key, "Bookstore")]


def test_the_key_that_the_instance_folder_keeps_is_not_enough_in_production(tmp_path: Path) -> None:
    load(tmp_path)
    kept = (tmp_path / "secret_key").read_text()
    config = load(tmp_path, {"PRODUCTION": True})
    assert config["SECRET_KEY"] != kept
    assert config["SECRET_KEY_IS_MADE"] is True


def test_the_demo_admin_is_refused_in_production_until_it_is_no_longer_an_admin(
    app: Flask, make_user: Callable[..., User]
) -> None:
    make_user(email="admin@example.com", is_admin=True)
    with app.app_context():
        production.refuse_data()
        app.config["PRODUCTION"] = True
        with pytest.raises(
            InvalidConfig, match=r"^The demo shop's admin@example.com is an admin .*init-db --admin you@"
        ):
            production.refuse_data()
    app.test_cli_runner().invoke(args=["init-db"])
    with app.app_context():
        production.refuse_data()


# ---- As an operator meets them


@pytest.mark.promise
@pytest.mark.parametrize("more", [(), ("--preload",)], ids=["gunicorn", "preload"])
def test_gunicorn_ends_with_a_line_for_each_grave_complaint(
    sqlite_url: str, more: tuple[str, ...], nursery: Nursery
) -> None:
    env = environment(sqlite_url, SECRET_KEY="", PUBLIC_URL="http://your.shop", METRICS_TOKEN="x")
    code, output = nursery.run(gunicorn("-w", "2", *more, "app:create_app()"), env)
    assert code == 3
    for each in ("SECRET_KEY is not set", "PUBLIC_URL is http://your.shop/", "METRICS_TOKEN is short"):
        assert sum(f"{each} in production" in line for line in output.splitlines()) == 1, output
    assert "MAIL_URL" not in output
    assert "Booting worker" not in output
    assert "Traceback" not in output


@pytest.mark.promise
def test_gunicorn_warns_once_of_the_other_complaints(sqlite_url: str, nursery: Nursery) -> None:
    env = environment(sqlite_url, WORKERS_ENABLED="no")
    with nursery.forked(gunicorn("-w", "3", "app:create_app()"), env) as server:
        server.wait_for("The background workers are off in this process", times=3)
        for each in ("PROXIES is 0", "MAIL_URL is not set", "METRICS_TOKEN is not set"):
            assert server.output.count(f"{each} in production") == 1, server.output
            assert "[WARNING]" in server.wait_for(f".*{each}")[0]


@pytest.mark.promise
def test_gunicorn_logs_each_request_without_the_tokens_of_links(sqlite_url: str, nursery: Nursery) -> None:
    token = URLSafeTimedSerializer(SECRET).dumps([4711, "of a link"])
    with nursery.forked(gunicorn("-w", "1", "app:create_app()"), environment(sqlite_url)) as server:
        address = server.wait_for(r"Listening at: (http://\S+)")[1]
        answer(address, f"/account/reset/{token}", Host="localhost")
        answer(address, "/login?page=1", Host="localhost")
        server.wait_for(r'"GET /account/reset/\.\.\. HTTP/1\.1" \d{3} ')
        server.wait_for(r'^127\.0\.0\.1 .*"GET /login\?page=1 HTTP/1\.1" 200 ')
        assert token not in server.output


@pytest.mark.promise
@pytest.mark.parametrize("enabled", ["yes", "no"])
def test_gunicorn_ends_with_a_sentence_if_its_database_has_the_demo_admin(
    database_url: str, enabled: str, nursery: Nursery
) -> None:
    add_demo_admin(database_url)
    code, output = nursery.run(
        gunicorn("-w", "1", "app:create_app()"), environment(database_url, WORKERS_ENABLED=enabled)
    )
    assert code == 3
    assert "The demo shop's admin@example.com is an admin of this database in production" in output
    assert "flask init-db --admin you@your.shop" in output
    assert "Traceback" not in output


@pytest.mark.promise
def test_gunicorn_refuses_what_only_the_application_itself_is_given(
    tmp_path: Path, sqlite_url: str, nursery: Nursery
) -> None:
    (tmp_path / "careless.py").write_text(
        "import app\ndef create_app(): return app.create_app({'WTF_CSRF_ENABLED': False})\n"
    )
    env = environment(sqlite_url)
    env["PYTHONPATH"] += f":{tmp_path}"
    code, output = nursery.run(gunicorn("-w", "1", "careless:create_app()"), env)
    assert code == 3
    assert output.count("WTF_CSRF_ENABLED or WTF_CSRF_CHECK_DEFAULT is false in production") == 1
    assert "Traceback" not in output


@pytest.mark.promise
def test_check_names_each_complaint_about_a_server_of_these_settings(sqlite_url: str, nursery: Nursery) -> None:
    add_demo_admin(sqlite_url)
    env = environment(sqlite_url, FLASK_APP="app", PUBLIC_URL="http://your.shop", METRICS_TOKEN="x")
    code, output = nursery.run(flask("workers", "check"), env)
    assert code == 1
    for each in (
        "PUBLIC_URL is http://your.shop/",
        "METRICS_TOKEN is short",
        "The demo shop's admin@example.com is an admin",
    ):
        assert f"Problem: {each}" in output
    assert "Warning: MAIL_URL is not set in production" in output
    code, output = nursery.run(flask("workers", "check"), {**env, "PRODUCTION": "false"})
    assert "in production" not in output


@pytest.mark.promise
def test_a_command_that_serves_nothing_neither_warns_nor_refuses(sqlite_url: str, nursery: Nursery) -> None:
    for more in ({"PRODUCTION": "true"}, {}):
        env = environment(sqlite_url, FLASK_APP="app", SECRET_KEY="dev", PUBLIC_URL="http://your.shop", **more)
        code, output = nursery.run(flask("workers", "list"), env)
        assert code == 0, output
        assert "production" not in output


@pytest.mark.promise
def test_flask_workers_run_refuses_grave_complaints_if_the_setting_says_so(sqlite_url: str, nursery: Nursery) -> None:
    env = environment(sqlite_url, FLASK_APP="app", PUBLIC_URL="http://your.shop", PRODUCTION="true")
    code, output = nursery.run(flask("workers", "run"), env)
    assert code == 1
    assert "Error: PUBLIC_URL is http://your.shop/ in production" in output


def add_demo_admin(url: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO users (email, name, fs_uniquifier, is_admin, created_at) "
                "VALUES ('admin@example.com', 'Admin', 'x', true, '2026-11-21 00:00:00.000000')"
            )
        )
    engine.dispose()


# ---- A file of settings


@pytest.mark.promise
@pytest.mark.parametrize(
    "command",
    [
        flask("run", "--port", "0"),
        gunicorn("-c", str(Path(production.__file__).with_name("gunicorn.conf.py")), "-w", "1"),
        [sys.executable, "-m", "waitress", "--listen=127.0.0.1:0", "--call", "app:create_app"],
    ],
    ids=["flask", "gunicorn", "waitress"],
)
def test_each_server_reads_the_same_file_of_settings_and_the_environment_wins(
    tmp_path: Path, sqlite_url: str, command: list[str]
) -> None:
    pytest.importorskip("dotenv", reason="needs python-dotenv, of requirements.txt")
    folder = tmp_path / "project" / "below"
    folder.mkdir(parents=True)
    (folder.parent / ".env").write_text(
        f"DATABASE_URL={sqlite_url}\nAPP_NAME='From the file'\nPRODUCTION=false\nLOG_FORMAT=json\n"
    )
    env = environment(None, FLASK_APP="app:create_app", FLASK_SKIP_DOTENV="false", LOG_FORMAT="text")
    with started(command, env, cwd=folder) as server:
        address = server.wait_for(r"(?:Running on|Listening at:|Serving on) (http://127\.0\.0\.1:\d+)")[1]
        with urllib.request.urlopen(f"{address}/login", timeout=30) as response:
            assert "From the file" in response.read().decode()
        server.wait_for(r"INFO .*joined")
        assert '{"time"' not in server.output


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


@pytest.mark.promise
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
