"""Sessions of users: the cookie, how a session begins and ends, and the question for a recent password."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from flask import Flask, current_app, flash, g, redirect, request, session, url_for
from flask.sessions import SecureCookieSessionInterface, SessionMixin
from flask_login import user_logged_out
from flask_login.utils import _user_context_processor
from flask_security import Security, auth_required, user_authenticated
from werkzeug.wrappers import Response

from background.dashboard.origin import is_own_path
from models import User, UserRepository, db

IDLE = timedelta(hours=12)  # a session ends so long after its last request
ABSOLUTE = timedelta(days=7)  # and so long after the password was entered
RECENT = timedelta(minutes=15)  # an admin's change needs the password, or another change, in the time before it

needs_recent_login = auth_required("session", within=lambda: current_app.config["SECURITY_FRESHNESS"])
"""Decorates a view of a session with a recent login. Other sessions get the page that asks for the password."""


def register(app: Flask, security: Security) -> None:
    app.config["PERMANENT_SESSION_LIFETIME"] = IDLE
    app.session_interface = RenewedByUser()
    ask_for_the_user_only_where_needed(app, security)
    load = security.login_manager._user_callback
    security.login_manager.user_loader(lambda uniquifier: None if is_over() else load(uniquifier))
    security.reauthn_handler(ask_for_password)
    user_authenticated.connect(begin, app)
    user_logged_out.connect(end_all, app)


class RenewedByUser(SecureCookieSessionInterface):
    """Renews the cookie in each response whose request read its user. A static file or a probe reads no user."""

    def should_set_cookie(self, app: Flask, session: SessionMixin) -> bool:
        return session.modified or (hasattr(session, "asked_for") and super().should_set_cookie(app, session))


def ask_for_the_user_only_where_needed(app: Flask, security: Security) -> None:
    """Load the user only when a view reads it. A static file or an error page then needs no query."""
    app.template_context_processors[None].remove(_user_context_processor)
    security.principal.identity_loaders.clear()
    security.login_manager.request_loader(None)  # only a session logs in, not a token in a request


def begin(_app: Flask, user: User, authn_via: list[str] | None = None, **_: Any) -> None:
    """Clear the old session after a login, as another person may know its token. Record the login.

    Concurrency: another request may end the user's sessions. Then this session is over, and nothing is written.
    """
    for name in session.keys() - {"_user_id", "_id", "_fresh", "fs_paa"}:
        session.pop(name)
    g.pop("csrf_token", None)
    session.permanent = True
    if authn_via == ["change"]:  # a new password is not a login
        return
    if not UserRepository(db.session).record_login(user.id, datetime.now(UTC), user.fs_uniquifier):
        db.session.rollback()


def is_over() -> bool:
    """Return whether the password of this session was entered too long ago."""
    session.asked_for = True  # type: ignore[attr-defined]
    return bool(time.time() - session.get("fs_paa", 0) > ABSOLUTE.total_seconds())


def end_all(app: Flask, user: Any, **_: Any) -> None:
    """End all sessions of a user who logs out, so that a copied cookie is invalid too."""
    if user.is_authenticated:
        app.extensions["security"].datastore.set_uniquifier(user)
        db.session.commit()
        session.clear()
        flash("You have been logged out.", "info")


def ask_for_password(_within: timedelta, _grace: timedelta) -> Response:
    """Redirect to the page that asks for the password. It leads the user back to the page with the button."""
    flash("Please enter your password again. Then repeat your last step.", "info")
    page = urlsplit(request.full_path.rstrip("?") if request.method == "GET" else request.referrer or "/")
    target = f"{page.path}?{page.query}" if page.query else page.path
    return redirect(url_for("security.verify", next=target if is_own_path(target) else "/"))
