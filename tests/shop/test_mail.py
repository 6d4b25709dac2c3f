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
from sqlalchemy import select, update
from support.databases import on_sqlite
from support.fleet import at_once, in_threads, wait_until
from support.mail_server import MailServer

from background import BackgroundWorkerManager, current_workers
from background.database.clock import LONGEST_BACKOFF, SPREAD
from background.database.tables import message_errors, messages
from background.runs.failures import traceback_of
from mail import MAILS, HourlyLimit, Mailer, MailNotSent, MailRefused
from models import RateLimit, User, db
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
    to = "ñat@example.com"
    with pytest.raises(MailRefused, match="refused the mail for good: it does not offer SMTPUTF8") as refused:
        send(server.url(), to=to)
    assert "ñat@" not in traceback_of(refused.value)
    modern = make_server(enable_SMTPUTF8=True)
    send(modern.url(), to=to)
    assert modern.recipients == [["ñat@example.com"]]


@pytest.mark.parametrize("to", ["nat@example.com\nBcc: all@example.com", "nat@example.com, all@example.com", ""])
def test_no_mail_is_sent_to_an_invalid_address(server: MailServer, to: str) -> None:
    with pytest.raises(MailRefused, match=r"The reader's e-mail is invalid: .*(email|@-sign)"):
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


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("550 5.1.1 <nat@example.com>: No such user", "550 5.1.1 <(e-mail)>: No such user"),
        ("553 Nat@EXAMPLE.com=unknown", "553 (e-mail)"),
        ("text 554 5.7.1 Spam, nat@example.com wants none", "554 5.7.1 Spam, (e-mail) wants none"),
    ],
)
def test_a_refusal_for_good_is_an_error_with_the_servers_text_and_without_the_email(
    server: MailServer, answer: str, said: str
) -> None:
    server.trouble = [answer]
    with pytest.raises(MailRefused) as refused:
        send(server.url())
    assert str(refused.value) == f"127.0.0.1:{server.port} refused the mail for good: {said}"
    assert "nat@" not in traceback_of(refused.value).lower()
    assert server.mails == []


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("451 4.7.1 <nat@example.com>: Later", "SMTPRecipientsRefused: .*4.7.1 <.e-mail.>: Later"),
        ("text 452 4.3.1 Full", "SMTPDataError: .*452, .*4.3.1 Full"),
        ("sender 550 5.7.1 shop@example.com may not send", "SMTPSenderRefused: .*550, .*may not send"),
        ("530 5.7.0 Log in first", "SMTPRecipientsRefused: .*530, .*Log in first"),
    ],
)
def test_a_refusal_that_may_pass_or_that_an_operator_can_mend_is_not_for_good(
    server: MailServer, answer: str, said: str
) -> None:
    server.trouble = [answer]
    with pytest.raises(MailNotSent, match=f"did not take the mail: {said}") as failed:
        send(server.url())
    assert not isinstance(failed.value, MailRefused)
    assert "@example.com" not in traceback_of(failed.value)
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

    def enqueue(row_id: int, kind: str = "welcome", topic: str = "mail") -> int:
        manager.start()
        with app.app_context():
            message_id = current_workers.enqueue(topic, {kind: row_id})
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


def logged(caplog: pytest.LogCaptureFixture) -> str:
    """Return the lines of the engine and its workers. The mail server of the tests has lines of its own."""
    records = [record for record in caplog.records if record.name.startswith("background.")]
    return "\n".join(map(caplog.handler.format, records))


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
            payload = {kind: user.email if kind == "no account" else user.id, "root": "http://localhost/"}
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
    server.trouble = ["451 4.7.1 Later", "text 451 4.3.0 Later", "drop in data", "drop after data", "hang"]
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
@pytest.mark.parametrize(
    ("email", "trouble", "error"),
    [
        ("nat@example.com", "550 5.1.1 <nat@example.com>: No such user", "refused the mail for good: 550 5.1.1"),
        ("nat@example.com", "text 554 5.6.0 Unwanted", "refused the mail for good: 554 5.6.0 Unwanted"),
        ("ñat@example.com", "", "refused the mail for good: it does not offer SMTPUTF8"),
        ("nat@localhost", "", "The reader's e-mail is invalid: "),
    ],
)
def test_a_mail_that_is_refused_for_good_is_buried_at_once_in_one_line(
    app: Flask,
    server: MailServer,
    make_user: Callable[..., User],
    mail_about: Callable[..., int],
    caplog: pytest.LogCaptureFixture,
    email: str,
    trouble: str,
    error: str,
) -> None:
    mail_through(app, server.url())
    server.trouble = [trouble]
    message_id = mail_about(make_user(email=email).id)
    wait_until(lambda: states(app) == ["dead"])
    [reason] = errors(app)
    assert error in reason
    wait_until(lambda: f"Buried the message mail:{message_id}: {reason}" in caplog.messages)
    assert "Traceback" not in logged(caplog) + reason
    assert email not in logged(caplog) + reason


def test_a_mail_that_is_tried_again_names_no_email_in_the_log_and_the_errors(
    app: Flask,
    server: MailServer,
    make_user: Callable[..., User],
    mail_about: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(MailWorker, "backoff", timedelta())
    monkeypatch.setattr(MailWorker, "max_attempts", 2)
    mail_through(app, server.url())
    server.trouble = ["451 <nat@example.com> is busy", "sender 550 no mail for nat@example.com"]
    message_id = mail_about(make_user(email="nat@example.com").id)
    wait_until(lambda: f"Buried the message mail:{message_id}, attempt 2 failed" in caplog.messages)
    assert "is busy" in errors(app)[0]
    assert "no mail for" in errors(app)[1]
    assert "nat@" not in "\n".join([logged(caplog), *errors(app)])


# ---- The limit of an hour


def test_mails_of_one_kind_above_the_limit_of_an_hour_are_dropped_and_other_mails_are_sent(
    app: Flask,
    server: MailServer,
    make_user: Callable[..., User],
    mail_about: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(HourlyLimit, "most", 2)
    mail_through(app, server.url())
    reader, other = make_user(email="nat@example.com"), make_user(email="pat@example.com")
    for _ in range(4):
        mail_about(reader.id)
    mail_about(other.id)
    mail_about(reader.id, "registered again")
    wait_until(lambda: set(states(app)) == {"done"})
    assert sorted(map(str, server.recipients)) == ["['nat@example.com']"] * 3 + ["['pat@example.com']"]
    dropped = f"The mail about welcome {reader.id} is dropped: its reader got 2 of these mails within an hour."
    assert caplog.messages.count(dropped) == 2
    assert "@example.com" not in logged(caplog)
    end_the_hour(app)
    mail_about(reader.id)
    wait_until(lambda: len(server.mails) == 5)


def end_the_hour(app: Flask) -> None:
    """End the hours of all counts."""
    with app.app_context():
        db.session.execute(update(RateLimit).values(expires_at=AT))
        db.session.commit()


def test_processes_that_send_at_once_share_the_limit_of_an_hour(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HourlyLimit, "most", 5)

    def count(number: int) -> bool:
        with app.app_context():
            return HourlyLimit("welcome", ["nat@example.com", " Nat@Example.com"][number % 2]).count()

    assert sum(at_once(16, count)) == 5


@on_sqlite
def test_mails_that_the_server_did_not_take_do_not_count(
    app: Flask,
    server: MailServer,
    make_user: Callable[..., User],
    mail_about: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(HourlyLimit, "most", 1)
    monkeypatch.setattr(MailWorker, "backoff", timedelta())
    mail_through(app, server.url())
    server.trouble = ["451 4.7.1 Later"] * 3
    mail_about(make_user().id)
    wait_until(lambda: states(app) == ["done"])
    assert len(server.mails) == 1


@on_sqlite
def test_without_limits_every_mail_is_sent(
    app: Flask,
    server: MailServer,
    make_user: Callable[..., User],
    mail_about: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(HourlyLimit, "most", 1)
    monkeypatch.setitem(app.config, "RATELIMIT_ENABLED", False)
    mail_through(app, server.url())
    user = make_user()
    for _ in range(3):
        mail_about(user.id)
    wait_until(lambda: len(server.mails) == 3)
    with app.app_context():
        assert db.session.scalar(select(RateLimit.key)) is None


# ---- The link in the log


@on_sqlite
@pytest.mark.parametrize(("has_server", "is_production"), [(False, False), (True, False), (False, True)])
def test_the_log_has_the_link_of_a_mail_without_a_server_and_outside_production(
    app: Flask,
    server: MailServer,
    make_user: Callable[..., User],
    manager: BackgroundWorkerManager,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    has_server: bool,
    is_production: bool,
) -> None:
    caplog.set_level(logging.DEBUG)
    url = server.url() if has_server else None
    svcs.flask.register_factory(app, Mailer, lambda: Mailer(url, "shop@example.com", tmp_path))
    user = make_user()
    manager.start()
    wait_until(lambda: manager.presence.instance is not None)  # in production, the start refuses a test's settings
    monkeypatch.setitem(app.config, "PRODUCTION", is_production)
    with app.app_context():
        current_workers.enqueue("mail", {"password link": user.id, "root": "http://localhost/"})
        db.session.commit()
    wait_until(lambda: states(app) == ["done"])
    [line] = [line for line in caplog.messages if line.startswith(f"The mail about password link {user.id} is at ")]
    if has_server or is_production:
        assert "/account/reset/" not in logged(caplog)
        return
    [file] = tmp_path.glob("*.eml")
    link = line.rpartition("Its link: ")[2]
    assert link.startswith("http://localhost/account/reset/")
    assert link in text_of(message_from_bytes(file.read_bytes(), policy=default))


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
    doubling = (MailWorker.backoff * 2**attempt for attempt in range(MailWorker.max_attempts - 1))
    shortest = sum((min(pause, LONGEST_BACKOFF) * (1 - SPREAD) for pause in doubling), timedelta())
    assert shortest > timedelta(days=1)
