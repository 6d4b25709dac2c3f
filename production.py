"""Production: the rule for being in production, and the complaints about settings that are not safe there.

A server with a DATABASE_URL is in production, unless it is `flask run`. Under gunicorn, gunicorn.conf.py decides this
at the start. Under any other WSGI server the first request decides it. The setting PRODUCTION overrules both.

A grave complaint refuses the start. Any other complaint is a warning, once.
"""

import logging
import re
import threading
from collections.abc import Callable, Iterable
from math import log2
from typing import TYPE_CHECKING, Any, NamedTuple

from flask import Flask, Response, current_app
from sqlalchemy import Connection, select
from sqlalchemy.exc import SQLAlchemyError

from background import BackgroundWorkerManager
from background.errors import InvalidConfig
from background.process.serving import is_test_client
from config import settle_cookies
from demo import ADMIN
from models import User

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

RANDOM_TEXT = '`python3 -c "import secrets; print(secrets.token_hex())"`'
GRAVE, WARNING = True, False
LEAST_TOKEN = 16  # characters
LEAST_BITS = 128  # of SECRET_KEY


class Complaint(NamedTuple):
    """A condition that must not hold in production. `is_due` gets the settings, or a connection to the database."""

    is_grave: bool
    is_due: Callable[[Any], object]
    sentence: str
    """The text, in which `{NAME}` is the value of a setting."""
    is_about_data: bool = False


def is_weak(key: str | bytes, name: str) -> bool:
    """Return whether a visitor could guess the key of the application `name`.

    Such a key has less than 128 bits by its length and variety, or contains a word of a placeholder.
    """
    text = key.decode("latin-1") if isinstance(key, bytes) else key
    if _KNOWN.search(text) or name.lower() in text.lower() or _pairs(text) < min(len(text), 32) * 0.6:
        return True
    return len(text) * _bits_per_character(text) < LEAST_BITS


# Words of the placeholders that tutorials and templates use, and two keys of Flask's documentation.
_KNOWN = re.compile(r"password|change|replace|default|example|192b9bdd22ab|_5#y2l", re.I)


def _pairs(text: str) -> int:
    """Count the different pairs of neighbours. A repeated word has few."""
    return len({text[at : at + 2] for at in range(len(text) - 1)})


def _bits_per_character(text: str) -> float:
    if not text.isascii():
        return 8
    if re.fullmatch(r"[0-9a-f]+|[0-9A-F]+", text):
        return 4
    classes = [re.search(each, text) for each in ("[a-z]", "[A-Z]", "[0-9]")]
    return 6 if sum(map(bool, classes)) > 1 else log2(len(set(text)))  # letters of one kind may be words


def _has_demo_admin(connection: Connection) -> bool:
    return connection.scalar(select(User.id).where(User.email == ADMIN, User.is_admin)) is not None


COMPLAINTS = [
    Complaint(
        GRAVE,
        lambda config: config["DEBUG"],
        "The debugger is on in production, where it lets visitors run code; expected it off. Remove FLASK_DEBUG, "
        "--debug and DEBUG.",
    ),
    Complaint(
        GRAVE,
        lambda config: config["TESTING"],
        "TESTING is {TESTING} in production, where it passes errors on to the server; expected false. Remove it.",
    ),
    Complaint(
        GRAVE,
        lambda config: config["SECRET_KEY_IS_MADE"],
        "SECRET_KEY is not set in production, where it signs the sessions; expected a random text that all processes "
        f"share. Make one with {RANDOM_TEXT} and set SECRET_KEY to it.",
    ),
    Complaint(
        GRAVE,
        lambda config: is_weak(config["SECRET_KEY"], config["APP_NAME"]),
        "SECRET_KEY is short or well known in production, where it signs the sessions; expected a random text of "
        f"{LEAST_BITS} bits. Make one with {RANDOM_TEXT} and set SECRET_KEY to it.",
    ),
    Complaint(
        GRAVE,
        lambda config: (config["PUBLIC_URL"] or "").startswith("http://"),
        "PUBLIC_URL is {PUBLIC_URL} in production, so the links in mails have no encryption; expected https://. Set up "
        "HTTPS and write https://, or set PRODUCTION=false for a trial.",
    ),
    Complaint(
        GRAVE,
        lambda config: not (config.get("WTF_CSRF_ENABLED", True) and config.get("WTF_CSRF_CHECK_DEFAULT", True)),
        "WTF_CSRF_ENABLED or WTF_CSRF_CHECK_DEFAULT is false in production, so any other site can send this one's "
        "forms; expected both true. Remove them.",
    ),
    Complaint(
        GRAVE,
        lambda config: not config.get("RATELIMIT_ENABLED", True),
        "RATELIMIT_ENABLED is false in production, so one visitor may try any number of passwords; expected true. "
        "Remove it.",
    ),
    Complaint(
        GRAVE,
        lambda config: config["METRICS_TOKEN"] is not None and len(config["METRICS_TOKEN"]) < LEAST_TOKEN,
        f"METRICS_TOKEN is short in production, where it guards /metrics; expected at least {LEAST_TOKEN} characters. "
        f"Make one with {RANDOM_TEXT}.",
    ),
    Complaint(
        GRAVE,
        lambda config: (
            not config["SESSION_COOKIE_HTTPONLY"] or config["SESSION_COOKIE_SAMESITE"] not in ("Lax", "Strict")
        ),
        "SESSION_COOKIE_HTTPONLY is {SESSION_COOKIE_HTTPONLY} and SESSION_COOKIE_SAMESITE {SESSION_COOKIE_SAMESITE} in "
        "production; expected true, and Lax or Strict, so that other sites cannot use the session. Remove them.",
    ),
    Complaint(
        GRAVE,
        _has_demo_admin,
        f"The demo shop's {ADMIN} is an admin of this database in production; expected an admin of yours. Make one "
        "with `flask init-db --admin you@your.shop`, which removes that admin's rights.",
        is_about_data=True,
    ),
    Complaint(
        WARNING,
        lambda config: config["SESSION_COOKIE_SECURE"] is False,
        "SESSION_COOKIE_SECURE is false in production, so sessions may travel without encryption; expected true. "
        "Remove it once there is HTTPS.",
    ),
    # Not grave: no mail has a link to a visitor's Host header. Mails with links wait until PUBLIC_URL is set.
    Complaint(
        WARNING,
        lambda config: config["PUBLIC_URL"] is None,
        "PUBLIC_URL is not set in production, so pages answer any host, and no mail with a link is sent; expected "
        "https:// and the host of this application. Set PUBLIC_URL to it.",
    ),
    Complaint(
        WARNING,
        lambda config: config["METRICS_TOKEN"] is None,
        "METRICS_TOKEN is not set in production, so /metrics answers programs on this machine only; expected a random "
        f"text. Make one with {RANDOM_TEXT}, and give it to Prometheus.",
    ),
    # Not grave: this exposes nothing. Mails wait in files, so readers cannot confirm their registration.
    Complaint(
        WARNING,
        lambda config: config["MAIL_URL"] is None,
        "MAIL_URL is not set in production, so no reader gets a mail, and the mails are files in instance/outbox; "
        "expected a mail server. Set MAIL_URL.",
    ),
    Complaint(
        WARNING,
        lambda config: config["PROXIES"] == 0,
        "PROXIES is 0 in production; expected a proxy in front that buffers requests: without one, as many slow "
        "clients as the server has threads stop the shop, and all visitors of a proxy count as one network. Put a "
        "proxy in front and set PROXIES=1, and run long work in `flask workers run`.",
    ),
]


def insist(app: Flask, workers: BackgroundWorkerManager) -> None:
    """Make each server settle PRODUCTION when it begins, and refuse to start with a grave complaint."""
    app.extensions["production"] = beginning = Beginning(app)
    workers.before_start(refuse_settings)
    workers.also_check(look)
    app.register_error_handler(InvalidConfig, refused)
    if app.config["PRODUCTION"] is not False:
        app.wsgi_app = beginning.before(app.wsgi_app)  # type: ignore[method-assign]


class Beginning:
    """The moment at which a process begins to serve the application."""

    def __init__(self, app: Flask) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._is_over = False

    def begin(self, warns: bool = False) -> None:
        """Settle PRODUCTION in a process that serves, once. With `warns`, log the other complaints.

        Raises InvalidConfig for the grave complaints about the settings, at each call.

        Concurrency: several first requests may call this in different threads. The later ones wait for the first.
        """
        with self._lock:
            if self._is_over:
                return
            config = self._app.config
            if config["PRODUCTION"] is None:
                config["PRODUCTION"] = True
                settle_cookies(config)
            _refuse_settings(config)
            self._is_over = True
            for sentence in complaints_about(config, is_grave=False) if warns else []:
                log.warning("%s", sentence)

    def before(self, inner: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        """Return a WSGI application that begins with its first request, unless a test sends it."""

        def wsgi_app(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
            if not (self._is_over or self._app.testing or is_test_client()):
                try:
                    self.begin(warns=True)
                except InvalidConfig as error:
                    return refused(error)(environ, start_response)
            return inner(environ, start_response)

        return wsgi_app


def check(app: Flask) -> list[str]:
    """Settle PRODUCTION for an application that a server will make. Return the complaints that are not grave.

    Raises InvalidConfig for the grave ones.
    """
    Beginning(app).begin()
    return complaints_about(app.config, is_grave=False) if app.config["PRODUCTION"] else []


def refuse_settings() -> None:
    """Raise InvalidConfig with a line for each grave complaint about the settings. Needs an application context."""
    _refuse_settings(current_app.config)


def _refuse_settings(config: dict[str, Any]) -> None:
    _refuse(complaints_about(config, is_grave=True) if config["PRODUCTION"] else [])


def refuse_data() -> None:
    """Raise InvalidConfig with a line for each complaint about the database. Needs an application context."""
    _refuse(complaints_about_data() if current_app.config["PRODUCTION"] else [])


def _refuse(sentences: list[str]) -> None:
    if sentences:
        raise InvalidConfig("\n".join(sentences))


def complaints_about(config: dict[str, Any], is_grave: bool) -> list[str]:
    """Return the sentence of each complaint about these settings in production."""
    return [
        each.sentence.format_map(config)
        for each in COMPLAINTS
        if each.is_grave is is_grave and not each.is_about_data and each.is_due(config)
    ]


def complaints_about_data() -> list[str]:
    """Return the sentence of each complaint about the database in production. Needs an application context."""
    with current_app.extensions["sqlalchemy"].engine.connect() as connection:
        return [each.sentence for each in COMPLAINTS if each.is_about_data and each.is_due(connection)]


def look() -> tuple[list[str], list[str]]:
    """Return the grave complaints and the warnings that a server with these settings would find."""
    config = current_app.config
    is_for_servers = not (config["DATABASE_IS_EMBEDDED"] or config["TESTING"])
    if not (is_for_servers if config["PRODUCTION"] is None else config["PRODUCTION"]):
        return [], []
    grave = complaints_about(config, is_grave=True)
    try:
        grave += complaints_about_data()
    except SQLAlchemyError:
        log.debug("The database was not looked at", exc_info=True)  # `flask workers check` reports the database's error
    return grave, complaints_about(config, is_grave=False)


_logged: set[str] = set()


def refused(error: InvalidConfig) -> Response:
    """Answer 503 for an application that did not start, as its server can only start it with a request."""
    if error.message not in _logged:
        _logged.add(error.message)
        log.error("%s", error.message)
    return Response("This application refuses its settings. Its log has the reasons.\n", 503, mimetype="text/plain")
