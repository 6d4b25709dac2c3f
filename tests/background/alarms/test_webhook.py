"""A webhook on a real socket: signed, tried again, and never redirected."""

import json
import socket
import ssl
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
from support.alert_receiver import SECRET, Receiver
from support.fleet import Fleet, wait_until

from background.alarms import delivery, webhook
from background.alarms.alert import trial
from background.alarms.webhook import AlertNotSent, post, sign


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "SECONDS", 0.5)
    monkeypatch.setattr(delivery.AlertWebhookWorker, "backoff", timedelta(seconds=0.05))


def enqueue(fleet: Fleet, url: str, **config: Any) -> dict[str, Any]:
    """Enqueue an alert, and start the instance that sends it. Return the alert."""
    manager = fleet.manager(ALERT_WEBHOOK=url, ALERT_WEBHOOK_SECRET=SECRET, **config)
    alert = trial(manager.app)
    with manager.app.app_context():
        delivery.enqueue(manager, alert)
        manager.db.session.commit()
    manager.start()
    return alert


def test_the_signature_is_that_of_standard_webhooks() -> None:
    """Check the example of its specification."""
    body = b'{"event_type":"ping","data":{"success":true}}'
    signature = sign("whsec_plJ3nmyCDGBKInavdOK15jsl", "msg_loFOjxBNrRLzqYUf", "1731705121", body)
    assert signature == "rAvfW3dJ/X/qxhsaXPOyyCGmRKsaKWcsNccKXlIktD0="


@pytest.mark.parametrize("trouble", [500, 404, 429, 302, 307, "hang", "drop"])
def test_an_alert_that_is_not_taken_is_sent_again_with_the_same_id(
    fleet: Fleet, receiver: Receiver, trouble: int | str
) -> None:
    receiver.trouble = [trouble, trouble]
    alert = enqueue(fleet, f"{receiver.url}/alerts?key=1")
    wait_until(lambda: len(receiver.got) == 3)
    wait_until(lambda: [row.state for row in fleet.messages()] == ["done"])
    assert receiver.paths() == ["/alerts?key=1"] * 3
    assert {each.headers["webhook-id"] for each in receiver.got} == {alert["id"]}
    assert all(each.is_signed and each.method == "POST" for each in receiver.got)
    body = receiver.got[0].body
    assert set(body) == {"type", "timestamp", "text", "data"}
    assert body["type"] == "test"
    assert body["data"]["title"] in body["text"]


def test_an_alert_that_no_service_takes_is_buried_and_its_error_names_no_address(fleet: Fleet) -> None:
    with socket.socket() as unused:  # bound, and not listening
        unused.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{unused.getsockname()[1]}"
        delivery.AlertWebhookWorker.max_attempts, before = 2, delivery.AlertWebhookWorker.max_attempts
        try:
            enqueue(fleet, f"http://{host}/secret-path")
            wait_until(lambda: fleet.messages()[0].state == "dead")
        finally:
            delivery.AlertWebhookWorker.max_attempts = before
    errors = [row.error for row in fleet.errors() if row.message == 1]  # an alert about this one may die, too
    assert len(errors) == 2
    assert all("The service did not answer: <urlopen error [Errno 111] Connection refused>" in each for each in errors)
    assert not [each for each in errors if "secret-path" in each or host in each]


def test_a_signed_alert_cannot_be_changed(receiver: Receiver) -> None:
    alert: dict[str, Any] = {"id": "1", "type": "test", "application": "a", "title": "t", "detail": "d", "url": None}
    post(receiver.url, SECRET, alert | {"opened_at": "2026-11-30T12:00:00Z", "ended_at": None})
    [got] = receiver.got
    assert got.is_signed
    forged = json.dumps(got.body | {"type": "incident.opened"}).encode()
    stamp = got.headers["webhook-timestamp"]
    assert got.headers["webhook-signature"] != f"v1,{sign(SECRET, '1', stamp, forged)}"


def test_a_redirect_is_not_followed(receiver: Receiver) -> None:
    receiver.trouble = [302]
    with pytest.raises(AlertNotSent, match=r"The service answered 302; expected 200 to 299\."):
        webhook.send(f"{receiver.url}/ping")
    assert receiver.paths() == ["/ping"]


def test_a_certificate_that_no_authority_signed_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    authority, context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    receiver = Receiver(context)
    try:
        with pytest.raises(AlertNotSent, match="CERTIFICATE_VERIFY_FAILED"):
            webhook.send(receiver.url)
        authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
        webhook.send(receiver.url)
    finally:
        receiver.close()
    assert receiver.paths() == ["/"]
