"""The application's own pages and JSON."""

import json
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, cast

import svcs
from flask import (
    Blueprint,
    Flask,
    abort,
    current_app,
    flash,
    jsonify,
    redirect,
    render_template,
    request,
    session,
    url_for,
)
from flask.typing import ResponseReturnValue
from flask_bootstrap import Bootstrap5
from flask_limiter import RateLimitExceeded
from flask_login import LoginManager, current_user, login_required, login_user, logout_user
from flask_wtf import CSRFProtect, FlaskForm
from flask_wtf.csrf import CSRFError
from sqlalchemy import Select, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import InstrumentedAttribute, joinedload
from werkzeug.datastructures import MultiDict
from werkzeug.exceptions import BadHost, HTTPException, SecurityError
from werkzeug.routing import IntegerConverter, Map
from werkzeug.wrappers import Response
from wtforms import (
    EmailField,
    Form,
    PasswordField,
    SearchField,
    SelectChoice,
    SelectField,
    StringField,
)
from wtforms import Field as FormField
from wtforms.validators import (
    DataRequired,
    Email,
    EqualTo,
    InputRequired,
    Length,
    Optional,
    ValidationError,
)

import throttle
from background import current_workers
from background.dashboard import dashboard
from background.dashboard.origin import is_own_path
from background.monitoring.unavailable import unavailable
from models import AuditEntry, User, UserRepository, db

PAGE_SIZE = 20
MAX_BODY = 500_000  # bytes, far more than a form of ours needs
JSON = "/api"  # the prefix of the addresses that answer with JSON
MAX_ID = 2**31 - 1  # the largest INTEGER of a column

pages = Blueprint("pages", __name__)
account = Blueprint("account", __name__)
admin = Blueprint("admin", __name__, url_prefix="/admin")

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # not stricter: on HTTPS Flask-WTF reads the referrer of a form
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cross-Origin-Opener-Policy": "same-origin",
}

csrf = CSRFProtect()
login_manager = LoginManager()
login_manager.login_view = "account.login"
login_manager.login_message = "Please log in first."
login_manager.login_message_category = "info"


def register(app: Flask) -> None:
    """Give the app its pages: extensions, template helpers, blueprints and error pages."""
    app.config.setdefault("BOOTSTRAP_SERVE_LOCAL", True)
    app.config["MAX_CONTENT_LENGTH"] = app.config["MAX_CONTENT_LENGTH"] or MAX_BODY
    Bootstrap5(app)
    csrf.init_app(app)
    login_manager.init_app(app, add_context_processor=False)
    # As a global, not by a context processor, current_user costs a query only in a template that names it. So the error
    # page works without the database.
    app.jinja_env.globals["current_user"] = current_user
    app.jinja_env.globals["navigation"] = app.extensions["navigation"] = Navigation([], [])
    app.jinja_env.filters.update(moment=moment)
    app.url_map.converters["id"] = IdConverter
    for blueprint in (pages, account, admin, dashboard(admins_only)):
        app.register_blueprint(blueprint)
    throttle.register(app)
    for without_host in (BadHost, SecurityError):  # without a host, a page cannot name its own addresses
        app.register_error_handler(without_host, HTTPException.get_response)
    app.register_error_handler(HTTPException, show_error)
    app.register_error_handler(SQLAlchemyError, unavailable)
    app.after_request(set_headers)


class Navigation(NamedTuple):
    """Further links at the top of each page: the endpoint and the text of each."""

    for_all: list[tuple[str, str]]
    for_users: list[tuple[str, str]]


class IdConverter(IntegerConverter):
    """`<id:book_id>` in a rule: a number within the range of ids."""

    def __init__(self, map: Map) -> None:
        super().__init__(map, min=1, max=MAX_ID)


@login_manager.user_loader
def load_user(session_id: str) -> User | None:
    """Return the user whose `get_id` still is `session_id`."""
    user_id, _, fingerprint = session_id.partition(".")
    if not (
        user_id.isdecimal() and len(user_id) <= 18
    ):  # another application with the same key may have set the cookie
        return None
    user = svcs.flask.get(UserRepository).get(int(user_id))
    return user if user is not None and user.has_fingerprint(fingerprint) else None


def set_headers(response: Response) -> Response:
    """Add the headers of every response. A cache must not keep a page that was made for one visitor."""
    response.headers.update(HEADERS)
    if request.is_secure:
        response.headers["Strict-Transport-Security"] = "max-age=31536000"
    if not (request.endpoint or "").endswith("static") and session:
        response.headers["Cache-Control"] = "no-store"
    return response


def moment(at: datetime) -> str:
    return f"{at:%d %b %Y, %H:%M} UTC"


# ---- Forms: both databases can store every valid value


def strip(text: str | None) -> str | None:
    return text.strip() if text else text


def lower(text: str | None) -> str | None:
    return text.lower() if text else text


DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # letters and symbols that show nothing
MOST_MARKS = 4  # on one letter: more than any language needs


def readable(_form: Form, field: FormField) -> None:
    """Refuse text that is not one line, that shows nothing, or that hides its neighbours on a page.

    PostgreSQL also refuses NUL. A text that is too long is not checked further.
    """
    if field.errors or not field.data:
        return
    kinds = [unicodedata.category(character) for character in field.data]
    if {"Cc", "Zl", "Zp"}.intersection(kinds) or DIRECTIONS.intersection(field.data):
        raise ValidationError("Please leave out control characters.")
    if not any(kind[0] in "LNPS" for kind, each in zip(kinds, field.data, strict=True) if each not in BLANK):
        raise ValidationError("Please use characters that can be seen.")
    if "M" * (MOST_MARKS + 1) in "".join("M" if kind in ("Mn", "Me") else "-" for kind in kinds if kind != "Cf"):
        raise ValidationError(f"Please put at most {MOST_MARKS} accents on one letter.")


class ShortEmail(Email):
    """Checks the e-mail only if the checks before it passed. The longest text of a form would take half a second."""

    def __call__(self, form: Form, field: FormField) -> None:
        if not field.errors:
            super().__call__(form, field)


class PostedForm(FlaskForm):
    """Reads only a browser's form. Flask-WTF would also read an uploaded file, or JSON, as the text of a field."""

    class Meta(FlaskForm.Meta):
        def wrap_formdata(self, form: Form, formdata: Any) -> Any:
            return formdata if isinstance(formdata, MultiDict) else request.form or None


class NameForm(PostedForm):
    name = StringField(
        "Name",
        filters=[strip],
        validators=[DataRequired(), Length(max=120), readable],
        render_kw={"autocomplete": "name"},
    )


class NewPasswordForm(PostedForm):
    password = PasswordField(
        "Password",
        description="At least 8 characters.",
        validators=[InputRequired(), Length(8, 128, "Please use 8 to 128 characters.")],
        render_kw={"autocomplete": "new-password"},
    )
    repeated = PasswordField(
        "Password again",
        validators=[InputRequired(), EqualTo("password", "The two passwords differ.")],
        render_kw={"autocomplete": "new-password"},
    )


class RegisterForm(NewPasswordForm, NameForm):
    email = EmailField(
        "E-mail",
        filters=[strip, lower],
        validators=[DataRequired(), Length(max=254), readable, ShortEmail()],
        render_kw={"autocomplete": "email"},
    )


class ChangePasswordForm(NewPasswordForm):
    current = PasswordField(
        "Current password",
        validators=[InputRequired(), Length(max=128)],
        render_kw={"autocomplete": "current-password"},
    )


class LoginForm(PostedForm):
    email = EmailField(
        "E-mail",
        filters=[strip, lower],
        validators=[DataRequired(), Length(max=254), readable],
        render_kw={"autocomplete": "username"},
    )
    password = PasswordField(
        "Password",
        validators=[InputRequired(), Length(max=128)],
        render_kw={"autocomplete": "current-password"},
    )


class SearchForm(FlaskForm):
    """A form that changes nothing, so it comes by GET and needs no token."""

    class Meta:
        csrf = False

    q = SearchField(
        "Search",
        filters=[strip],
        validators=[Optional(), Length(max=100), readable],
        render_kw={"autocomplete": "off"},
    )


class UserSearchForm(SearchForm):
    status = SelectField(
        "Status",
        choices=[
            SelectChoice("", "Any status"),
            SelectChoice("active", "Active"),
            SelectChoice("passive", "Passive"),
        ],
        validators=[Optional()],
    )


# ---- Keyset pages: as fast at the millionth row as at the first, without a count


class Page(NamedTuple):
    """The rows of a page, and the `?after=` of the next page, if there is one."""

    rows: Sequence[Any]
    following: int | str | None


NOTHING = Page([], None)


def newest_first(query: Select[Any], column: InstrumentedAttribute[int]) -> Page:
    """Return the page that the address names. An invalid address is the first page."""
    start = request.args.get("after", type=row_id)
    if start:
        query = query.where(column < start)
    # One extra row shows that there is a next page.
    rows = db.session.scalars(query.order_by(column.desc()).limit(PAGE_SIZE + 1)).all()
    shown = rows[:PAGE_SIZE]
    return Page(shown, shown[-1].id if len(rows) > PAGE_SIZE else None)


def row_id(text: str) -> int:
    number = int(text)
    if not 1 <= number <= MAX_ID:
        raise ValueError(f"{number} cannot be an id")
    return number


# ---- The home page


@pages.get("/")
def home() -> ResponseReturnValue:
    return render_template("home.html")


# ---- The account


@account.route("/register", methods=["GET", "POST"])
def register_user() -> ResponseReturnValue:
    form = RegisterForm()
    if form.validate_on_submit():
        create_user(form)
        flash(
            "Thank you! If this e-mail had no account yet, it has one now: please log in. We also sent a mail.", "info"
        )
        return redirect(url_for("account.login", next=request.args.get("next")))
    return render_template("register.html", form=form)


def create_user(form: RegisterForm) -> None:
    """Add the user, and enqueue a mail. Only the mail shows whether the e-mail had an account.

    The response and its time do not show it: both cases run the same statements and commit a message.
    """
    user_id, is_new = svcs.flask.get(UserRepository).add(form.name.data, form.email.data, form.password.data)
    current_workers.enqueue("mail", {"welcome" if is_new else "registered again": user_id})
    db.session.commit()


@account.route("/login", methods=["GET", "POST"])
def login() -> ResponseReturnValue:
    if current_user.is_authenticated:
        return redirect(next_page())
    form = LoginForm()
    if form.validate_on_submit():
        users, user = svcs.flask.get(UserRepository), user_with(form.email.data, form.password.data)
        if user is not None and users.record_login(user.id, datetime.now(UTC), user.password_hash):
            if user.has_renewable_password:
                users.replace_password(user, form.password.data)
            session.clear()  # another person may have begun this session, and know its token
            login_user(user)  # before the commit, after which another request may change the password
            db.session.commit()
            return redirect(next_page())
        form.password.errors = ["Wrong e-mail or password."]
    return render_template("login.html", form=form)


def user_with(email: str, password: str) -> User | None:
    """Return the user of this e-mail and password. An unknown e-mail takes as long as a wrong password."""
    user = svcs.flask.get(UserRepository).by_email(email) or User(password_hash="")
    return user if user.check_password(password) else None


def next_page() -> str:
    """Return the visitor's target if it is a page of ours, otherwise the home page."""
    target = request.args.get("next", "")
    return target if is_own_path(target) else url_for("pages.home")


@account.post("/logout")
def logout() -> ResponseReturnValue:
    logout_user()
    session.clear()
    flash("You have been logged out.", "info")
    return redirect(url_for("pages.home"))


@account.route("/account", methods=["GET", "POST"])
@login_required
def profile() -> ResponseReturnValue:
    form = NameForm(obj=current_user)
    if form.validate_on_submit():
        current_user.name = form.name.data
        db.session.commit()
        flash("Your name has been changed.", "success")
        return redirect(url_for("account.profile"))
    return render_template("account.html", form=form)


@account.route("/account/password", methods=["GET", "POST"])
@login_required
def change_password() -> ResponseReturnValue:
    form = ChangePasswordForm()
    if form.validate_on_submit():
        if replace_own_password(form):
            flash("Your password has been changed. You have been logged out everywhere else.", "success")
            return redirect(url_for("account.profile"))
        form.current.errors = ["This is not your current password."]
    return render_template("password.html", form=form)


def replace_own_password(form: ChangePasswordForm) -> bool:
    """Replace the password and keep this session. Return False if the current password is wrong."""
    user = db.session.get_one(User, current_user.id)
    if not user.check_password(form.current.data):
        return False
    changed = svcs.flask.get(UserRepository).replace_password(user, form.password.data)
    db.session.commit()
    if changed:
        login_user(user)
    return changed


@account.route("/account/reset/<token>", methods=["GET", "POST"])
def reset_password(token: str) -> ResponseReturnValue:
    """Show the page of a password link. Opening it (as mail scanners do) does not use it up."""
    users = svcs.flask.get(UserRepository)
    user, form = users.by_password_token(token), NewPasswordForm()
    if user is not None and form.validate_on_submit():
        if users.replace_password(user, form.password.data):
            db.session.commit()
            flash("Your password has been changed. Please log in.", "success")
            return redirect(url_for("account.login"))
        user = None  # another request has just used the link
    return render_template("reset.html", user=user, form=form), 200 if user else 404


# ---- The admin's pages


@admin.before_request
def admins_only() -> ResponseReturnValue | None:
    """Let only admins pass, and record each change before it is done. Any blueprint may use this function."""
    if not current_user.is_authenticated:
        return cast(Response, login_manager.unauthorized())
    if not current_user.is_admin:
        abort(403)
    if request.method not in ("GET", "HEAD", "OPTIONS"):
        write_audit()
    return None


MOST_FIELDS = 20  # of a form, in an audit entry
LONGEST_FIELD = 200


def write_audit() -> None:
    """Write the audit entry of this request and commit it, so that a failing attempt is recorded too."""
    fields = [(name, value) for name, value in request.form.items() if not is_secret(name)]
    details = {name[:LONGEST_FIELD]: value[:LONGEST_FIELD] for name, value in fields[:MOST_FIELDS]}
    if (more := len(fields) - MOST_FIELDS) > 0:
        details["..."] = f"{more} more fields"
    # Last, so that a field of a form cannot replace a part of the address.
    details |= {name: str(value)[:LONGEST_FIELD] for name, value in (request.view_args or {}).items()}
    entry = AuditEntry(
        user_id=current_user.id,
        action=str(request.endpoint)[:100],
        details=json.dumps(details),
        address=(request.remote_addr or "")[:45],
    )
    db.session.add(entry)
    db.session.commit()


def is_secret(name: str) -> bool:
    return any(part in name.lower() for part in ("password", "token", "secret", "repeated"))


@admin.get("/users")
def users() -> ResponseReturnValue:
    form = UserSearchForm(request.args)
    page = find_users(form) if form.validate() else NOTHING
    search = {name: value for name, value in form.data.items() if value}
    return render_template("users.html", form=form, page=page, search=search)


def find_users(form: UserSearchForm) -> Page:
    """Return the users whose e-mail or name begins with the searched text."""
    found = svcs.flask.get(UserRepository).search(
        form.status.data or None, form.q.data or "", request.args.get("after"), PAGE_SIZE
    )
    return Page(found.users, found.after)


@admin.post("/users/<id:user_id>/password-link")
def send_password_link(user_id: int) -> ResponseReturnValue:
    """Enqueue a mail with a link to choose a password. Only the mail worker makes the link."""
    user = db.get_or_404(User, user_id)
    current_workers.enqueue("mail", {"password link": user.id, "root": request.url_root})
    db.session.commit()
    flash(f"A password link is on its way to {user.email}. It is valid for one hour.", "success")
    return back_to_users()


@admin.post("/users/<id:user_id>/make-admin")
def make_admin(user_id: int) -> ResponseReturnValue:
    user = db.get_or_404(User, user_id)
    changed = svcs.flask.get(UserRepository).make_admin(user_id)
    db.session.commit()
    flash(f"{user.email} is an admin{'' if changed else ' already'}.", "success" if changed else "info")
    return back_to_users()


@admin.post("/users/<id:user_id>/unmake-admin")
def unmake_admin(user_id: int) -> ResponseReturnValue:
    user = db.get_or_404(User, user_id)
    changed = svcs.flask.get(UserRepository).unmake_admin(user_id)
    db.session.commit()
    if changed:
        flash(f"{user.email} is no longer an admin.", "success")
    else:
        flash(
            f"{user.email} is the last admin, or is not an admin: nothing was changed. Make another admin first.",
            "warning",
        )
    return back_to_users()


def back_to_users() -> Response:
    """Redirect to the page of the button."""
    search = {name: request.args[name] for name in ("q", "status", "after") if name in request.args}
    return redirect(url_for("admin.users", **search))  # type: ignore[arg-type]


@admin.get("/audit")
def audit() -> ResponseReturnValue:
    page = newest_first(select(AuditEntry).options(joinedload(AuditEntry.user)), AuditEntry.id)
    return render_template("audit.html", page=page)


# ---- Errors

ERROR_SENTENCES = {
    400: "This page cannot read the request of the browser. Please go back, reload and try again.",
    403: "You may not see this page. If you need access, ask an administrator.",
    404: "There is no such page. It may have moved, or the address may be mistyped.",
    405: "This page does not accept this kind of request.",
    413: "The request is larger than this page accepts.",
    503: "The shop's database does not answer at the moment. Please try again in a few seconds.",
    500: "Something went wrong on our side, and the error is in the log. Please try again in a moment.",
}


SENT_BY_HTTP = (
    "A form came without its session by plain HTTP, where SESSION_COOKIE_SECURE withholds the session. "
    "Behind a proxy that speaks HTTPS set PROXIES=1, and for plain HTTP set SESSION_COOKIE_SECURE=false"
)
NEEDS_HTTPS = "This shop needs HTTPS, and this page came without it. Please try https://."


def show_error(error: HTTPException) -> Response:
    """Answer with the error as a page or, below /api, as JSON. Keep the error's own headers."""
    if isinstance(error, RateLimitExceeded):
        throttle.explain(error)
    response = error.get_response()
    sentence = ERROR_SENTENCES.get(error.code or 500, error.description)
    if isinstance(error, CSRFError) and current_app.config["SESSION_COOKIE_SECURE"] and not request.is_secure:
        sentence = NEEDS_HTTPS
        current_app.logger.warning(SENT_BY_HTTP)
    if request.path.startswith(f"{JSON}/"):
        response.data = jsonify(error=error.name, message=error.description).data
        response.content_type = "application/json"
    else:
        response.data = render_template("error.html", error=error, sentence=sentence)
        response.content_type = "text/html; charset=utf-8"
    return response
