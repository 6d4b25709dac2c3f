"""Logging in, registering, passwords and second factors: Flask-Security, configured."""

import hmac
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import svcs
from flask import (
    Blueprint,
    Flask,
    abort,
    after_this_request,
    flash,
    redirect,
    render_template,
    request,
    session,
    url_for,
)
from flask.typing import ResponseReturnValue
from flask_login import current_user, login_required
from flask_security import (
    MailUtil,
    RoleMixin,
    Security,
    SQLAlchemyUserDatastore,
    Totp,
    anonymous_user_required,
    password_reset,
    uia_email_mapper,
)
from flask_security.confirmable import confirm_email_token_status
from passlib.exc import UsedTokenError
from sqlalchemy.orm.exc import StaleDataError
from werkzeug.wrappers import Response

import forms
import sessions
from background import current_workers
from hosts import root_of_links
from models import User, UserRepository, db

SENT = "We have sent a mail to %(email)s. Please check your inbox.", "info"
LOGGED = f"{SENT[0]} This shop has no mail server yet, so look for the link in its log.", "info"
SENDING = "CONFIRM_REGISTRATION", "CONFIRMATION_REQUEST", "PASSWORD_RESET_REQUEST"
INVALID_LINK = "This link is no longer valid. It works once, for a limited time. Please ask for a new link.", "warning"

SETTINGS = {
    **dict.fromkeys(("CONFIRMABLE", "RECOVERABLE", "CHANGEABLE", "REGISTERABLE", "RETURN_GENERIC_RESPONSES"), True),
    **dict.fromkeys(("CLI_USERS_NAME", "CLI_ROLES_NAME", "EMAIL_PLAINTEXT", "EMAIL_HTML", "STATIC_FOLDER"), None),
    "AUTO_LOGIN_AFTER_CONFIRM": True,  # the page of the link asks for the password
    "API_ENABLED_METHODS": ["session"],
    "EMAIL_VALIDATOR_ARGS": {"check_deliverability": False},
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
    "FRESHNESS": sessions.RECENT,
    "FRESHNESS_GRACE_PERIOD": sessions.RECENT,
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
    "MSG_ALREADY_CONFIRMED": ("This e-mail is confirmed already.", "info"),
    **dict.fromkeys(("MSG_INVALID_CONFIRMATION_TOKEN", "MSG_CONFIRMATION_EXPIRED"), INVALID_LINK),
    **dict.fromkeys(("MSG_INVALID_RESET_PASSWORD_TOKEN", "MSG_PASSWORD_RESET_EXPIRED"), INVALID_LINK),
    "MSG_PASSWORD_RESET_NO_LOGIN": ("Your password has been changed. Please log in.", "success"),
    "MSG_PASSWORD_CHANGE": ("Your password has been changed. You have been logged out everywhere else.", "success"),
    "MSG_PASSWORD_IS_THE_SAME": ("This is your current password. Please choose another password.", "error"),
    "MSG_PASSWORD_INVALID_LENGTH": ("Please use 8 to 128 characters.", "error"),
    "MSG_PASSWORD_TOO_SIMPLE": ("This password is easy to guess. Please choose another password.", "error"),
    "MSG_INVALID_PASSWORD": ("This is not your password.", "error"),
    "MSG_FORGOT_PASSWORD": ("Forgot your password?", "info"),  # as the mails call it
    "MSG_TWO_FACTOR_INVALID_TOKEN": ("This code is not valid. Your app shows a new code every 30 seconds.", "error"),
    "MSG_TWO_FACTOR_CHANGE_METHOD_SUCCESSFUL": ("Two-factor login is on. Each login now asks for a code.", "success"),
    "MSG_TWO_FACTOR_DISABLED": ("Two-factor login is off.", "success"),
}

account = Blueprint("account", __name__)


def register(app: Flask) -> None:
    """Add the accounts to the app. Call this after CSRFProtect is there."""
    key = app.config["SECRET_KEY"]
    totp_key = hmac.digest(key.encode() if isinstance(key, str) else key, b"two-factor", "sha256").hex()
    two_factor = {"TWO_FACTOR": app.config["TWO_FACTOR"], "TOTP_ISSUER": app.config["APP_NAME"]}
    is_logged = not app.config["MAIL_URL"] and app.config["PRODUCTION"] is False  # see `MailWorker`
    messages = dict.fromkeys((f"MSG_{name}" for name in SENDING), LOGGED if is_logged else SENT)
    for name, value in {**SETTINGS, **messages, **two_factor, "TOTP_SECRETS": {"1": totp_key}}.items():
        app.config.setdefault(f"SECURITY_{name}", value)
    users = Users(db, User, RoleMixin)
    own: dict[str, Any] = {"mail_util_cls": QueuedMails, "password_util_cls": forms.Passwords, "totp_cls": Codes}
    security = Security(app, users, **own, **forms.ACCOUNT_FORMS)
    security.want_json(lambda _request: False)
    sessions.register(app, security)
    views = app.view_functions
    views["security.confirm_email"] = asking_for_password(views["security.confirm_email"])
    if code := views.get("security.two_factor_token_validation"):  # it would log a user out
        views["security.two_factor_token_validation"] = anonymous_user_required(code)
    if set_up := views.get("security.two_factor_setup_validate"):  # the token in its address names no user
        views["security.two_factor_setup_validate"] = sessions.needs_recent_login(set_up)
    app.before_request(refuse_json)
    app.register_error_handler(StaleDataError, changed_meanwhile)
    password_reset.connect(confirm_by_password_link, app)
    app.register_blueprint(account)


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


class QueuedMails(MailUtil):
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
        return forms.normalized_email(email)

    def validate(self, email: str) -> str:
        return forms.normalized_email(super().validate(email.strip()[:500]))


def commit(response: Response) -> Response:
    db.session.commit()
    return response


class Codes(Totp):
    """Accepts each code of a second factor once, so that a code that was watched is worth nothing."""

    def generate_totp_secret(self) -> str:
        """Keep the key of a set-up that is not done. After a wrong code, the key in the app still works."""
        begun: str | None = session.get("tf_totp_secret") if session else None  # no session without a request
        return begun or super().generate_totp_secret()

    def get_last_counter(self, user: Any) -> int | None:
        return user.tf_last_counter  # type: ignore[no-any-return]

    def set_last_counter(self, user: Any, tmatch: Any) -> None:
        if not UserRepository(db.session).use_code(user.id, tmatch.counter):
            raise UsedTokenError


def confirm_by_password_link(app: Flask, user: User, **_: Any) -> None:
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


def refuse_json() -> None:
    """Refuse JSON where a form of Flask-Security would read it."""
    if request.blueprint in ("security", "account") and request.is_json:
        abort(415)


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
