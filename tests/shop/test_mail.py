"""Mails reach a real server once it accepts them, under one Message-ID, and secrets stay secret."""

import logging
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import svcs
import trustme
from flask import Flask
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select
from support.databases import on_sqlite
from support.fleet import in_threads, wait_until
from support.mail_server import MailServer

from background import BackgroundWorkerManager, current_workers
from background.database.tables import message_errors, messages
from background.runs.batch import _LONGEST_PAUSE_SECONDS
from mail import MAILS, Mailer, MailNotSent
from models import User, db
from workers import MailWorker

AT = datetime(2026, 11, 21, 3, 30, tzinfo=UTC)
PASSWORD = "s3:cr/t@%"
LOGIN = "shop:s3%3Acr%2Ft%40%25@"


@pytest.fixture
def make_server() -> Iterator[Callable[..., MailServer]]:
    servers: list[MailServer] = []

    def make(host: str = "127.0.0.1", tls_at_once: ssl.SSLContext | None = None, **options: Any) -> MailServer:
        servers.append(MailServer(host, **options))
        return servers[-1].start(tls_at_once)

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def server(make_server: Callable[..., MailServer]) -> MailServer:
    return make_server()


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def certified(authority: trustme.CA) -> ssl.SSLContext:
    """Return the TLS context of a server, with a certificate of the authority."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1", "::1", own_address()).configure_cert(context)
    return context


@pytest.fixture
def trusted(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Have this machine trust the authority."""
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))


def own_address() -> str:
    """Return an address of this machine that is not a loopback address. Sends nothing to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


needs_a_network = pytest.mark.skipif(own_address() == "127.0.0.1", reason="this machine has no address but loopback")


def send(url: str | None, outbox: Path = Path("/nowhere"), timeout: float = 5, **more: Any) -> str:
    mailer = Mailer(url, "shop@example.com", outbox)
    mailer.timeout = timeout
    mail = {"to": "nat@example.com", "subject": "Your order 3", "text": "Hello.\n", "key": "mail:7", "at": AT}
    return mailer.send(**mail | more)


def text_of(mail: EmailMessage) -> str:
    return str(mail.get_content()).replace("\r\n", "\n")


# ---- What is sent


def test_a_mail_arrives_with_its_headers(server: MailServer) -> None:
    assert send(server.url()) == f"127.0.0.1:{server.port}"
    [mail] = server.mails
    assert server.recipients == [["nat@example.com"]]
    assert {name: str(value) for name, value in mail.items() if not name.startswith(("Content", "MIME", "X-"))} == {
        "From": "Bookstore <shop@example.com>",
        "To": "nat@example.com",
        "Subject": "Your order 3",
        "Date": "Sat, 21 Nov 2026 03:30:00 +0000",
        "Message-ID": "<mail.7.20261121033000@example.com>",
        "Auto-Submitted": "auto-generated",
    }
    assert (mail.get_content_type(), text_of(mail)) == ("text/plain", "Hello.\n")


def test_any_text_arrives_unchanged_in_lines_that_every_server_accepts(server: MailServer) -> None:
    text = "Ñandú 🙂\n.\n..\nBcc: everyone@example.com\n" + "long " * 500 + "\n"
    send(server.url(), text=text)
    assert text_of(server.mails[0]) == text
    assert server.recipients == [["nat@example.com"]]
    assert server.raw[0].isascii()
    assert max(map(len, server.raw[0].split(b"\r\n"))) <= 78


@settings(max_examples=25)
@given(user=st.from_regex(r"[a-z0-9!#$%&'*+/=?^_`{|}~-]{1,64}", fullmatch=True), labels=st.integers(1, 3))
def test_a_long_address_is_still_one_address(user: str, labels: int) -> None:
    to = f"{user}@{'.'.join(['d' * 60] * labels)}.com"
    mail = Mailer(None, "shop@example.com", Path())._compose(to, "Your order 3", "Hello.", "mail.7", AT)
    [address] = message_from_bytes(bytes(mail), policy=default)["To"].addresses
    assert address.addr_spec == to


def test_an_international_address_is_encoded_for_the_server(
    server: MailServer, make_server: Callable[..., MailServer]
) -> None:
    send(server.url(), to="nat@bücher.de")
    assert server.recipients == [["nat@xn--bcher-kva.de"]]
    with pytest.raises(MailNotSent, match="SMTPUTF8"):
        send(server.url(), to="ñat@example.com")
    modern = make_server(enable_SMTPUTF8=True)
    send(modern.url(), to="ñat@example.com")
    assert modern.recipients == [["ñat@example.com"]]


@pytest.mark.parametrize("to", ["nat@example.com\nBcc: all@example.com", "nat@example.com, all@example.com", ""])
def test_no_mail_is_sent_to_an_invalid_address(server: MailServer, to: str) -> None:
    with pytest.raises(ValueError, match=r"email|@-sign"):
        send(server.url(), to=to)
    assert server.mails == []


def test_the_same_message_has_the_same_id_and_another_message_another_id(server: MailServer) -> None:
    for key, at in [("mail:7", AT), ("mail:7", AT), ("mail:8", AT), ("mail:7", AT + timedelta(seconds=1))]:
        send(server.url(), key=key, at=at)
    first, again, *others = [mail["Message-ID"] for mail in server.mails]
    assert first == again
    assert len({first, *others}) == 3


# ---- The servers that may see the password


def test_the_user_and_password_of_the_url_log_in(make_server: Callable[..., MailServer]) -> None:
    server = make_server(password=PASSWORD, auth_required=False)
    send(server.url(login=LOGIN))
    assert server.passwords == [PASSWORD]
    assert len(server.mails) == 1


def test_a_wrong_password_is_one_sentence_without_the_password(make_server: Callable[..., MailServer]) -> None:
    server = make_server(password="another")
    with pytest.raises(MailNotSent) as raised:
        send(server.url(login=LOGIN))
    assert str(raised.value) == f"127.0.0.1:{server.port} refuses the user and password of MAIL_URL (535)."
    assert raised.value.__suppress_context__
    assert server.mails == []


def test_a_server_that_asks_for_no_password_gets_no_password(make_server: Callable[..., MailServer]) -> None:
    server = make_server(password=PASSWORD, auth_require_tls=True)
    with pytest.raises(MailNotSent, match="AUTH extension not supported") as raised:
        send(server.url(login=LOGIN))
    assert "s3" not in str(raised.value)
    assert (server.passwords, server.mails) == ([], [])


@needs_a_network
def test_a_password_does_not_leave_the_machine_unencrypted(make_server: Callable[..., MailServer]) -> None:
    server = make_server(own_address(), password=PASSWORD)
    with pytest.raises(MailNotSent, match=r"offers no STARTTLS, so the password of MAIL_URL is not sent") as raised:
        send(server.url(login=LOGIN))
    assert "s3" not in str(raised.value)
    assert (server.passwords, server.mails) == ([], [])
    send(server.url())  # without a password, an old relay still works
    assert server.was_encrypted == [False]


# ---- Encryption


@pytest.mark.parametrize("scheme", ["smtp+starttls", "smtps"])
def test_a_certificate_without_a_known_authority_is_refused(
    make_server: Callable[..., MailServer], certified: ssl.SSLContext, scheme: str
) -> None:
    at_once = {"tls_at_once": certified} if scheme == "smtps" else {"tls": certified}
    server = make_server(password=PASSWORD, **at_once)
    with pytest.raises(MailNotSent, match="CERTIFICATE_VERIFY_FAILED"):
        send(server.url(scheme, LOGIN))
    assert (server.passwords, server.mails) == ([], [])


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("scheme", ["smtp+starttls", "smtps"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_encrypted_connection_carries_password_and_mail(
    make_server: Callable[..., MailServer], certified: ssl.SSLContext, scheme: str, host: str
) -> None:
    at_once = {"tls_at_once": certified} if scheme == "smtps" else {"tls": certified}
    server = make_server(host, password=PASSWORD, **at_once)
    send(server.url(scheme, LOGIN))
    assert server.passwords == [PASSWORD]
    assert server.was_encrypted == [True]


def test_smtp_with_starttls_sends_nothing_to_a_server_without_it(server: MailServer) -> None:
    with pytest.raises(MailNotSent, match="STARTTLS extension not supported"):
        send(server.url("smtp+starttls"))
    assert server.mails == []


@needs_a_network
@pytest.mark.usefixtures("trusted")
def test_plain_smtp_is_encrypted_if_another_machine_offers_it(
    make_server: Callable[..., MailServer], certified: ssl.SSLContext
) -> None:
    elsewhere, here = make_server(own_address(), tls=certified), make_server(tls=certified)
    for server in (elsewhere, here):
        send(server.url())
    assert (elsewhere.was_encrypted, here.was_encrypted) == ([True], [False])


# ---- Servers that fail


@pytest.mark.parametrize("answer", ["550 5.1.1 No such user", "451 4.7.1 Later"])
def test_a_refused_recipient_is_an_error_with_the_servers_text(server: MailServer, answer: str) -> None:
    server.trouble = [answer]
    with pytest.raises(MailNotSent, match=f"did not take the mail: SMTPRecipientsRefused: .*{answer[4:]}"):
        send(server.url())
    assert server.mails == []


def test_an_unreachable_server_is_an_error(server: MailServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(MailNotSent, match=f"127.0.0.1:{port} did not take the mail: ConnectionRefusedError"):
        send(f"smtp://127.0.0.1:{port}")


def test_a_silent_server_is_an_error_after_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(MailNotSent, match="timed out"):
        send(f"smtp://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2)


@pytest.mark.parametrize("trouble", ["drop in data", "drop after data", "hang"])
def test_a_mail_without_a_reply_at_its_end_counts_as_not_sent(server: MailServer, trouble: str) -> None:
    server.trouble = [trouble]
    with pytest.raises(MailNotSent, match="did not take the mail: "):
        send(server.url(), timeout=0.5)


def test_an_accepted_mail_is_not_sent_again_for_a_missing_goodbye(server: MailServer) -> None:
    server.trouble = ["", "drop at quit"]
    send(server.url())
    assert (len(server.mails), server.trouble) == (1, [])


# ---- The outbox


def test_without_a_server_a_mail_is_a_file_in_the_outbox(tmp_path: Path) -> None:
    outbox = tmp_path / "instance" / "outbox"
    path = send(None, outbox)
    assert os.listdir(outbox) == ["mail.7.20261121033000.eml"]
    assert Path(path) == outbox / "mail.7.20261121033000.eml"
    mail = message_from_bytes(Path(path).read_bytes(), policy=default)
    assert (mail["To"], mail["Message-ID"]) == ("nat@example.com", "<mail.7.20261121033000@example.com>")


def test_a_mail_that_several_processes_keep_at_once_is_one_complete_file(tmp_path: Path) -> None:
    text = "Hello. " * 20_000
    in_threads(*[partial(send, None, tmp_path, text=text)] * 8)
    [name] = os.listdir(tmp_path)
    assert text_of(message_from_bytes((tmp_path / name).read_bytes(), policy=default)) == text + "\n"


# ---- The worker


@pytest.fixture
def mail_about(app: Flask, manager: BackgroundWorkerManager) -> Callable[..., int]:
    """Enqueue the mail about a user, or of another kind, and have it sent by the workers."""

    def enqueue(row_id: int, kind: str = "welcome") -> int:
        manager.start()
        with app.app_context():
            message_id = current_workers.enqueue("mail", {kind: row_id})
            db.session.commit()
        assert message_id is not None
        return message_id

    return enqueue


def mail_through(app: Flask, url: str | None, timeout: Callable[[], float] = lambda: 5) -> None:
    def mailer() -> Mailer:
        mailer = Mailer(url, "shop@example.com", Path("/nowhere"))
        mailer.timeout = timeout()
        return mailer

    svcs.flask.register_factory(app, Mailer, mailer)


def states(app: Flask) -> list[str]:
    with app.app_context():
        return list(db.session.scalars(select(messages.c.state)))


def errors(app: Flask) -> list[str]:
    with app.app_context():
        return list(db.session.scalars(select(message_errors.c.error).order_by(message_errors.c.id)))


@on_sqlite
def test_no_mail_quotes_a_user(
    app: Flask, server: MailServer, make_user: Callable[..., User], manager: BackgroundWorkerManager
) -> None:
    mail_through(app, server.url())
    user = make_user(name="You have won! https://evil.example/")
    kinds = set(MAILS) - {"order"}  # another test has the mails of the shop
    with app.app_context():
        for kind in kinds:
            payload = {kind: user.id, "root": "http://localhost/"}
            current_workers.enqueue("mail", payload)
        db.session.commit()
    manager.start()
    wait_until(lambda: len(server.mails) == len(kinds))
    for mail in server.mails:
        assert text_of(mail).startswith("Hello,\n")
        assert "won" not in f"{mail}{text_of(mail)}", mail["Subject"]


def test_a_mail_is_tried_until_the_server_accepts_it_under_one_id(
    app: Flask,
    server: MailServer,
    make_user: Callable[..., User],
    mail_about: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MailWorker, "backoff", timedelta(milliseconds=5))
    mail_through(app, server.url(), lambda: 0.5 if server.trouble == ["hang"] else 5)
    server.trouble = ["451 4.7.1 Later", "550 5.1.1 No such user", "drop in data", "drop after data", "hang"]
    mail_about(make_user().id)
    wait_until(lambda: states(app) == ["done"])
    assert len({mail["Message-ID"] for mail in server.mails}) == 1
    assert len(set(server.raw)) == 1
    assert len(server.mails) == 3  # the two mails without a reply at their end, and the last mail
    assert {error.splitlines()[-1].split(":")[0] for error in errors(app)} == {"mail.MailNotSent"}
    assert len(errors(app)) >= 5  # more if a busy machine needs the half second to reach the end that hangs


@on_sqlite
def test_a_dead_letter_does_not_contain_the_password(
    app: Flask,
    make_server: Callable[..., MailServer],
    make_user: Callable[..., User],
    mail_about: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = make_server(password="another", command_call_limit=3)
    monkeypatch.setattr(MailWorker, "backoff", timedelta())
    monkeypatch.setattr(MailWorker, "max_attempts", 3)
    mail_through(app, server.url(login=LOGIN))
    caplog.set_level(logging.DEBUG)
    mail_about(make_user().id)
    wait_until(lambda: states(app) == ["dead"])
    assert server.passwords[0] == PASSWORD
    everything = "\n".join([caplog.text, *errors(app)])
    assert "refuses the user and password of MAIL_URL" in everything
    for secret in ("s3", "AHNob3"):  # plain, percent-encoded, and as the protocol sends it
        assert secret not in everything


@on_sqlite
def test_a_mail_about_a_deleted_user_is_not_sent(
    app: Flask, server: MailServer, mail_about: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    mail_through(app, server.url())
    caplog.set_level(logging.WARNING)
    mail_about(77)
    wait_until(lambda: states(app) == ["done"])
    assert "Welcome 77 no longer exists: no mail is sent." in caplog.text
    assert server.mails == []


@pytest.mark.promise
def test_an_outage_of_a_day_is_survived() -> None:
    doubling = (MailWorker.backoff.total_seconds() * 2.0**attempt for attempt in range(MailWorker.max_attempts - 1))
    shortest = sum(0.75 * min(pause, _LONGEST_PAUSE_SECONDS) for pause in doubling)
    assert timedelta(seconds=shortest) > timedelta(days=1)
