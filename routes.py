"""The app's own pages and JSON."""

import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import svcs
from flask import Blueprint, Flask, abort, flash, jsonify, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_bootstrap import Bootstrap5
from flask_login import LoginManager, current_user, login_required, login_user, logout_user
from flask_wtf import CSRFProtect, FlaskForm
from sqlalchemy import Select, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import InstrumentedAttribute, joinedload
from werkzeug.datastructures import MultiDict
from werkzeug.exceptions import HTTPException
from werkzeug.routing import IntegerConverter, Map
from werkzeug.wrappers import Response
from wtforms import (
    EmailField,
    Form,
    IntegerField,
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
    NumberRange,
    Optional,
    ValidationError,
)

from background import current_workers
from background.dashboard import dashboard
from models import Book, Order, OrderRepository, User, UserRepository, db

PAGE_SIZE = 20
MAX_BODY = 500_000  # bytes; no form of ours comes near
MAX_ID = 2**31 - 1  # what an INTEGER column holds

shop = Blueprint("shop", __name__)
account = Blueprint("account", __name__)
admin = Blueprint("admin", __name__, url_prefix="/admin")
api = Blueprint("api", __name__, url_prefix="/api")

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
    # A global, not a context processor: only a template that names current_user costs a query, so the
    # error page still works when the database does not.
    app.jinja_env.globals["current_user"] = current_user
    app.jinja_env.filters.update(money=money, moment=moment)
    app.url_map.converters["id"] = IdConverter
    for blueprint in (shop, account, admin, api, dashboard(admins_only)):
        app.register_blueprint(blueprint)
    app.register_error_handler(HTTPException, show_error)


class IdConverter(IntegerConverter):
    """`<id:book_id>` in a rule: a number that an id can be."""

    def __init__(self, map: Map) -> None:
        super().__init__(map, min=1, max=MAX_ID)


@login_manager.user_loader
def load_user(user_id: str) -> User | None:
    is_an_id = user_id.isdecimal() and len(user_id) <= 18  # a cookie may be of another application with our key
    return svcs.flask.get(UserRepository).get(int(user_id)) if is_an_id else None


def money(cents: int) -> str:
    return f"€{cents // 100:,}.{cents % 100:02d}"


def moment(at: datetime) -> str:
    return f"{at:%d %b %Y, %H:%M} UTC"


# ---- Forms: whatever they let through, both databases can store


def strip(text: str | None) -> str | None:
    return text.strip() if text else text


def lower(text: str | None) -> str | None:
    return text.lower() if text else text


def no_control_characters(_form: Form, field: FormField) -> None:
    """PostgreSQL refuses NUL in a text, and no other control character belongs in one line either."""
    if any(unicodedata.category(character) == "Cc" for character in field.data or ""):
        raise ValidationError("Please leave out control characters.")


class PostedForm(FlaskForm):
    """Reads what a browser's form sends; Flask-WTF would take an uploaded file, or JSON, for the text of a field."""

    class Meta(FlaskForm.Meta):
        def wrap_formdata(self, form: Form, formdata: Any) -> Any:
            return formdata if isinstance(formdata, MultiDict) else request.form or None


class NameForm(PostedForm):
    name = StringField(
        "Name",
        filters=[strip],
        validators=[DataRequired(), Length(max=120), no_control_characters],
        render_kw={"autocomplete": "name"},
    )


class RegisterForm(NameForm):
    email = EmailField(
        "E-mail",
        filters=[strip, lower],
        validators=[DataRequired(), Length(max=254), no_control_characters, Email()],
        render_kw={"autocomplete": "email"},
    )
    password = PasswordField(
        "Password",
        description="At least 8 characters.",
        validators=[InputRequired(), Length(min=8, max=128)],
        render_kw={"autocomplete": "new-password"},
    )
    repeated = PasswordField(
        "Password again",
        validators=[InputRequired(), EqualTo("password", "The two passwords differ.")],
        render_kw={"autocomplete": "new-password"},
    )


class LoginForm(PostedForm):
    email = EmailField(
        "E-mail",
        filters=[strip, lower],
        validators=[DataRequired(), Length(max=254), no_control_characters],
        render_kw={"autocomplete": "username"},
    )
    password = PasswordField(
        "Password",
        validators=[InputRequired(), Length(max=128)],
        render_kw={"autocomplete": "current-password"},
    )


class OrderForm(PostedForm):
    quantity = IntegerField(
        "Quantity",
        default=1,
        validators=[InputRequired(), NumberRange(min=1, max=100)],
        render_kw={"inputmode": "numeric"},
    )


class SearchForm(FlaskForm):
    """A form that only reads, so it comes by GET and needs no token."""

    class Meta:
        csrf = False

    q = SearchField(
        "Search",
        filters=[strip],
        validators=[Optional(), Length(max=100), no_control_characters],
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


# ---- Keyset pages: as fast at the millionth row as at the first, and nothing is counted


class Page(NamedTuple):
    """The rows to show, and what the next page's address says after `?after=`, when there are more."""

    rows: Sequence[Any]
    following: int | str | None


NOTHING = Page([], None)


def newest_first(query: Select[Any], column: InstrumentedAttribute[int]) -> Page:
    """The page of the query that the address asks for; nonsense in the address is the first page."""
    start = request.args.get("after", type=row_id)
    if start:
        query = query.where(column < start)
    # One row more than is shown says that there are more.
    rows = db.session.scalars(query.order_by(column.desc()).limit(PAGE_SIZE + 1)).all()
    shown = rows[:PAGE_SIZE]
    return Page(shown, shown[-1].id if len(rows) > PAGE_SIZE else None)


def row_id(text: str) -> int:
    number = int(text)
    if not 1 <= number <= MAX_ID:
        raise ValueError(f"{number} is no id")
    return number


# ---- The shop


@shop.get("/")
def home() -> ResponseReturnValue:
    return render_template("home.html")


@shop.get("/books")
def catalogue() -> ResponseReturnValue:
    form = SearchForm(request.args)
    page = find_books(form.q.data) if form.validate() else NOTHING
    return render_template("catalogue.html", form=form, page=page)


def find_books(text: str | None) -> Page:
    """The books whose title or author contains `text`."""
    query = select(Book)
    if text:
        query = query.where(
            or_(Book.title.icontains(text, autoescape=True), Book.author.icontains(text, autoescape=True))
        )
    return newest_first(query, Book.id)


@shop.get("/books/<id:book_id>")
def book(book_id: int) -> ResponseReturnValue:
    return book_page(book_id, OrderForm())


# The order is posted to the book's own address, so that logging in first leads back to the book.
@shop.post("/books/<id:book_id>")
@login_required
def order(book_id: int) -> ResponseReturnValue:
    form = OrderForm()
    if not form.validate():
        return book_page(book_id, form)
    if not place_order(current_user.id, book_id, form.quantity.data):
        return book_page(book_id, form, too_few=True)
    flash("Thank you, your order is placed. We will confirm it by e-mail.", "success")
    return redirect(url_for("shop.orders"))


def book_page(book_id: int, form: OrderForm, too_few: bool = False) -> ResponseReturnValue:
    book = db.get_or_404(Book, book_id)
    if too_few:
        form.quantity.errors = [not_enough(book)]
    return render_template("book.html", book=book, form=form)


def not_enough(book: Book) -> str:
    if book.stock:
        return f"Only {book.stock} left: please order fewer."
    return "Sorry, this book has just been sold out."


def place_order(user_id: int, book_id: int, quantity: int) -> bool:
    """Write the order, and the message that has it settled: both or neither. False: there are too few already."""
    order_id = svcs.flask.get(OrderRepository).place(user_id, book_id, quantity)
    if order_id is None:
        return False
    current_workers.enqueue("orders", {"order": order_id})
    db.session.commit()
    return True


@shop.get("/orders")
@login_required
def orders() -> ResponseReturnValue:
    own = select(Order).where(Order.user_id == current_user.id).options(joinedload(Order.book))
    return render_template("orders.html", page=newest_first(own, Order.id))


# ---- The account


@account.route("/register", methods=["GET", "POST"])
def register_user() -> ResponseReturnValue:
    form = RegisterForm()
    if form.validate_on_submit() and create_user(form):
        flash("Welcome! Your account is ready: please log in.", "success")
        return redirect(url_for("account.login", next=request.args.get("next")))
    return render_template("register.html", form=form)


def create_user(form: RegisterForm) -> bool:
    """Nothing asks first whether the e-mail is free: somebody else may take it before the answer is there."""
    user = User(name=form.name.data, email=form.email.data)
    user.set_password(form.password.data)
    db.session.add(user)
    try:
        db.session.commit()
    except IntegrityError:
        db.session.rollback()
        form.email.errors = ["There is already an account with this e-mail."]
        return False
    return True


@account.route("/login", methods=["GET", "POST"])
def login() -> ResponseReturnValue:
    if current_user.is_authenticated:
        return redirect(next_page())
    form = LoginForm()
    if form.validate_on_submit():
        if user := user_with(form.email.data, form.password.data):
            svcs.flask.get(UserRepository).record_login(user.id, datetime.now(UTC))
            db.session.commit()
            login_user(user)
            return redirect(next_page())
        form.password.errors = ["This e-mail and this password do not belong together."]
    return render_template("login.html", form=form)


def user_with(email: str, password: str) -> User | None:
    """The user of this e-mail and password; refusing an unknown e-mail takes as long as a wrong password."""
    user = svcs.flask.get(UserRepository).by_email(email)
    if user is None:
        User().set_password(password)
        return None
    return user if user.check_password(password) else None


def next_page() -> str:
    """Where the visitor wanted to go, if that is a page of ours, or else home."""
    target = request.args.get("next", "")
    return target if is_own_path(target) else url_for("shop.home")


def is_own_path(target: str) -> bool:
    """A path on this host. To a browser `//host` and `/\\host` are other hosts, and a tab is not there."""
    ours = target.startswith("/") and not target.startswith("//") and "\\" not in target
    return ours and target.isprintable()


@account.post("/logout")
def logout() -> ResponseReturnValue:
    logout_user()
    flash("You are logged out.", "info")
    return redirect(url_for("shop.home"))


@account.route("/account", methods=["GET", "POST"])
@login_required
def profile() -> ResponseReturnValue:
    form = NameForm(obj=current_user)
    if form.validate_on_submit():
        current_user.name = form.name.data
        db.session.commit()
        flash("Your name is changed.", "success")
        return redirect(url_for("account.profile"))
    return render_template("account.html", form=form)


# ---- The admin's pages


@admin.before_request
@login_required
def admins_only() -> None:
    if not getattr(current_user, "is_admin", False):  # login_required lets an OPTIONS by, whoever asks
        abort(403)


@admin.get("/users")
def users() -> ResponseReturnValue:
    form = UserSearchForm(request.args)
    page = find_users(form) if form.validate() else NOTHING
    here = {name: value for name, value in form.data.items() if value}
    return render_template("users.html", form=form, page=page, here=here)


def find_users(form: UserSearchForm) -> Page:
    """The users whose e-mail or name begins with what was searched for."""
    found = svcs.flask.get(UserRepository).search(
        form.status.data or None, form.q.data or "", request.args.get("after"), PAGE_SIZE
    )
    return Page(found.users, found.after)


# ---- JSON


@api.get("/books")
def books_json() -> ResponseReturnValue:
    form = SearchForm(request.args)
    if not form.validate():
        abort(400, f"q: {form.q.errors[0]}")
    page = find_books(form.q.data)
    following = page.following and url_for("api.books_json", q=form.q.data, after=page.following)
    return jsonify(books=[book_as_json(book) for book in page.rows], next=following)


@api.get("/books/<id:book_id>")
def book_json(book_id: int) -> ResponseReturnValue:
    return jsonify(book_as_json(db.get_or_404(Book, book_id)))


def book_as_json(book: Book) -> dict[str, Any]:
    names = ("id", "title", "author", "isbn", "description", "price_cents", "stock")
    return {name: getattr(book, name) for name in names}


# ---- Errors

ERROR_SENTENCES = {
    400: "This page does not understand what the browser sent. Please go back, reload and try again.",
    403: "This page is for others. If it should be for you, ask an administrator.",
    404: "There is no such page. It may have moved, or the address has a slip in it.",
    405: "This page cannot be asked for in that way.",
    413: "That was more than this page takes.",
    500: "Something went wrong on our side. It is in the log; please try again in a moment.",
}


def show_error(error: HTTPException) -> Response:
    """The error as a page or, below /api, as JSON, with the error's own headers."""
    response = error.get_response()
    if request.path.startswith(f"{api.url_prefix}/"):
        response.data = jsonify(error=error.name, message=error.description).data
        response.content_type = "application/json"
    else:
        sentence = ERROR_SENTENCES.get(error.code or 500, error.description)
        response.data = render_template("error.html", error=error, sentence=sentence)
        response.content_type = "text/html; charset=utf-8"
    return response
