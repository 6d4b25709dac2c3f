"""The mails about accounts, their hourly limit, and the mailer, which sends by SMTP or writes files."""

import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from datetime import datetime, timedelta
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from ssl import create_default_context
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

import svcs
from flask import current_app, render_template
from flask_security.confirmable import generate_confirmation_token
from flask_security.recoverable import generate_reset_password_token
from limits import RateLimitItemPerHour
from limits.strategies import FixedWindowRateLimiter

from background import Bury, WorkerContext
from config import APP_NAME
from models import User, UserRepository
from throttle import RateLimits

# The functions import these modules, because a process that only serves sends no mail.
if TYPE_CHECKING:
    from email.message import EmailMessage
    from smtplib import SMTP


Payload = Mapping[str, Any]


class Mail(NamedTuple):
    """A mail's reader, subject and text, and the link in the text that the reader waits for."""

    to: str
    subject: str
    text: str
    link: str | None = None


def welcome(user_id: int, _payload: Payload, context: WorkerContext) -> Mail | None:
    user = _user(user_id, context)
    return user and Mail(
        user.email, f"Welcome to the {current_app.config['APP_NAME']}", render_template("welcome_mail.txt")
    )


def confirm(user_id: int, payload: Payload, context: WorkerContext) -> Mail | None:
    """Return the mail for a registration: the confirmation link, or the news that the e-mail has an account."""
    user = _user(user_id, context)
    if user is None:
        return None
    if user.confirmed_at is not None:
        return registered_again(user_id, payload, context)
    link = _link("security.confirm_email", generate_confirmation_token(user), payload)
    return Mail(user.email, "Please confirm your e-mail address", render_template("confirm_mail.txt", link=link), link)


def registered_again(user_id: int, _payload: Payload, context: WorkerContext) -> Mail | None:
    user = _user(user_id, context)
    return user and Mail(user.email, "You have an account already", render_template("again_mail.txt"))


def no_account(email: str, _payload: Payload, _context: WorkerContext) -> Mail:
    """Return the mail to a reader without an account, after a visitor asked for a link."""
    return Mail(email, "You have no account", render_template("no_account_mail.txt"))


def password_link(user_id: int, payload: Payload, context: WorkerContext) -> Mail | None:
    return _password_mail("password_mail.txt", user_id, payload, context)


def admin_link(user_id: int, payload: Payload, context: WorkerContext) -> Mail | None:
    """Return the mail to a new admin, whose password was discarded."""
    return _password_mail("admin_mail.txt", user_id, payload, context)


def password_changed(user_id: int, _payload: Payload, context: WorkerContext) -> Mail | None:
    user = _user(user_id, context)
    return user and Mail(user.email, "Your password has been changed", render_template("changed_mail.txt"))


def _password_mail(template: str, user_id: int, payload: Payload, context: WorkerContext) -> Mail | None:
    user = _user(user_id, context)
    if user is None:
        return None
    link = _link("security.reset_password", generate_reset_password_token(user), payload)
    return Mail(user.email, "Choose a new password", render_template(template, link=link), link)


def _user(user_id: int, context: WorkerContext) -> User | None:
    """Return the user. None if the account is gone."""
    user = context.services.get(UserRepository).get(user_id)
    return None if user is None or user.is_deleted else user


def _link(endpoint: str, token: str, payload: Payload) -> str:
    """Return the link in a mail. The worker makes it when it sends the mail, so no message holds the token.

    Raises MailNotSent if neither the settings nor the payload have a root.
    """
    address = current_app.config["PUBLIC_URL"] or payload["root"]
    if address is None:
        raise MailNotSent(
            "PUBLIC_URL was not set in production when this mail was asked for, so its link has no address; expected "
            "https:// and the host of this application. Set PUBLIC_URL for the web and the workers."
        )
    root = urlsplit(address)
    site = current_app.url_map.bind(root.netloc, root.path, url_scheme=root.scheme)
    return site.build(endpoint, {"token": token}, force_external=True)


# A payload has one of these fields, with the id of the user that the mail is about. "no account" has the e-mail.
MAILS: dict[str, Callable[[Any, Payload, WorkerContext], Mail | None]] = {
    "welcome": welcome,
    "confirm": confirm,
    "registered again": registered_again,
    "no account": no_account,
    "password link": password_link,
    "admin link": admin_link,
    "password changed": password_changed,
}

# Mails that are sent once, however often a request enqueues them. `handle` sets the key, not the request. Otherwise a
# request could find the key taken and commit nothing. Its response time would show that the e-mail has an account.
SENT_ONCE = {"registered again"}

# Kinds of mails that wait when they exceed the hourly limit. Other mails are dropped: the reader has one already.
CAN_WAIT: set[str] = set()


class HourlyLimit:
    """The hourly limit of mails of one kind to one reader, which all processes share. RATELIMIT_ENABLED turns it off.

    Each kind has its own count. A stranger who asks for many mails of one kind does not block another kind.
    """

    most = 10

    def __init__(self, kind: str, to: str) -> None:
        reader = sha256(to.strip().lower().encode()).hexdigest()[:32]  # the table of the counts has no address
        self._mails = RateLimitItemPerHour(self.most), "mail", kind, reader
        self._limiter = FixedWindowRateLimiter(RateLimits())
        self._is_off = not current_app.config["RATELIMIT_ENABLED"]

    def count(self) -> bool:
        """Count a mail. Return False, and count nothing, if the limit is reached."""
        return self._is_off or (self._limiter.test(*self._mails) and self._limiter.hit(*self._mails))

    def give_back(self) -> None:
        """Subtract a mail that was not sent from the count."""
        if not self._is_off:
            self._limiter.hit(*self._mails, cost=-1)

    @property
    def remaining(self) -> timedelta:
        """The time until the hour is over."""
        return timedelta(seconds=max(0.0, self._limiter.get_window_stats(*self._mails).reset_time - time.time()))


class MailNotSent(Exception):
    """The mail server did not take a mail, or did not confirm it. The text names no reader."""


class MailRefused(MailNotSent):
    """A mail that cannot be sent: its address is invalid, or the server refused it for good."""


class Mailer:
    """Hands mails to the server of MAIL_URL. Without one, mails become files in the outbox."""

    timeout = 30.0  # seconds for each reply: some servers scan a mail first

    def __init__(self, url: str | None, sender: str, outbox: Path, name: str = APP_NAME) -> None:
        self.url = urlsplit(url or "")
        self.sender, self.outbox, self.name = sender, outbox, name

    def send(self, to: str, subject: str, text: str, key: str, at: datetime) -> str:
        """Send a mail, and return its place. Raises MailRefused if another attempt would fail too, else MailNotSent.

        Calls with the same `key` and `at` (a message has both) use the same Message-ID.
        """
        name = f"{key.replace(':', '.')}.{at:%Y%m%d%H%M%S}"  # with the time, because a new database counts from 1 again
        mail = self._compose(to, subject, text, name, at)
        return self._deliver(mail) if self.has_server else self._keep(mail, self.outbox / f"{name}.eml")

    @property
    def has_server(self) -> bool:
        return bool(self.url.hostname)

    def _compose(self, to: str, subject: str, text: str, name: str, at: datetime) -> "EmailMessage":
        from email.headerregistry import Address
        from email.message import EmailMessage
        from email.policy import SMTPUTF8

        from email_validator import EmailNotValidError, validate_email

        mail = EmailMessage(SMTPUTF8)
        try:
            address = validate_email(to, check_deliverability=False)  # as the form of the registration does
        except EmailNotValidError as error:
            raise MailRefused(f"The reader's e-mail is invalid: {_without_addresses(error)}") from None
        mail["From"] = Address(self.name, addr_spec=self.sender)
        mail["To"] = Address(username=address.local_part, domain=address.ascii_domain)
        mail["Subject"] = subject
        mail["Date"] = at
        mail["Message-ID"] = f"<{name}@{self._domain}>"
        mail["Auto-Submitted"] = "auto-generated"
        mail.set_content(text, cte="quoted-printable")
        return mail

    def _keep(self, mail: "EmailMessage", path: Path) -> str:
        """Write the file whole or not at all. Concurrency: another process may keep the same mail."""
        self.outbox.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.outbox, prefix=".", delete=False) as draft:
            draft.write(bytes(mail))
        os.replace(draft.name, path)
        return str(path)

    def _deliver(self, mail: "EmailMessage") -> str:
        from smtplib import SMTPAuthenticationError

        server = f"{self.url.hostname}:{self._port}"
        try:
            with closing(self._connect()) as smtp:
                self._begin(smtp)
                if refusal := _refusal(smtp, mail):
                    raise MailRefused(f"{server} refused the mail for good: {refusal}")
                with suppress(OSError):  # the server has the mail, so do not send it again for a missing goodbye
                    smtp.quit()
        except SMTPAuthenticationError as error:  # without the server's text, which may repeat the password
            raise MailNotSent(f"{server} refuses the user and password of MAIL_URL ({error.smtp_code}).") from None
        except OSError as error:  # the base of every error of smtplib
            text = _without_addresses(error)
            raise MailNotSent(f"{server} did not take the mail: {type(error).__name__}: {text}") from None
        return server

    def _connect(self) -> "SMTP":
        from smtplib import SMTP, SMTP_SSL

        host, name = self.url.hostname or "", self._domain  # without a name, smtplib looks one up
        if self.url.scheme == "smtps":
            return SMTP_SSL(host, self._port, name, timeout=self.timeout, context=create_default_context())
        return SMTP(host, self._port, name, timeout=self.timeout)

    def _begin(self, smtp: "SMTP") -> None:
        """Encrypt if the URL requires it or the server offers it, then log in. A local server needs no encryption."""
        is_local = ip_address(smtp.sock.getpeername()[0]).is_loopback  # type: ignore[union-attr]
        is_encrypted = self.url.scheme == "smtps"
        smtp.ehlo_or_helo_if_needed()
        if self.url.scheme == "smtp+starttls" or (not (is_encrypted or is_local) and smtp.has_extn("starttls")):
            smtp.starttls(context=create_default_context())
            is_encrypted = True
        if self.url.username and self.url.password:
            if not (is_encrypted or is_local):
                raise MailNotSent(
                    f"{self.url.hostname} offers no STARTTLS, so the password of MAIL_URL is not sent to it; expected "
                    f"an encrypted connection: use smtps://, or smtp:// without a user and password."
                )
            smtp.login(unquote(self.url.username), unquote(self.url.password))

    @property
    def _domain(self) -> str:
        return self.sender.rpartition("@")[2]

    @property
    def _port(self) -> int:
        return self.url.port or {"smtp": 25, "smtp+starttls": 587, "smtps": 465}[self.url.scheme]


def send_alert(to: str, subject: str, text: str, key: str, at: datetime) -> str:
    """Send a mail of the engine to an operator, and return its place. Raises MailNotSent, and Bury if it is refused."""
    try:
        return svcs.flask.get(Mailer).send(to, subject, text, key, at)
    except MailRefused as error:
        raise Bury(error) from None


def _refusal(smtp: "SMTP", mail: "EmailMessage") -> str | None:
    """Send the mail. Return the server's reply if it refuses the reader or the text for good, else None.

    Raises the errors of smtplib for all other failures. The operator can correct a refused sender or login.
    """
    from smtplib import SMTPDataError, SMTPNotSupportedError, SMTPRecipientsRefused

    try:
        smtp.send_message(mail)
    except SMTPNotSupportedError:
        return "it does not offer SMTPUTF8, which the reader's e-mail needs."
    except (SMTPRecipientsRefused, SMTPDataError) as error:
        reply: tuple[int, Any] = (
            next(iter(error.recipients.values()))
            if isinstance(error, SMTPRecipientsRefused)
            else (error.smtp_code, error.smtp_error)
        )
        code, text = reply
        if code < _LASTING or code == _LOG_IN_FIRST:
            raise
        return f"{code} {_without_addresses(text.decode(errors='replace'))}"
    return None


_LASTING = 500  # from this code on, another attempt gets the same reply
_LOG_IN_FIRST = 530
_ADDRESS = re.compile(r'[^\s<>()\[\],;:"]+@[^\s<>()\[\],;:"]+')


def _without_addresses(text: object) -> str:
    """Return the text in one line, without its e-mail addresses. A server may repeat the reader's address."""
    return _ADDRESS.sub("(e-mail)", " ".join(str(text).split()))
