"""Logging in, registering, passwords and second factors: Flask-Security, configured."""

import hmac
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

import svcs
from email_validator import SPECIAL_USE_DOMAIN_NAMES, EmailNotValidError, validate_email
from flask import (
    Blueprint,
    Flask,
    abort,
    after_this_request,
    current_app,
    flash,
    g,
    redirect,
    render_template,
    request,
    session,
    url_for,
)
from flask.sessions import SecureCookieSessionInterface, SessionMixin
from flask.typing import ResponseReturnValue
from flask_login import current_user, login_required, user_logged_out
from flask_login.utils import _user_context_processor
from flask_security import (
    MailUtil,
    PasswordUtil,
    RoleMixin,
    Security,
    SQLAlchemyUserDatastore,
    Totp,
    password_reset,
    uia_email_mapper,
    user_authenticated,
)
from flask_security.confirmable import confirm_email_token_status
from flask_security.utils import get_message, password_length_validator
from sqlalchemy.orm.exc import StaleDataError
from werkzeug.wrappers import Response

import forms
from background import current_workers
from background.dashboard.origin import is_own_path
from hosts import root_of_links
from models import User, UserRepository, db

SPECIAL_USE_DOMAIN_NAMES.remove("localhost")  # the domain of the admin of `flask init-db`

IDLE = timedelta(hours=12)  # a session ends so long after its last request
ABSOLUTE = timedelta(days=7)  # and so long after the password was entered
RECENT = timedelta(minutes=15)  # an admin's change needs the password, or another change, in the time before it

SENT = "We have sent a mail to %(email)s. Please check your inbox.", "info"
INVALID_LINK = "This link is no longer valid. It works once, for a limited time. Please ask for a new link.", "warning"

SETTINGS = {
    **dict.fromkeys(("CONFIRMABLE", "RECOVERABLE", "CHANGEABLE", "REGISTERABLE", "RETURN_GENERIC_RESPONSES"), True),
    **dict.fromkeys(("CLI_USERS_NAME", "CLI_ROLES_NAME", "EMAIL_PLAINTEXT", "EMAIL_HTML", "STATIC_FOLDER"), None),
    "AUTO_LOGIN_AFTER_CONFIRM": True,  # the page of the link asks for the password
    "API_ENABLED_METHODS": ["session"],
    "USER_IDENTITY_ATTRIBUTES": [{"email": {"mapper": uia_email_mapper}}],
    "DATETIME_FACTORY": lambda: datetime.now(UTC),
    "PASSWORD_SCHEMES": ["argon2"],
    "PASSWORD_SINGLE_HASH": True,
    # At least as slow as OWASP's cheat sheet asks for.
    "PASSWORD_HASH_PASSLIB_OPTIONS": {"argon2__memory_cost": 19456, "argon2__rounds": 2, "argon2__parallelism": 1},
    "PASSWORD_NORMALIZE_FORM": "NFKC",
    "HASHING_SCHEMES": ["hex_sha256"],  # of the parts of a signed link that are not secret
    "CONFIRM_EMAIL_WITHIN": timedelta(days=2),  # as confirm_mail.txt says
    "RESET_PASSWORD_WITHIN": timedelta(hours=1),
    "FRESHNESS": RECENT,
    "FRESHNESS_GRACE_PERIOD": RECENT,
    "TWO_FACTOR_ENABLED_METHODS": ["authenticator"],
    "TWO_FACTOR_AUTHENTICATOR_VALIDITY": 30,
    "TWO_FACTOR_RESCUE_EMAIL": False,
    "CONFIRM_URL": "/account/confirm",
    "RESET_URL": "/account/reset",
    "CHANGE_URL": "/account/password",
    "VERIFY_URL": "/account/verify",
    "TWO_FACTOR_SETUP_URL": "/account/two-factor",
    "TWO_FACTOR_TOKEN_VALIDATION_URL": "/account/two-factor/code",
    "POST_REGISTER_VIEW": "security.login",
    "POST_CHANGE_VIEW": "account.profile",
    "CONFIRM_ERROR_VIEW": "security.login",
    "TWO_FACTOR_POST_SETUP_VIEW": "account.profile",
    "MSG_UNAUTHENTICATED": ("Please log in first.", "info"),
    "MSG_GENERIC_AUTHN_FAILED": ("Wrong e-mail or password, or the e-mail is not confirmed yet.", "error"),
    "MSG_REAUTHENTICATION_SUCCESSFUL": ("Thank you. You can continue now.", "info"),
    **dict.fromkeys(("MSG_CONFIRM_REGISTRATION", "MSG_CONFIRMATION_REQUEST", "MSG_PASSWORD_RESET_REQUEST"), SENT),
    "MSG_ALREADY_CONFIRMED": ("This e-mail is confirmed already. Please log in.", "info"),
    **dict.fromkeys(("MSG_INVALID_CONFIRMATION_TOKEN", "MSG_CONFIRMATION_EXPIRED"), INVALID_LINK),
    **dict.fromkeys(("MSG_INVALID_RESET_PASSWORD_TOKEN", "MSG_PASSWORD_RESET_EXPIRED"), INVALID_LINK),
    "MSG_PASSWORD_RESET_NO_LOGIN": ("Your password has been changed. Please log in.", "success"),
    "MSG_PASSWORD_CHANGE": ("Your password has been changed. You have been logged out everywhere else.", "success"),
    "MSG_PASSWORD_IS_THE_SAME": ("This is your current password. Please choose another password.", "error"),
    "MSG_PASSWORD_INVALID_LENGTH": ("Please use 8 to 128 characters.", "error"),
    "MSG_PASSWORD_TOO_SIMPLE": ("This password is easy to guess. Please choose another password.", "error"),
    "MSG_INVALID_PASSWORD": ("This is not your current password.", "error"),
    "MSG_FORGOT_PASSWORD": ("Forgot your password?", "info"),  # as the mails call it
    "MSG_TWO_FACTOR_INVALID_TOKEN": ("This code is not valid. Your app shows a new code every 30 seconds.", "error"),
    "MSG_TWO_FACTOR_CHANGE_METHOD_SUCCESSFUL": ("Two-factor login is on. Each login now asks for a code.", "success"),
    "MSG_TWO_FACTOR_DISABLED": ("Two-factor login is off.", "success"),
}

account = Blueprint("account", __name__)


class Sessions(SecureCookieSessionInterface):
    """Renews the cookie in each response whose request read its user. A static file or a probe reads no user."""

    def should_set_cookie(self, app: Flask, session: SessionMixin) -> bool:
        return session.modified or (hasattr(session, "asked_for") and super().should_set_cookie(app, session))


def register(app: Flask) -> None:
    """Add the accounts to the app. Call this after CSRFProtect is there."""
    key = app.config["SECRET_KEY"]
    totp_key = hmac.digest(key.encode() if isinstance(key, str) else key, b"two-factor", "sha256").hex()
    two_factor = {"TWO_FACTOR": app.config["TWO_FACTOR"], "TOTP_ISSUER": app.config["APP_NAME"]}
    for name, value in {**SETTINGS, **two_factor, "TOTP_SECRETS": {"1": totp_key}}.items():
        app.config.setdefault(f"SECURITY_{name}", value)
    app.config["PERMANENT_SESSION_LIFETIME"] = IDLE
    app.session_interface = Sessions()
    users = Users(db, User, RoleMixin)
    own: dict[str, Any] = {"mail_util_cls": Post, "password_util_cls": Passwords, "totp_cls": Codes}
    security = Security(app, users, **own, **forms.ACCOUNT_FORMS)
    security.want_json(lambda _request: False)
    security.reauthn_handler(ask_for_password)
    ask_for_the_user_only_where_needed(app, security)
    load = security.login_manager._user_callback
    security.login_manager.user_loader(lambda uniquifier: None if is_over() else load(uniquifier))
    for name, wrap in (("confirm_email", asking_for_password), ("two_factor_token_validation", keeping_session)):
        if (view := app.view_functions.get(f"security.{name}")) is not None:
            app.view_functions[f"security.{name}"] = wrap(view)
    app.before_request(refuse_json)
    app.register_error_handler(StaleDataError, changed_meanwhile)
    user_authenticated.connect(begin_session, app)
    user_logged_out.connect(end_sessions, app)
    password_reset.connect(confirm, app)
    app.register_blueprint(account)


def ask_for_the_user_only_where_needed(app: Flask, security: Security) -> None:
    """Load the user only when a view reads it. A static file or an error page then needs no query."""
    app.template_context_processors[None].remove(_user_context_processor)
    security.principal.identity_loaders.clear()
    security.login_manager.request_loader(None)  # only a session logs in, not a token in a request


def normalized(email: str) -> str:
    """Return the normalized e-mail: NFC, a domain in ASCII, lower case. Raises ValueError if it is invalid.

    The forms, the rate limits and the commands compare e-mails in this form.
    """
    valid = validate_email(email.strip()[:500], check_deliverability=False, globally_deliverable=False)
    return f"{valid.local_part}@{valid.ascii_domain}".lower()


# ---- What Flask-Security calls


class Users(SQLAlchemyUserDatastore):
    def put(self, model: Any) -> Any:
        """Write at once, so that the view itself raises StaleDataError, not the commit after it."""
        self.db.session.add(model)
        self.db.session.flush()
        return model

    def create_user(self, **columns: Any) -> User:
        """Return the user with this e-mail, new or existing. Only the mail shows the difference."""
        return UserRepository(db.session).add(columns["name"], columns["email"], columns["password"])


class Post(MailUtil):
    """Enqueues each mail in the request's transaction. `mail.py` writes it."""

    kinds = {
        "welcome": "confirm",
        "confirmation_instructions": "confirm",
        "reset_instructions": "password link",
        "reset_notice": "password changed",
        "change_notice": "password changed",
    }

    def send_mail(self, template: str, *_: Any, **context: Any) -> None:
        user = context["user"]
        about = {self.kinds[template.rpartition("/")[2]]: user.id} if user.id else {"no account": user.email}
        current_workers.enqueue("mail", {**about, "root": root_of_links()})
        after_this_request(commit)

    def normalize(self, email: str) -> str:
        return normalized(email)

    def validate(self, email: str) -> str:
        try:
            validate_email(email.strip()[:500], check_deliverability=False)
        except EmailNotValidError as error:
            raise ValueError(str(error)) from None
        return normalized(email)


def commit(response: Response) -> Response:
    db.session.commit()
    return response


class Codes(Totp):
    """Accepts each code of a second factor once, so that a code that was watched is worth nothing."""

    def get_last_counter(self, user: Any) -> int | None:
        return user.tf_last_counter  # type: ignore[no-any-return]

    def set_last_counter(self, user: Any, tmatch: Any) -> None:
        user.tf_last_counter = tmatch.counter


class Passwords(PasswordUtil):
    _one_at_a_time = Lock()  # zxcvbn keeps the words in a variable of its module

    def validate(self, password: str, is_register: bool, **given: Any) -> tuple[list[str] | None, str]:
        """Return complaints about a new password, and its normalized form."""
        from zxcvbn import zxcvbn  # reads its lists of words

        normal = self.normalize(password)
        if too_long_or_short := password_length_validator(normal):
            return too_long_or_short, normal
        user = given.get("user")
        known = [user.email, user.name] if user else [str(given.get(name)) for name in ("email", "name")]
        known.append(current_app.config["APP_NAME"])
        words = {*known, known[0].partition("@")[0], *re.findall(r"\w{3,}", " ".join(known))}
        with self._one_at_a_time:
            score = zxcvbn(normal[:72], sorted(words))["score"]  # it accepts no longer text
        complaints = [get_message("PASSWORD_TOO_SIMPLE")[0]] if score < 3 else None
        return complaints, normal


def begin_session(_app: Flask, user: User, authn_via: list[str] | None = None, **_: Any) -> None:
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


def end_sessions(app: Flask, user: Any, **_: Any) -> None:
    """End all sessions of a user who logs out, so that a copied cookie is invalid too."""
    if user.is_authenticated:
        app.extensions["security"].datastore.set_uniquifier(user)
        db.session.commit()
        session.clear()
        flash("You have been logged out.", "info")


def confirm(app: Flask, user: User, **_: Any) -> None:
    """Confirm the e-mail of a user who reset the password. The reset link went to the same mailbox."""
    if user.confirmed_at is None:
        user.confirmed_at = datetime.now(UTC)
        app.extensions["security"].datastore.put(user)


def asking_for_password(confirm_email: Callable[..., Any]) -> Callable[..., Any]:
    """Ask for the password before `confirm_email`.

    A stranger may register with another person's e-mail. That person's click on the link must not confirm the
    stranger's password. A mail scanner that opens the link confirms nothing either.
    """

    def ask(token: str) -> Any:
        is_too_old, is_invalid, user = confirm_email_token_status(token)
        if is_too_old or is_invalid or user.confirmed_at is not None:
            return confirm_email(token)
        form = forms.VerifyForm(user=user)
        if form.validate_on_submit():
            return confirm_email(token)
        return render_template("security/confirm.html", form=form)

    return ask


def ask_for_password(_within: timedelta, _grace: timedelta) -> Response:
    """Redirect to the page that asks for the password. It leads the user back to the page with the button."""
    flash("Please enter your password again. Then repeat your last step.", "info")
    page = urlsplit(request.full_path.rstrip("?") if request.method == "GET" else request.referrer or "/")
    target = f"{page.path}?{page.query}" if page.query else page.path
    return redirect(url_for("security.verify", next=target if is_own_path(target) else "/"))


def refuse_json() -> None:
    """Refuse JSON where Flask-Security would read it as a form."""
    if request.blueprint == "security" and request.is_json:
        abort(415)


def keeping_session(ask_for_code: Callable[..., Any]) -> Callable[..., Any]:
    """Redirect a logged-in user from the page for a login's code, because that page would log the user out."""
    return lambda: redirect(url_for("account.profile")) if current_user.is_authenticated else ask_for_code()


def changed_meanwhile(_error: StaleDataError) -> ResponseReturnValue:
    """Tell the user that another request has just changed the same account."""
    db.session.rollback()
    flash("Your account was changed at the same time, so nothing was saved. Please try again.", "warning")
    return redirect(url_for("security.login"))


# ---- The account


@account.route("/account", methods=["GET", "POST"])
@login_required
def profile() -> ResponseReturnValue:
    form = forms.NameForm(obj=current_user)
    if form.validate_on_submit():
        current_user.name = form.name.data
        db.session.commit()
        flash("Your name has been changed.", "success")
        return redirect(url_for("account.profile"))
    return render_template("account.html", form=form)


@account.route("/account/delete", methods=["GET", "POST"])
@login_required
def delete() -> ResponseReturnValue:
    """Delete the account of a user who enters the password. The last admin cannot be lost this way."""
    form = forms.VerifyForm(user=current_user)
    if form.validate_on_submit():
        if svcs.flask.get(UserRepository).delete(current_user):
            db.session.commit()
            session.clear()
            flash("Your account has been deleted.", "success")
            return redirect(url_for("pages.home"))
        form.password.errors = ["You are an admin. Another admin must take your rights first."]
    return render_template("delete.html", form=form)
