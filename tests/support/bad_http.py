"""Malformed bytes for a socket, and the server's replies."""

import re
import socket
from collections.abc import Iterator
from contextlib import suppress

from hypothesis import strategies as st

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
FORM = b"Host: localhost\r\nConnection: close\r\nContent-Type: application/x-www-form-urlencoded\r\n"
PATHS = [
    *("//evil.example", "//evil.example/..", "/..%2f..", "/../../etc/passwd", "/.", "/./", "/%2e%2e", "/%00", "/%"),
    *("/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static/..%5capp.py", "/static//app.py"),
    *("/static/%00", "/static/icon.svg/", "/static/" + "a/" * 500, "/static/" + "a" * 300, "/static/.", "/static/"),
    *("/workers/%2e%2e", "/workers/../admin/users", "/workers//", "/WORKERS/", "/workers/static/../dashboard.py"),
    *("/%c0%ae%c0%ae/", "/%ff%fe", "/%ed%a0%80", "/\u00e9", "/ /", "/\t", "*", "http://evil.example/", "?"),
    *("/books/%31", "/books/1%0d%0aX-Injected:%201", "/login?next=//evil.example", "/books?q=" + "%F0" * 1_000),
    *("/?%00=%00", "/books?" + "a&" * 2_000, "/api/books?q=%00", "/" + "x" * 3_000, "/" + "x" * 9_000),
    "/books/" + "9" * 4_000,
]
METHODS = [*b"HEAD POST PUT DELETE PATCH OPTIONS TRACE CONNECT PRI get NONSENSE G\xc3\x89T".split(), b"", b"A" * 500]
BODIES = [
    *(b"Content-Length: %s\r\n\r\nemail=a" % length for length in b"0 7 8 70 -1 +7 1e3 0x7 7,7 7;7 9999999999".split()),
    b"Content-Length: 7\r\nContent-Length: 8\r\n\r\nemail=a",
    b"Content-Length: 7\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"Content-Length: %d\r\n\r\nemail=" % 600_000 + b"a" * 599_994,
    *(
        b"Transfer-Encoding: chunked\r\n\r\n" + chunks
        for chunks in (
            b"7\r\nemail=a\r\n0\r\n\r\n",
            b"7\r\nemail=a",
            b"70\r\nemail=a\r\n0\r\n\r\n",
            b"7\r\nemail=abc\r\n0\r\n\r\n",
            b"nonsense\r\n\r\n",
            b"-7\r\nemail=a\r\n",
            b"7;" + b"x" * 20_000 + b"\r\nemail=a\r\n0\r\n\r\n",
            b"FFFFFFFFFFFFFFFFF\r\nemail=a\r\n",
            b"7\nemail=a\n0\n\n",
            b"0\r\nX: y\r\nnonsense\r\n\r\n",
            b"92800\r\n" + b"a" * 600_064 + b"\r\n0\r\n\r\n",
            b"",
        )
    ),
    b"Transfer-Encoding: gzip\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    b"Expect: 100-continue\r\nContent-Length: 7\r\n\r\nemail=a",
    b"Expect: nonsense\r\nContent-Length: 7\r\n\r\nemail=a",
    b"Content-Encoding: gzip\r\nContent-Length: 7\r\n\r\nemail=a",
    b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 7\r\n\r\n--b\r\n\r\n",
    b"Content-Length: 40000\r\n\r\n" + b"a=1&" * 10_000,
]
HEADERS = [
    b"Host: " + b"x" * 7_000,
    b"Host: evil.example",
    b"Host: a\r\nHost: b",
    b"Host: [::1",
    b"Host: \xff\xfe",
    b"Host: a b",
    b"Host:",
    b"Host: localhost:99999999",
    b"X: " + b"x" * 100_000,
    b"\r\n".join(b"X-%d: y" % number for number in range(500)),
    b"Cookie: session=" + b"x" * 4_000,
    b"Cookie: session=.eJw\r\nCookie: remember_token=1|x",
    b"Cookie: =;=;;;\x00",
    b"X\x00: y",
    b"X : y",
    b" folded: y",
    b"X: a\r\n folded",
    b": y",
    b"no colon",
    b"X_Y: z",
    b"X: a\rb",
    b"Range: bytes=0-,-1,5-2,99999999999999999999-",
    b'If-Modified-Since: nonsense\r\nIf-None-Match: "',
    b"Accept-Language: " + b"a," * 3_000,
    b"Authorization: Basic %%%",
    b"Authorization: Bearer \xff",
    b"X-Forwarded-For: <b>, ::1\r\nX-Forwarded-Proto: javascript\r\nX-Forwarded-Host: evil.example",
    b"Upgrade: websocket\r\nConnection: Upgrade",
    b"Transfer-Encoding: chunked",
]
LINES = [
    *(b"", b"\r\n", b"\0" * 100, b"\xff" * 100, b"GET", b"GET /", b"GET / HTTP/1.1", b"GET / HTTP/1.1\r\nHost"),
    *(b"GET / HTTP/%s\r\nHost: a\r\n\r\n" % version for version in b"0.9 1.0 1.2 2.0 3 x 1.1.1 11111111111.1".split()),
    b"GET /\r\n\r\n",
    b"GET / HTTP/1.1 HTTP/1.1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the beginning of TLS
    b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\n" + GET,
    GET.replace(b"close", b"keep-alive") * 5 + GET,
    GET.replace(b"\r\n", b"\n"),
    GET.replace(b"\r\n", b"\r"),
    b"GET " + b"/" * 100_000,
]
NONSENSE = [
    *(b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % path.encode() for path in PATHS),
    *(b"%s / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % way for way in METHODS),
    *(b"POST /login HTTP/1.1\r\n" + FORM + rest for rest in BODIES),
    *(b"GET / HTTP/1.1\r\nConnection: close\r\n" + lines + b"\r\n\r\n" for lines in HEADERS),
    *LINES,
]


def said(port: int, data: bytes) -> bytes:
    """Return the server's reply to these bytes, and check that nothing follows it."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        with suppress(OSError):  # the server may have replied and closed
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        return b"".join(received(connection))


def received(connection: socket.socket) -> Iterator[bytes]:
    with suppress(ConnectionError):
        while data := connection.recv(65_536):
            yield data


def assert_unbroken(answer: bytes, sent: bytes) -> None:
    """Check that the server did not fail, show a file of the program, or repeat the request as a header."""
    assert not re.match(rb"HTTP/1.[01] 50[0234]", answer), (sent[:300], answer)
    assert b"X-Injected" not in answer.partition(b"\r\n\r\n")[0]
    assert b"import " not in answer


@st.composite
def mangled(draw) -> bytes:
    """Return a request with some bytes changed, missing or repeated."""
    data = bytearray(draw(st.sampled_from([GET, *(line for line in NONSENSE if len(line) < 500)])))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(start + draw(st.integers(0, 6)), len(data))
        twice = st.just(bytes(data[start:end] * 2))
        data[start:end] = draw(st.binary(max_size=6) | twice | st.sampled_from([b"\r\n", b"\0"]))
    return bytes(data)
