"""The settings of the application: the default, the cast and the meaning of each.

Later sources win: the default, the environment, then the argument of `create_app` (a mapping or an object).
Without an argument, `instance/config.py` comes last, and a file `.env` adds to the environment.
"""

import logging
import os
import re
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import click
from flask import Flask
from flask.cli import AppGroup, load_dotenv, run_command
from flask.helpers import get_load_dotenv
from flask.json.provider import DefaultJSONProvider
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from background import RunFields
from background.database.dialects import postgresql
from background.errors import InvalidConfig, spelled_out
from background.host import strict_json
from background.settings import (
    BOOLEAN,
    DAYS,
    PREFIXES,
    SETTINGS,
    Kind,
    Setting,
    cast,
    cast_all,
    printable,
    refuse_misspelled,
    settle,
    whole,
)

APP_NAME = "Bookstore"
"""The name of the application. It stands here alone."""

_PREFIXES = (*PREFIXES, "PASSIVE_", "PUBLIC_", "DEMO_")
TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def none_or_whole(most: int) -> Kind:
    def cast(value: Any) -> int:
        return 0 if value in (0, "0") and not isinstance(value, bool) else whole(most)[0](value)

    return cast, f"a whole number from 0 to {most}"


def level(value: Any) -> str:
    name = logging.getLevelName(value) if isinstance(value, int) else str(value).strip().upper()
    if name not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        raise ValueError(value)
    return name


def secret(value: Any) -> Any:
    if not isinstance(value, str | bytes) or not value.strip():
        raise ValueError(value)
    return _encodable(value)


def database_url(value: Any) -> URL:
    try:
        return make_url(_encodable(value))
    except ArgumentError as error:
        raise ValueError(value) from error


def _encodable(value: Any) -> Any:
    """Return the value. Raise ValueError if it came from bytes that are not text, as a variable may."""
    if isinstance(value, str):
        value.encode()
    return value


def log_format(value: Any) -> str:
    if (name := str(value).strip().lower()) not in ("text", "json"):
        raise ValueError(value)
    return name


def public_url(value: Any) -> str:
    parts = urlsplit(value if isinstance(value, str) and value.isprintable() and " " not in value else "")
    is_host = parts.hostname and not (parts.query or parts.fragment or parts.username or "\\" in parts.netloc)
    if parts.scheme not in ("http", "https") or not is_host or parts.port == 0:
        raise ValueError(value)
    (parts.hostname or "").encode("idna")  # refuses an empty part of a host, or one longer than 63 letters
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}/"


def mail_url(value: Any) -> str:
    """Return the URL of a mail server.

    smtp:// uses STARTTLS where the server offers it, smtp+starttls:// always, and smtps:// begins with TLS.
    """
    if not isinstance(value, str) or not value.isprintable() or " " in value:
        raise ValueError(value)
    parts = urlsplit(value)
    is_host = parts.hostname and parts.path in ("", "/") and not (parts.query or parts.fragment)
    login = [unquote(part) for part in (parts.username, parts.password) if part]
    is_login = "@" not in parts.netloc or (len(login) == 2 and all(part.isascii() for part in login))
    if parts.scheme not in ("smtp", "smtp+starttls", "smtps") or not is_host or not is_login or parts.port == 0:
        raise ValueError(value)
    return value


def address(value: Any) -> str:
    if not re.fullmatch(r"[\w+-]+(\.[\w+-]+)*@[\w-]+(\.[\w-]+)*", value, re.ASCII):
        raise ValueError(value)
    return str(value)


def _file_name(name: str) -> str:
    """Return the name as a part of a file's name: "My Shop" becomes "my-shop"."""
    return "-".join(re.findall("[a-z0-9]+", name.lower())) or "application"


_FILE = f"{_file_name(APP_NAME)}.sqlite"
_MAIL = (
    "smtp://host, smtp+starttls://user:password@host:587 (never without TLS) or smtps:// (TLS from the start), "
    "user and password in ASCII and percent-encoded"
)
_DATABASE = "postgresql://user:password@host/name, or sqlite:/// and the path of a file"

_OWN = {
    "APP_NAME": Setting(APP_NAME, *printable(1, 60), "the name of the application, in pages and mails"),
    "DATABASE_URL": Setting(
        None, database_url, _DATABASE, "the database (unset: a SQLite file in instance/)", is_secret=True
    ),
    "SECRET_KEY": Setting(
        None, secret, "a text that is not empty", "signs the sessions (unset: made once, in instance/)", is_secret=True
    ),
    "MAIL_URL": Setting(None, mail_url, _MAIL, "the mail server (unset: files in instance/outbox/)", is_secret=True),
    "MAIL_FROM": Setting(
        f"{_file_name(APP_NAME)}@localhost", address, "one e-mail address in ASCII", "the sender of the mails"
    ),
    "PASSIVE_AFTER_DAYS": Setting(30, *DAYS, "users not seen for longer become passive"),
    "AUDIT_DAYS": Setting(365, *DAYS, "how long the audit keeps its entries"),
    "LOG_FORMAT": Setting("text", log_format, "text or json", "one line, or one JSON object, for each record"),
    "PRODUCTION": Setting(
        None,
        *BOOLEAN,
        "refuse to start with settings that are not safe; unset: where a server other than `flask run` serves a "
        "DATABASE_URL",
    ),
    "DEMO_ON_NETWORK": Setting(
        False, *BOOLEAN, "whether the demo shop, which has no DATABASE_URL, answers other machines"
    ),
    "PROXIES": Setting(0, *none_or_whole(10), "the number of your proxies in front"),
    "PUBLIC_URL": Setting(
        None,
        public_url,
        "https:// and a host",
        "the address of this application, for links in mails; in production pages answer its host only",
    ),
    "SESSION_COOKIE_SECURE": Setting(None, *BOOLEAN, "whether logging in needs HTTPS (unset: in production)"),
    "TWO_FACTOR": Setting(True, *BOOLEAN, "offer two-factor login, by an authenticator app, to admins"),
    "LOG_LEVEL": Setting("INFO", level, "DEBUG, INFO, WARNING, ERROR or CRITICAL", "the lowest level that is logged"),
}


KEYS = SETTINGS | _OWN


def load_config(app: Flask, given: Mapping[str, Any] | object | None = None) -> None:
    """Fill `app.config` from every source and check it. Raises InvalidConfig for the first wrong value."""
    if given is None and get_load_dotenv():
        load_dotenv()  # like `flask`: a variable of the environment wins
    app.config.from_mapping({name: key.default for name, key in KEYS.items()}, SESSION_COOKIE_SAMESITE="Lax")
    app.config.from_mapping(_environment())
    _load_own(app, given)
    refuse_misspelled(app.config, KEYS, _PREFIXES)
    settle(app.config)
    cast_all(app.config, _OWN)
    _set_database(app)
    if app.config["RELEASE"] is None:
        app.config["RELEASE"] = _commit(Path(app.root_path) / ".git")
    _settle_production(app.config)
    app.config["SECRET_KEY_IS_MADE"] = app.config["SECRET_KEY"] is None
    if app.config["SECRET_KEY"] is None:
        app.config["SECRET_KEY"] = _made_secret_key(app)


def may_serve() -> bool:
    """Return whether this process may serve pages later. `flask run` is the only `flask` command that does."""
    return flask_command() in (None, run_command)


def flask_command() -> click.Command | None:
    """Return the `flask` command that this process executes. None in any other process."""
    context = click.get_current_context(silent=True)
    is_of_flask = context is not None and isinstance(context.find_root().command, AppGroup)
    return context.command if context is not None and is_of_flask else None


def settle_cookies(config: MutableMapping[str, Any]) -> None:
    """Settle the session's cookie once PRODUCTION is known.

    No other host of the domain can plant a cookie whose name begins with `__Host-`.
    """
    if config["SESSION_COOKIE_SECURE"] is None:
        config["SESSION_COOKIE_SECURE"] = config["PRODUCTION"]
    is_of_host = not config["SESSION_COOKIE_DOMAIN"] and (config["SESSION_COOKIE_PATH"] or "/") == "/"
    if config["SESSION_COOKIE_SECURE"] and is_of_host and config["SESSION_COOKIE_NAME"] == "session":
        config["SESSION_COOKIE_NAME"] = "__Host-session"


def configure_logging(app: Flask) -> None:
    """Give the log a handler, unless the process that loads the app has set one up."""
    for name in (app.name, "werkzeug", "gunicorn.access", "gunicorn.error"):
        logging.getLogger(name).addFilter(hide_password_links)
    logging.getLogger(app.name).addFilter(spell_failed_path_out)  # `app.logger` would add a handler here
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        if app.config["LOG_FORMAT"] == "json":
            handler.setFormatter(json_formatter())
            handler.addFilter(RunFields())
        logging.basicConfig(level=app.config["LOG_LEVEL"], format=TEXT_FORMAT, handlers=[handler])
    for name in ("apscheduler", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def json_formatter() -> logging.Formatter:
    """Return the formatter of LOG_FORMAT=json: one object a line.

    It has the time (UTC), level, logger and message. In a run it also has the worker, tick, execution and instance.
    """
    from pythonjsonlogger.json import JsonFormatter

    names = {"asctime": "time", "levelname": "level", "name": "logger"}
    formatter = JsonFormatter(
        "%(asctime)s%(levelname)s%(name)s%(message)s",
        rename_fields=names,
        datefmt="%Y-%m-%dT%H:%M:%SZ",
        json_serializer=strict_json.dumps,
    )
    formatter.converter = time.gmtime
    return formatter


class StrictJSON(DefaultJSONProvider):
    """Flask's JSON without NaN and Infinity, which the JSON standard does not know."""

    def dumps(self, obj: Any, **options: Any) -> str:
        return strict_json.without_nan(super().dumps(obj, **options), options.get("indent"))


def hide_password_links(record: logging.LogRecord) -> bool:
    """Mask the tokens of password links in log lines, also where they are percent-encoded."""
    message = unquote(_message(record))
    if _SIGNED.search(message):
        record.msg, record.args = _SIGNED.sub("...", spelled_out(message)), ()
    return True


def spell_failed_path_out(record: logging.LogRecord) -> bool:
    """Escape the path of a failed request. Flask logs it decoded, so it could contain whole log lines."""
    if record.funcName == "log_exception" and (message := _message(record)):
        record.msg, record.args = spelled_out(message), ()
    return True


def _message(record: logging.LogRecord) -> str:
    """Return the text of the record, or an empty one if its arguments do not fit. Its handler reports that error."""
    try:
        return record.getMessage()
    except Exception:  # the arguments may raise any error, and a filter that raises would end the request
        return ""


# Find a token by its form. Its path has many spellings: a second slash, %72eset, reset%2F.
# The match begins at the start of a word. Otherwise each letter of a long word that a visitor sends starts a search.
_SIGNED = re.compile(r"(?<![\w.-])[\w.-]{20,}\.[\w-]{6}\.[\w-]{27}")


def _environment() -> dict[str, str]:
    refuse_misspelled(os.environ, KEYS, _PREFIXES)
    return {name: os.environ[name] for name in KEYS if os.environ.get(name)}


def _load_own(app: Flask, given: Mapping[str, Any] | object | None) -> None:
    if given is None:
        app.config.from_pyfile(str(Path(app.instance_path) / "config.py"), silent=True)
    elif isinstance(given, Mapping):
        app.config.from_mapping(given)
    else:
        app.config.from_object(given)


def _settle_production(config: MutableMapping[str, Any]) -> None:
    """Settle PRODUCTION if it is known now. Otherwise it stays None until a server begins: see production.py."""
    if config["PRODUCTION"] is None and (config["DATABASE_IS_EMBEDDED"] or flask_command() is run_command):
        config["PRODUCTION"] = False
    if config["PRODUCTION"] is not None:
        settle_cookies(config)


def _set_database(app: Flask) -> None:
    """Set SQLALCHEMY_DATABASE_URI (a given one wins), DATABASE_IS_EMBEDDED and DATABASE_IS_TEMPORARY."""
    chosen = app.config.get("SQLALCHEMY_DATABASE_URI") or app.config["DATABASE_URL"]
    url = URL.create("sqlite", database=_FILE) if chosen is None else cast("DATABASE_URL", chosen, _OWN["DATABASE_URL"])
    if url.get_backend_name() == "sqlite" and url.host:  # `sqlite://my.sqlite` would be a database in memory
        raise InvalidConfig(
            f"DATABASE_URL is {url}, whose {url.host!r} is read as a host; expected three slashes before the path "
            f"of a file. Write sqlite:///{_FILE} for a file in the instance folder."
        )
    # For a test or a prototype: see `_temporary_file`.
    is_temporary = url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:")
    app.config["DATABASE_IS_TEMPORARY"] = is_temporary
    app.config["DATABASE_IS_EMBEDDED"] = chosen is None or is_temporary
    if is_temporary:
        url = url.set(database=_temporary_file(app))
    url = _usable_url(url, Path(app.instance_path))
    app.config["SQLALCHEMY_DATABASE_URI"] = url.render_as_string(hide_password=False)
    # Without `hide_parameters`, errors carry password hashes and addresses into logs, executions and dead letters.
    options = {"hide_parameters": True, **(app.config.get("SQLALCHEMY_ENGINE_OPTIONS") or {})}
    app.config["SQLALCHEMY_BINDS"] = {
        key: {"hide_parameters": True, **(bind if isinstance(bind, Mapping) else {"url": bind})}
        for key, bind in (app.config.get("SQLALCHEMY_BINDS") or {}).items()
    }
    is_postgresql = url.get_backend_name() == "postgresql"
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = _postgresql_options(options) if is_postgresql else options


def _postgresql_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return SQLALCHEMY_ENGINE_OPTIONS with defaults that suit outages and poolers."""
    arguments = {
        "prepare_threshold": None,  # a pooler may give the next transaction another connection
        # Without these, a network that drops packets silently holds its callers for minutes or hours.
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 20_000,
    }
    # SQLAlchemy keeps 5 connections, so ten threads would open and close others. A given pool has its own size.
    pool = {} if {"pool", "poolclass"} & given.keys() else {"pool_size": 10}
    # A pooled connection may be older than the server's last restart.
    return {"pool_pre_ping": True, **pool, **given, "connect_args": {**arguments, **given.get("connect_args", {})}}


def hide_refused_rows(app: Flask, db: SQLAlchemy) -> None:
    """Keep the rows that a database refuses out of the errors of the application's own engines."""
    with app.app_context():
        for engine in db.engines.values():
            postgresql.hide_refused_rows(engine)


def _usable_url(url: URL, folder: Path) -> URL:
    if url.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        # Without a time-out, a server that does not answer holds its caller for minutes.
        timeout = {} if "connect_timeout" in url.query else {"connect_timeout": "10"}
        return url.set(drivername="postgresql+psycopg").update_query_dict(timeout)
    if url.get_backend_name() != "sqlite":
        raise InvalidConfig(f"DATABASE_URL begins with {url.drivername}://; expected {_DATABASE}.")
    if not url.database or ":memory:" in url.database or url.database.startswith("file:"):
        raise InvalidConfig(
            f"DATABASE_URL is {url}; expected the path of a plain file, which several connections can share. "
            f"Write sqlite:///{_FILE} for a file in the instance folder."
        )
    return url.set(database=str(folder / url.database))


def _temporary_file(app: Flask) -> str:
    """Return the path of the file that stands for `sqlite://` and `sqlite:///:memory:`. It goes with the app.

    A database in memory has a single connection, on which a heartbeat's read would roll a run back.
    """
    folder = tempfile.mkdtemp(prefix=f"{_file_name(APP_NAME)}-")
    weakref.finalize(app, _remove, folder, os.getpid())
    return str(Path(folder) / _FILE)


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not a forked child
        shutil.rmtree(folder, ignore_errors=True)


def _commit(repository: Path) -> str | None:
    """Return the commit that is checked out, shortened. None if the repository cannot be read."""
    with suppress(OSError, ValueError):
        head = (repository / "HEAD").read_text(encoding="ascii").strip()
        if head.startswith("ref: "):
            head = _commit_of(head.removeprefix("ref: "), repository)
        return head[:12] or None
    return None


def _commit_of(branch: str, repository: Path) -> str:
    if (loose := repository / branch).exists():
        return loose.read_text(encoding="ascii")
    packed = (repository / "packed-refs").read_text(encoding="ascii")
    return next((line for line in packed.splitlines() if line.endswith(f" {branch}")), "")


def _made_secret_key(app: Flask) -> str:
    """Return a key for an application without one. If a server would refuse the key, do not keep it in a file."""
    is_kept = app.config["PRODUCTION"] is False or flask_command() is not None
    return _kept_secret_key(Path(app.instance_path)) if is_kept else secrets.token_hex()


def _kept_secret_key(folder: Path) -> str:
    """Return the key in the instance folder. The first of several processes makes it."""
    path = folder / "secret_key"
    try:
        if not path.exists():
            _write_secret_key(path)
        return str(secret(path.read_text(encoding="ascii").strip()))
    except (OSError, ValueError) as error:
        raise InvalidConfig(
            f"SECRET_KEY is not set and {path} cannot hold a key ({error or 'it is empty'}); expected a key. "
            f"Set SECRET_KEY, or make that file writable, or remove it if it is empty."
        ) from error


def _write_secret_key(path: Path) -> None:
    """Write the file whole or not at all.

    Concurrency: several processes may start at once. `link` fails in all but the first, and they use its key.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=".secret_key", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.unlink(draft)
