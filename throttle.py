"""Rate limits for each user and each network. All processes share the counts, which are in the database."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from hashlib import sha256
from ipaddress import ip_address, ip_network
from math import ceil
from typing import Any

from flask import Flask, Response, g, request, session
from flask_limiter import ApplicationLimit, Limiter, RateLimitExceeded, RequestLimit
from flask_login import current_user, user_logged_in
from limits.storage import Storage
from sqlalchemy import ColumnElement, case, delete, select, true
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from background.database.clock import elapsed, now, single_statements
from forms import normalized_email
from models import RateLimit, User, db

log = logging.getLogger(__name__)

WRITING = ["POST", "PUT", "PATCH", "DELETE"]

# Each request that may write is counted, whatever its route. A new route needs no line of its own.
WRITES_OF_NETWORK = "900 per hour"
WRITES_OF_USER = "300 per hour"

# Each attempt to log in is counted, also with the right password: checking a password takes long.
LOGINS_OF_NETWORK = "50 per 10 minutes"
LOGINS_OF_NETWORK_AND_ACCOUNT = "10 per 10 minutes"
LOGINS_OF_ACCOUNT = "100 per hour"  # from all networks together, except the known networks
DAYS_KNOWN = 90  # for which a network is known to an account after a login
CODES_OF_ACCOUNT = "20 per hour"  # of two-factor login
PASSWORDS_OF_USER = "10 per 10 minutes"  # for each form that asks a logged-in user for a password or a code
MAILS_OF_NETWORK = "20 per hour"  # for registering, and for each form that asks for a link
LINKS_OF_NETWORK = "20 per hour"  # for each form behind a link


# ---- The visitor


def network() -> str:
    """Return the visitor's network: an IPv4 address, or the /64 of an IPv6 address."""
    try:
        address = ip_address(_without_port(request.remote_addr or ""))
    except ValueError:
        return "nowhere"  # the proxy uses a Unix socket, and PROXIES does not count it
    address = getattr(address, "ipv4_mapped", None) or address
    return str(address) if address.version == 4 else str(ip_network((address, 64), strict=False))


def _without_port(address: str) -> str:
    """Remove the port that some proxies forward: 192.0.2.7:4711, or [2001:db8::7]:4711."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address.partition(":")[0] if address.count(":") == 1 else address


def user() -> str:
    key = f"user {current_user.id}"
    # Release the connection, because the count needs another. Otherwise requests that keep one could all wait for it.
    db.session.rollback()
    return key


def is_not_for_user() -> bool:
    """Return whether no user's count applies: the request only reads, or its visitor is not logged in."""
    return request.method not in WRITING or not current_user.is_authenticated


def account() -> str:
    """Return the account that the form names, as a digest, so that the counts hold no e-mail."""
    return f"account {_digest(request.form.get('email', ''))}"


def account_of_code() -> str:
    """Return the account that passed the password and now needs its code."""
    return f"account {_digest(session.get('tf_user_id', ''))}"


def _digest(email: str) -> str:
    with suppress(ValueError):
        email = normalized_email(email)
    return sha256(email.encode()).hexdigest()[:32]


def network_and_account() -> str:
    return f"{network()} {account()}"


def is_known() -> bool:
    """Return whether the account logged in from this network. A guesser elsewhere cannot lock this owner out."""
    return request.method not in WRITING or limiter.storage.get(f"known {network_and_account()}") > 0


def note_login(_app: Flask, user: User) -> None:
    g.logged_in = f"known {network()} account {_digest(user.email)}"


def remember_network(response: Response) -> Response:
    """Remember the network of a login, after the login's transaction: on SQLite only one connection can write."""
    if key := g.pop("logged_in", None):
        try:
            limiter.storage.clear(key)
            limiter.storage.incr(key, DAYS_KNOWN * 86_400)
        except SQLAlchemyError:  # the login is done already
            log.exception("The network of a login could not be remembered")
    return response


# ---- The limits


def note_refusal(limit: RequestLimit) -> None:
    g.is_first_refusal = g.hits == limit.limit.amount + 1  # in this window


limiter = Limiter(
    network,
    storage_uri="database://",
    strategy="fixed-window",
    on_breach=note_refusal,
    application_limits=[
        ApplicationLimit(WRITES_OF_NETWORK, scope="writes", methods=WRITING),
        ApplicationLimit(WRITES_OF_USER, user, scope="writes", methods=WRITING, exempt_when=is_not_for_user),
    ],
)


def throttled(limit: str, key: Callable[[], str] = network, **more: Any) -> Callable[[Any], Any]:
    """Count each writing request to a view by `key`, also simultaneous ones. Answer 429 above `limit`.

    `more` are arguments of Flask-Limiter's `limit`.
    """
    return limiter.limit(limit, key_func=key, **{"methods": WRITING, **more})


LOGIN = [
    throttled(LOGINS_OF_NETWORK),
    throttled(LOGINS_OF_NETWORK_AND_ACCOUNT, network_and_account),
    throttled(LOGINS_OF_ACCOUNT, account, exempt_when=is_known),
]
CODE = [throttled(LOGINS_OF_NETWORK), throttled(CODES_OF_ACCOUNT, account_of_code)]
OWN_PASSWORD = [throttled(PASSWORDS_OF_USER, user, exempt_when=is_not_for_user)]
MAILS = [throttled(MAILS_OF_NETWORK)]
LINKS = [throttled(LINKS_OF_NETWORK)]

# The stricter limits of some routes, by their endpoints.
LIMITS: dict[str, Sequence[Callable[[Any], Any]]] = {
    "account.delete": OWN_PASSWORD,
    "security.login": LOGIN,
    "security.verify": OWN_PASSWORD,
    "security.change_password": OWN_PASSWORD,
    "security.register": MAILS,
    "security.forgot_password": MAILS,
    "security.send_confirmation": MAILS,
    "security.reset_password": LINKS,
    "security.confirm_email": LINKS,
    "security.two_factor_token_validation": CODE,
    "security.two_factor_rescue": MAILS,
    "security.two_factor_setup": OWN_PASSWORD,
    "security.two_factor_setup_validate": OWN_PASSWORD,
}


def register(app: Flask) -> None:
    """Count the requests of the app. Call this after its routes of `LIMITS` are registered."""
    app.config.setdefault("RATELIMIT_ENABLED", True)
    limiter.init_app(app)
    logging.getLogger("flask-limiter").setLevel(logging.WARNING)  # it has a line for each refused request
    for endpoint in LIMITS.keys() & app.view_functions.keys():
        for limit in LIMITS[endpoint]:
            app.view_functions[endpoint] = limit(app.view_functions[endpoint])
    if limiter.enabled:
        user_logged_in.connect(note_login, app)
        app.after_request(remember_network)


def explain(error: RateLimitExceeded) -> None:
    """Give the error a sentence, and the number of seconds after which the visitor may try again."""
    refused = limiter.current_limit
    if refused is None:
        return
    error.retry_after = seconds = max(1, ceil(refused.reset_at - time.time()))
    minutes = max(1, round(seconds / 60))
    wait = "a minute" if minutes == 1 else f"{minutes} minutes"
    source = "with this account" if refused.request_args[0].startswith(("user ", "account ")) else "from your network"
    error.description = f"There were too many attempts {source}. Please wait for {wait}, then try again."


# ---- The counts


class RateLimits(Storage):
    """The storage of Flask-Limiter (`database://`): one count for all processes and machines.

    Each count has a connection of its own, and is committed at once. A rollback of the request does not undo it. If
    the database does not answer, the request fails.
    """

    STORAGE_SCHEME = ["database"]
    base_exceptions = SQLAlchemyError

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Add `amount` within the window, or begin a window of `expiry` seconds. Return the count.

        Concurrency: other requests may count the same key. Each adds to the current count, and one begins the window.
        """
        insert: Any = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}[db.engine.dialect.name]
        first = {"hits": max(amount, 0), "expires_at": now(timedelta(seconds=expiry))}
        is_over = RateLimit.expires_at <= now()
        counted = (
            insert(RateLimit)
            .values(key=key, **first)
            .on_conflict_do_update(
                index_elements=[RateLimit.key],
                set_={
                    "hits": case((is_over, first["hits"]), else_=RateLimit.hits + amount),
                    "expires_at": case((is_over, first["expires_at"]), else_=RateLimit.expires_at),
                },
            )
            .returning(RateLimit.hits)
        )
        with single_statements(db.engine).begin() as connection:
            hits: int = connection.execute(counted).scalar_one()
            if hits == amount:  # a window began, so delete some expired windows
                connection.execute(_forget)
        g.hits = hits
        return hits

    def get(self, key: str) -> int:
        return int(self._ask(RateLimit.hits, key) or 0)

    def get_expiry(self, key: str) -> float:
        """Return the end of the window on this host's clock."""
        return time.time() + (self._ask(elapsed(now(), RateLimit.expires_at), key) or 0.0)

    def _ask(self, column: Any, key: str) -> Any:
        current = select(column).where(RateLimit.key == key, RateLimit.expires_at > now())
        with single_statements(db.engine).connect() as connection:
            return connection.scalar(current)

    def check(self) -> bool:
        with single_statements(db.engine).connect() as connection:
            return connection.scalar(select(1)) == 1

    def clear(self, key: str) -> None:
        self._delete(RateLimit.key == key)

    def reset(self) -> int:
        return self._delete(true())

    def _delete(self, condition: ColumnElement[bool]) -> int:
        with single_statements(db.engine).begin() as connection:
            return connection.execute(delete(RateLimit).where(condition)).rowcount


# Concurrency: other requests may delete the same rows, or begin a window in one of them. A locked row is skipped, so no
# request waits, and a window that began stays.
_over = select(RateLimit.key).where(RateLimit.expires_at <= now()).limit(100).with_for_update(skip_locked=True)
_forget = delete(RateLimit).where(RateLimit.key.in_(_over))
