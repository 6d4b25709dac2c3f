"""Requests to other services: a webhook, signed by the scheme of Standard Webhooks, and the pings of a worker.

Requests follow no redirect, because it may lead to another host. Errors do not name the address, which is a secret.
"""

import base64
import hmac
import json
import time
from collections.abc import Mapping
from hashlib import sha256
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from ..errors import BackgroundError, first_line
from ..settings import SECRET_PREFIX

SECONDS = 10.0  # for each step of a request


class AlertNotSent(BackgroundError):
    """The other side did not take the alert. The text names no address."""


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def send(url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> None:
    """POST the body, or GET the address without one. Raises AlertNotSent unless the answer is 2xx."""
    agent = {"User-Agent": "once-per-tick"}
    request = Request(url, body, {**agent, **(headers or {})})  # noqa: S310 - `settings` allows http and https only
    try:
        with build_opener(_NoRedirect).open(request, timeout=SECONDS):
            pass
    except HTTPError as error:
        error.close()
        raise AlertNotSent(f"The service answered {error.code}; expected 200 to 299.") from None
    except (OSError, HTTPException, ValueError) as error:
        raise AlertNotSent(f"The service did not answer: {first_line(error)}") from None


def post(url: str, secret: str, alert: Mapping[str, Any]) -> None:
    """POST the alert as JSON, signed with `secret`. Raises AlertNotSent."""
    body = json.dumps(_body(alert)).encode()
    stamp = str(int(time.time()))
    headers = {
        "Content-Type": "application/json",
        "webhook-id": alert["id"],
        "webhook-timestamp": stamp,
        "webhook-signature": f"v1,{sign(secret, alert['id'], stamp, body)}",
    }
    send(url, body, headers)


def _body(alert: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body: `text` is for chats, such as Slack and Mattermost, and `data` for programs."""
    data = {name: value for name, value in alert.items() if name not in ("id", "type")}
    line = f"[{alert['application']}] {alert['title']}. {alert['detail']}"
    when = alert["ended_at"] or alert["opened_at"]
    return {
        "type": alert["type"],
        "timestamp": when,
        "text": " ".join(filter(None, (line, alert["url"]))),
        "data": data,
    }


def sign(secret: str, id: str, stamp: str, body: bytes) -> str:
    """Return the signature of a webhook, in base64."""
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    return base64.b64encode(hmac.digest(key, f"{id}.{stamp}.".encode() + body, sha256)).decode()
