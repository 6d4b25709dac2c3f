"""The addresses of a request: mangled and foreign hosts, redirects, and the demo shop on a network."""

import http.client
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from support.bad_http import said
from support.databases import close, on_sqlite
from support.fork_server import Nursery
from support.processes import environment, flask, gunicorn
from support.shop import settings

from app import create_app
from tests.shop.test_commands import EMBEDDED
from tests.shop.test_mail import needs_a_network, own_address

MANGLED = [
    *("good@evil.example", "evil.example/x", "evil.example?x", "evil.example#x", "evil.example\\x", "[::1", "::1]"),
    *("a b", "", " ", "evil.example:", "evil.example:x", "localhost:99999", "a..b", "x" * 64, "a\x01b", "a\tb"),
    *("\xe4", "\u0660", "a,b", "<b>", "a%2eb", "http://evil.example"),
]
PATHS = [
    *("/", "/login", "/account", "/admin/users", "/workers", "/workers/", "/workers//messages", "/admin//users"),
    *("/static/style.css", "/static//style.css", "/health/live", "/health/ready", "/metrics", "/nowhere"),
]
REDIRECTS = {
    "/workers": "/workers/",
    "/workers?state=failed&at=//x": "/workers/?state=failed&at=//x",
    "/account//password": "/account/password",
    "/admin//users": "/admin/users",
    "/workers//messages": "/workers/messages",
    "/static//style.css": "/static/style.css",
    "/account//reset/x": "/account/reset/x",
}


@pytest.fixture
def of_gunicorn(sqlite_url: str, nursery: Nursery) -> Iterator[int]:
    """Give the port of a shop in production, at https://your.shop."""
    env = environment(sqlite_url, WORKERS_ENABLED="no", PUBLIC_URL="https://your.shop")
    with nursery.forked(gunicorn("-w", "1", "app:create_app()"), env) as server:
        yield int(server.wait_for(r"Listening at: http://127.0.0.1:(\d+)")[1])


# ---- Hosts


@on_sqlite
@pytest.mark.parametrize("host", MANGLED)
def test_a_mangled_host_is_a_bad_request_on_each_address(client: FlaskClient, host: str) -> None:
    for path in PATHS:
        response = client.get(path, environ_overrides={"HTTP_HOST": host})
        assert response.status_code == 400, path
        assert "Location" not in response.headers
        assert "Set-Cookie" not in response.headers
        assert "evil.example" not in response.text
        assert "Content-Security-Policy" in response.headers


@pytest.mark.promise
def test_a_server_answers_a_mangled_host_with_400(of_gunicorn: int) -> None:
    for host in ("good@evil.example", "evil.example/x", "[::1", "a b", "", "a\x01b", "a\x7fb"):
        for path in ("/", "/workers", "/admin//users", "/health/live", "/metrics"):
            asked = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
            answer = said(of_gunicorn, asked.encode())
            assert answer.startswith(b"HTTP/1.1 400 "), (host, path, answer)
            assert b"evil" not in answer


@pytest.mark.promise
def test_in_production_pages_answer_the_host_of_the_public_url_and_probes_answer_any(of_gunicorn: int) -> None:
    def status(path: str, host: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", of_gunicorn, timeout=30)
        connection.request("GET", path, headers={"Host": host})
        with connection.getresponse() as response:
            body = response.read()
        connection.close()
        assert host.encode() not in body or response.status == 200
        return response.status

    for host in ("your.shop", "YOUR.shop", "your.shop:8443"):
        assert status("/login", host) == 200, host
    for host in ("evil.example", "127.0.0.1", "localhost", "your.shop.evil.example", "evil.your.shop"):
        for path in ("/login", "/workers", "/static/style.css", "/nowhere"):
            assert status(path, host) == 400, (host, path)
        assert status("/health/live", host) == 200
        assert status("/metrics", host) == 200


@on_sqlite
@pytest.mark.parametrize(
    ("url", "host"),
    [("https://b\u00fccher.shop", "xn--bcher-kva.shop"), ("https://[::1]:8443/books/", "[::1]:8443")],
)
def test_the_public_url_may_have_any_kind_of_host(database_url: str, url: str, host: str) -> None:
    app = create_app(settings(database_url, PRODUCTION=True, PUBLIC_URL=url, SESSION_COOKIE_SECURE=False))
    client = app.test_client()
    assert client.get("/login", headers={"Host": host}).status_code == 200
    assert client.get("/login", headers={"Host": "localhost"}).status_code == 400
    close(app)


@on_sqlite
def test_flasks_own_list_of_hosts_replaces_the_public_url(database_url: str) -> None:
    more = {"PRODUCTION": True, "PUBLIC_URL": "https://your.shop", "TRUSTED_HOSTS": ["your.shop", "www.your.shop"]}
    app = create_app(settings(database_url, **more))
    client = app.test_client()
    assert client.get("/login", headers={"Host": "www.your.shop"}).status_code == 200
    assert client.get("/login", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/workers", headers={"Host": "evil.example"}).status_code == 400
    close(app)


@on_sqlite
def test_outside_production_any_sane_host_is_answered(client: FlaskClient) -> None:
    for host in ("192.0.2.7:5000", "laptop.local", "[2001:db8::7]:80"):
        assert client.get("/login", headers={"Host": host}).status_code == 200


# ---- Redirects


@on_sqlite
@pytest.mark.parametrize("path", REDIRECTS)
def test_a_redirect_of_the_url_map_does_not_name_the_host_that_the_request_named(database_url: str, path: str) -> None:
    app = create_app(settings(database_url, PROXIES=1))
    client = app.test_client()
    for headers in ({"Host": "evil.example"}, {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https"}):
        response = client.get(path, headers=headers)
        assert (response.status_code, response.headers["Location"]) == (308, REDIRECTS[path])
        assert "evil.example" not in response.text
    below = client.get(path, environ_overrides={"SCRIPT_NAME": "/shop"})
    assert below.headers["Location"] == f"/shop{REDIRECTS[path]}"
    close(app)


@pytest.mark.promise
def test_a_servers_redirects_are_relative(of_gunicorn: int) -> None:
    for path, target in {**REDIRECTS, "//workers": "/workers/", "//admin//users": "/admin/users"}.items():
        asked = f"GET {path} HTTP/1.1\r\nHost: your.shop\r\nConnection: close\r\n\r\n"
        answer = said(of_gunicorn, asked.encode()).decode()
        assert f"\r\nLocation: {target}\r\n" in answer
        assert "your.shop" not in answer


# ---- The demo shop


@pytest.mark.parametrize(
    ("more", "headers", "peer", "status"),
    [
        ({}, {}, "127.0.0.1", 200),
        ({}, {}, "127.8.9.1", 200),
        ({}, {}, "::1", 200),
        ({}, {}, "::ffff:127.0.0.1", 200),
        ({}, {}, "192.0.2.7", 403),
        ({}, {}, "10.0.0.1", 403),
        ({}, {}, "::ffff:192.0.2.7", 403),
        ({}, {}, "2001:db8::7", 403),
        ({}, {}, "", 403),
        ({}, {"X-Forwarded-For": "127.0.0.1"}, "127.0.0.1", 403),
        ({"PROXIES": 1}, {"X-Forwarded-For": "127.0.0.1"}, "192.0.2.7", 403),
        ({"DEMO_ON_NETWORK": True}, {}, "192.0.2.7", 200),
        ({"DEMO_ON_NETWORK": True, "PROXIES": 1}, {"X-Forwarded-For": "192.0.2.7"}, "127.0.0.1", 200),
    ],
)
def test_the_demo_answers_its_own_machine_unless_it_may_be_on_the_network(
    more: dict[str, Any], headers: dict[str, str], peer: str, status: int
) -> None:
    app = create_app(settings("sqlite://", **more))
    for path in ("/login", "/static/style.css", "/health/live"):
        response = app.test_client().get(path, headers=headers, environ_overrides={"REMOTE_ADDR": peer}, buffered=True)
        assert response.status_code == status
        assert ("DEMO_ON_NETWORK=true" in response.text) == (status == 403)
    close(app)


@on_sqlite
def test_a_shop_of_a_database_url_answers_other_machines(app: Flask) -> None:
    response = app.test_client().get("/login", environ_overrides={"REMOTE_ADDR": "192.0.2.7"})
    assert response.status_code == 200


@pytest.mark.promise
@needs_a_network
@pytest.mark.parametrize("kind", ["flask", "gunicorn"])
def test_a_demo_that_listens_on_all_addresses_refuses_the_machines_own_address_on_the_network(
    tmp_path: Path, kind: str, nursery: Nursery
) -> None:
    (tmp_path / "embedded.py").write_text(textwrap.dedent(EMBEDDED))
    command = {
        "flask": flask("run", "--host", "0.0.0.0", "--port", "0"),
        "gunicorn": gunicorn("-b", "0.0.0.0:0", "-w", "1", "embedded:create_app()"),
    }[kind]
    env = environment(None, FLASK_APP="embedded", INSTANCE=tmp_path / "instance", SECRET_KEY="")
    env["PYTHONPATH"] += f":{tmp_path}"
    with nursery.forked(command, env) as server:
        port = int(server.wait_for(r"(?:Running on http://127\.0\.0\.1|http://0\.0\.0\.0):(\d+)")[1])
        assert "in production" not in server.output
        for address, status in (("127.0.0.1", 200), (own_address(), 403)):
            connection = http.client.HTTPConnection(address, port, timeout=30)
            connection.request("GET", "/login")
            with connection.getresponse() as response:
                assert response.status == status
                assert (b"DEMO_ON_NETWORK" in response.read()) == (status == 403)
            connection.close()
