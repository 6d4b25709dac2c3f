"""The application's own pages and JSON."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime
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
from flask_login import current_user
from flask_wtf import CSRFProtect
from flask_wtf.csrf import CSRFError
from sqlalchemy import Select, or_, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import InstrumentedAttribute, joinedload
from werkzeug.exceptions import BadHost, HTTPException, SecurityError, ServiceUnavailable
from werkzeug.routing import IntegerConverter, Map
from werkzeug.wrappers import Response
from wtforms import DateField, HiddenField, SearchField, SelectChoice, SelectField
from wtforms.validators import Length, Optional

import accounts
import audit
import security_log
import sessions
import throttle
from background import current_workers
from background.dashboard import dashboard
from background.errors import InvalidSchedule
from background.history.text import moment_in
from background.monitoring.unavailable import unavailable
from forms import SearchForm, readable, strip
from hosts import root_of_links
from models import AuditEntry, User, UserRepository, db

PAGE_SIZE = 20
MAX_BODY = 500_000  # bytes, far more than a form of ours needs
JSON = "/api"  # the prefix of the addresses that answer with JSON
MAX_ID = 2**31 - 1  # the largest INTEGER of a column

pages = Blueprint("pages", __name__)
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


def register(app: Flask) -> None:
    """Give the app its pages: extensions, template helpers, blueprints and error pages."""
    app.config.setdefault("BOOTSTRAP_SERVE_LOCAL", True)
    app.config["MAX_CONTENT_LENGTH"] = app.config["MAX_CONTENT_LENGTH"] or MAX_BODY
    Bootstrap5(app)
    csrf.init_app(app)
    accounts.register(app)
    # As a global, not by a context processor, current_user costs a query only in a template that names it. So the error
    # page works without the database.
    app.jinja_env.globals["current_user"] = current_user
    app.jinja_env.globals["navigation"] = app.extensions["navigation"] = Navigation([], [])
    app.jinja_env.filters.update(moment=moment)
    app.url_map.converters["id"] = IdConverter
    workers = dashboard(viewers_too, may_change=lambda: current_user.is_admin, user=lambda: current_user.email)
    for blueprint in (pages, admin, workers):
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


def set_headers(response: Response) -> Response:
    """Add the headers of every response. A cache must not keep a page that was made for one visitor."""
    response.headers.update(HEADERS)
    if request.is_secure:
        response.headers["Strict-Transport-Security"] = "max-age=31536000"
    if not (request.endpoint or "").endswith("static") and session:
        response.headers["Cache-Control"] = "no-store"
    return response


def moment(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


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


class AuditSearchForm(SearchForm):
    action = SearchField("Action", filters=[strip], validators=[Optional(), Length(max=100), readable])
    since = DateField("Since", validators=[Optional()])
    zone = HiddenField("Zone")  # the browser's. Empty without its script


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


# ---- The admin's pages


@admin.before_request
def admins_only() -> ResponseReturnValue | None:
    """Let only admins pass. A change needs a recent login, and is recorded first. Any blueprint may use this."""
    return stop_unless(lambda user: user.is_admin)


def viewers_too() -> ResponseReturnValue | None:
    """Let admins and viewers pass. The dashboard refuses a viewer's changes. Each page of the shop uses its script."""
    if request.endpoint == "background.static":
        return None
    return stop_unless(lambda user: user.sees_workers)


def stop_unless(may_pass: Callable[[User], bool]) -> ResponseReturnValue | None:
    if not current_user.is_authenticated:
        return cast(Response, current_app.login_manager.unauthorized())  # type: ignore[attr-defined]
    if not may_pass(current_user):
        abort(403)
    if current_user.is_admin and request.method not in audit.READING:
        if (question := recent_login()) is not None:
            return cast(Response, question)
        audit.begin_request()
    return None


@sessions.needs_recent_login
def recent_login() -> None:
    """Let a session with a recent login pass. Else the decorator redirects to the page that asks for the password."""


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
    current_workers.enqueue("mail", {"password link": user.id, "root": root_of_links()})
    db.session.commit()
    security_log.record("link asked", user_id, by=current_user.id)
    flash(f"A password reset link is on its way to {user.email}. It is valid for one hour.", "success")
    return back_to_users()


@admin.post("/users/<id:user_id>/make-admin")
def make_admin(user_id: int) -> ResponseReturnValue:
    user = db.get_or_404(User, user_id)
    changed = svcs.flask.get(UserRepository).make_admin(user_id)
    if changed:
        current_workers.enqueue("mail", {"admin link": user.id, "root": root_of_links()})
    db.session.commit()
    if changed:
        security_log.record("right given", user_id, by=current_user.id)
        flash(f"{user.email} is an admin now. We have sent a mail with a link to choose a new password.", "success")
    elif user.is_admin:
        flash(f"{user.email} is an admin already.", "info")
    else:
        flash(f"{user.email} is disabled or has not confirmed the e-mail: nothing was changed.", "warning")
    return back_to_users()


@admin.post("/users/<id:user_id>/unmake-admin")
def unmake_admin(user_id: int) -> ResponseReturnValue:
    done, not_done = (
        "is no longer an admin.",
        "is the last admin, or is not an admin: nothing was changed. Make another admin first.",
    )
    return change_user(user_id, UserRepository.unmake_admin, done, not_done, "right taken")


@admin.post("/users/<id:user_id>/make-viewer")
def make_viewer(user_id: int) -> ResponseReturnValue:
    done = "sees the workers' pages now, after the next login."
    not_done = "sees them already, is disabled, or has not confirmed the e-mail: nothing was changed."
    return change_user(user_id, UserRepository.make_viewer, done, not_done, "right given")


@admin.post("/users/<id:user_id>/unmake-viewer")
def unmake_viewer(user_id: int) -> ResponseReturnValue:
    done, not_done = "no longer sees the workers' pages.", "is not a viewer: nothing was changed."
    return change_user(user_id, UserRepository.unmake_viewer, done, not_done, "right taken")


@admin.post("/users/<id:user_id>/log-out")
def log_out(user_id: int) -> ResponseReturnValue:
    return change_user(user_id, UserRepository.end_sessions, "has been logged out everywhere.", "is gone.")


@admin.post("/users/<id:user_id>/disable")
def disable(user_id: int) -> ResponseReturnValue:
    done = "is logged out, and cannot log in again until an admin enables the account."
    not_done = "is disabled already, or is an admin: nothing was changed. Remove the admin rights first."
    return change_user(user_id, UserRepository.disable, done, not_done)


@admin.post("/users/<id:user_id>/enable")
def enable(user_id: int) -> ResponseReturnValue:
    not_done = "is enabled already, or has deleted the account: nothing was changed."
    return change_user(user_id, UserRepository.enable, "can log in again.", not_done)


def change_user(
    user_id: int, change: Callable[[UserRepository, int], bool], done: str, not_done: str, event: str | None = None
) -> ResponseReturnValue:
    user = db.get_or_404(User, user_id)
    changed = change(svcs.flask.get(UserRepository), user_id)
    db.session.commit()
    if changed and event:
        security_log.record(event, user_id, by=current_user.id)
    flash(f"{user.email} {done if changed else not_done}", "success" if changed else "warning")
    return back_to_users()


def back_to_users() -> Response:
    """Redirect to the page of the button."""
    search = {name: request.args[name] for name in ("q", "status", "after") if name in request.args}
    return redirect(url_for("admin.users", **search))  # type: ignore[arg-type]


@admin.get("/audit", endpoint="audit")
def show_audit() -> ResponseReturnValue:
    form = AuditSearchForm(request.args)
    page = find_entries(form) if form.validate() else NOTHING
    search = {name: value for name, value in form.data.items() if value}
    return render_template("audit.html", form=form, page=page, search=search)


def find_entries(form: AuditSearchForm) -> Page:
    """Return the entries of the user or operator, of the action, and since the day that the form names."""
    query = select(AuditEntry).options(joinedload(AuditEntry.user)).outerjoin(AuditEntry.user)
    if who := form.q.data:
        by_user = User.email.startswith(who.lower(), autoescape=True)
        query = query.where(or_(by_user, AuditEntry.operator.startswith(who, autoescape=True)))
    if action := form.action.data:
        query = query.where(AuditEntry.action.contains(action, autoescape=True))
    if since := form.since.data:
        query = query.where(AuditEntry.at >= beginning(since, form.zone.data or "UTC"))
    return newest_first(query, AuditEntry.id)


def beginning(day: date, zone: str) -> datetime:
    """Return the beginning of the day in that zone. In UTC, if the zone is unknown or the year is far away."""
    with suppress(ValueError, InvalidSchedule):
        return moment_in(day.isoformat(), zone)
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


# ---- Errors

ERROR_SENTENCES = {
    400: "This page cannot read the request of the browser. Please go back, reload and try again.",
    403: "You may not see or change this page. If you need access, ask an administrator.",
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


def show_error(error: HTTPException) -> ResponseReturnValue:
    """Answer with the error as a page or, below /api, as JSON. If the database is away, answer with that error."""
    try:
        return error_page(error)
    except SQLAlchemyError as failure:  # the page names the user, and reads the user's row
        if isinstance(error, ServiceUnavailable):
            raise
        return unavailable(failure)


def error_page(error: HTTPException) -> Response:
    """Return the error as a page or, below /api, as JSON. Keep the error's own headers."""
    security_log.refused(error)
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
