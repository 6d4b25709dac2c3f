"""A receiver of alerts and pings on a real socket, with faults on request."""

import base64
import hmac
import json
import ssl
import threading
import time
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

SECRET = "whsec_" + base64.b64encode(b"a key of the tests, 32 bytes ...").decode()
POLL_SECONDS = 0.02  # the longest wait of its end


class Got(NamedTuple):
    """One request. `is_signed` says whether its signature is right."""

    method: str
    path: str
    body: Any
    headers: dict[str, str]
    is_signed: bool
    at: float
    """The moment when it came, on the monotonic clock."""


class Receiver:
    """Keeps the requests in `got`. Each entry of `trouble` is the fault of one request: a code, "hang" or "drop"."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.got: list[Got] = []
        self.trouble: list[int | str] = []
        self.released = threading.Event()
        """Set this to end the requests that hang."""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def handle_one(self) -> None:
                receiver.handle(self)

            do_GET = do_POST = handle_one

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._scheme = "https" if tls else "http"
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(POLL_SECONDS,), name="receiver", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}"

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in request.headers.items()}
        value = json.loads(body) if body else None
        self.got.append(Got(request.command, request.path, value, headers, is_signed(headers, body), time.monotonic()))
        trouble = self.trouble.pop(0) if self.trouble else 200
        if trouble == "hang":
            self.released.wait()
        if trouble in ("hang", "drop"):
            request.close_connection = True
            return
        request.send_response(int(trouble))
        if 300 <= int(trouble) < 400:
            request.send_header("Location", f"{self.url}/elsewhere")
        request.send_header("Content-Length", "0")
        request.end_headers()

    def titles(self) -> list[str]:
        return [each.body["data"]["title"] for each in self.got]

    def paths(self) -> list[str]:
        return [each.path for each in self.got]

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


def is_signed(headers: dict[str, str], body: bytes) -> bool:
    """Check the signature as the documents of Standard Webhooks say."""
    signed = f"{headers.get('webhook-id')}.{headers.get('webhook-timestamp')}.".encode() + body
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    expected = "v1," + base64.b64encode(hmac.new(key, signed, sha256).digest()).decode()
    return hmac.compare_digest(expected, headers.get("webhook-signature", ""))
