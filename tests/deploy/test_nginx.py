"""nginx with the files of deploy/nginx, before a gunicorn that runs with PROXIES=1."""

import getpass
import http.client
import json
import re
import shutil
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme
from support.processes import ROOT, environment, gunicorn, run, started

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin")
FOLDER = ROOT / "deploy" / "nginx"
HOST = "shop.example.org"

pytestmark = pytest.mark.skipif(NGINX is None, reason="needs nginx, of Debian's package nginx-light")

MINIMAL = """
daemon off;
user {user};
pid {folder}/pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""

ECHO = """
import sys
from flask import Flask, request
sys.path.insert(0, {root!r})
from hosts import trust_proxies

app = Flask("echo")
app.config.update(PROXIES=1)
trust_proxies(app)

@app.route("/", methods=["GET", "POST"])
def echo():
    request.get_data()
    return {{"address": request.remote_addr, "scheme": request.scheme, "host": request.host}}
"""


class Site(NamedTuple):
    """The ports of nginx and gunicorn, and the context of a client that trusts the certificate."""

    http: int
    https: int
    gunicorn: int
    trust: ssl.SSLContext

    def visit(self, path: str = "/", host: str = HOST, **headers: str) -> "Answer":
        with (
            socket.create_connection(("127.0.0.1", self.https)) as plain,
            self.trust.wrap_socket(plain, server_hostname=HOST) as secure,
        ):
            return ask(secure, path, host, **headers)


class Answer(NamedTuple):
    status: int
    location: str | None
    text: str


def ask(sock: socket.socket, path: str, host: str, **headers: str) -> Answer:
    lines = [f"GET {path} HTTP/1.1", f"Host: {host}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    sock.sendall("\r\n".join([*lines, "", ""]).encode())
    with http.client.HTTPResponse(sock) as response:
        response.begin()
        return Answer(response.status, response.headers["Location"], response.read().decode())


def configured(folder: Path, name: str, *changes: tuple[str, str]) -> list[str]:
    """Write a minimal configuration that includes the site `name` with changes. Return the command of nginx."""
    shutil.copyfile(FOLDER / "proxy.conf", folder / "proxy.conf")
    site = (FOLDER / name).read_text(encoding="utf-8").replace("/etc/nginx/proxy.conf", f"{folder}/proxy.conf")
    site = re.sub(r"/etc/letsencrypt/live/[\w.]+/", f"{folder}/", site)
    for old, new in changes:
        assert site.count(old) == 1, old
        site = site.replace(old, new)
    (folder / "site.conf").write_text(site)
    (folder / "nginx.conf").write_text(MINIMAL.format(folder=folder, user=getpass.getuser()))
    return [str(NGINX), "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]


def certified(folder: Path) -> ssl.SSLContext:
    authority = trustme.CA()
    certificate = authority.issue_cert(HOST)
    certificate.private_key_pem.write_to_path(folder / "privkey.pem")
    for part in certificate.cert_chain_pems:
        part.write_to_path(folder / "fullchain.pem", append=True)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def test_nginx_accepts_the_configuration_of_the_composition(tmp_path: Path) -> None:
    [port] = free_ports(1)
    code, said = run([*configured(tmp_path, "compose.conf", ("listen 80", f"listen {port}")), "-t"], environment())
    assert code == 0, said
    assert "[warn]" not in said


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Give a site whose gunicorn has a single thread."""
    (tmp_path / "echo.py").write_text(ECHO.format(root=str(ROOT)))
    port, tls = free_ports(2)
    with started(gunicorn("--workers", "1", "-c", "/dev/null", "echo:app"), environment(), cwd=tmp_path) as server:
        behind = server.wait_for(r"Listening at: http://127\.0\.0\.1:(\d+)")[1]
        ports = (":8000", f":{behind}"), ("listen 80 ", f"listen {port} "), ("listen 443 ", f"listen {tls} ")
        command = configured(tmp_path, "bookstore.conf", *ports)
        trust = certified(tmp_path)
        with started([*command, "-g", "error_log stderr notice;"], environment()) as nginx:
            nginx.wait_for("start worker process ")
            yield Site(port, tls, int(behind), trust)


def free_ports(number: int) -> list[int]:
    with contextmanager(_bound)(number) as sockets:
        return [each.getsockname()[1] for each in sockets]


def _bound(number: int) -> Iterator[list[socket.socket]]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    yield sockets
    for each in sockets:
        each.close()


def test_the_shop_behind_nginx_sees_the_visitor_and_not_the_headers_that_a_visitor_made_up(site: Site) -> None:
    made_up = {"X_Forwarded_For": "6.6.6.6", "X_Forwarded_Proto": "gopher", "X_Forwarded_Host": "evil.example"}
    expected = {"address": "127.0.0.1", "scheme": "https", "host": HOST}
    assert json.loads(site.visit().text) == json.loads(site.visit(**made_up).text) == expected
    assert json.loads(site.visit(host=f"{HOST}:8443").text) == {**expected, "host": f"{HOST}:8443"}


def test_nginx_sends_visitors_to_https_and_answers_for_no_other_host(site: Site) -> None:
    with socket.create_connection(("127.0.0.1", site.http)) as plain:
        assert ask(plain, "/cart?a=1", "evil.example")[:2] == (301, f"https://{HOST}/cart?a=1")
    with pytest.raises(http.client.RemoteDisconnected):
        site.visit(host="evil.example")


def test_a_visitor_who_sends_slowly_does_not_hold_gunicorns_thread(site: Site) -> None:
    half = f"POST / HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 10\r\n\r\nhalf".encode()
    with (
        socket.create_connection(("127.0.0.1", site.https)) as plain,
        site.trust.wrap_socket(plain, server_hostname=HOST) as slow,
    ):
        slow.sendall(half)
        assert site.visit().status == 200
        slow.sendall(b" done.")
        assert slow.recv(100).startswith(b"HTTP/1.1 200")
    with socket.create_connection(("127.0.0.1", site.gunicorn)) as slow:  # without nginx it holds the thread
        slow.sendall(half)
        with socket.create_connection(("127.0.0.1", site.gunicorn), timeout=0.5) as other, pytest.raises(TimeoutError):
            ask(other, "/", HOST)
