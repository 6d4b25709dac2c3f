"""Access to every route, for a stranger, a customer, a viewer and an admin."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import func, select
from support.databases import on_sqlite
from werkzeug.routing import Rule

from background.database.tables import messages
from models import AuditEntry, User, db

try:
    from tests.books import rows as books
except ImportError:  # an application without the shop
    books = None  # type: ignore[assignment]

# A route that is missing here fails these tests. Every route of the admins' blueprints is for admins only. Viewers see
# the pages of the workers.
ANYBODYS = {
    *("static", "bootstrap.static", "background.static", "health.live", "health.ready", "health.fleet_health"),
    "metrics.scrape",
    "pages.home",
    *("security.register", "security.login", "security.logout", "security.forgot_password", "security.reset_password"),
    *("security.send_confirmation", "security.confirm_email", "security.two_factor_setup", "security.tf_select"),
    *("security.two_factor_token_validation", "security.two_factor_rescue"),  # a half login opens them
}
CUSTOMERS = {"account.profile", "account.delete", "security.change_password", "security.verify"}
CUSTOMERS |= {"security.two_factor_setup_validate"}
if books:
    ANYBODYS |= books.EVERYONES
    CUSTOMERS |= books.CUSTOMERS
ADMINS_BLUEPRINTS = {"admin", "background"}

ENDS_SESSIONS = {"/logout", "/admin/users/1/log-out"}
ONLY_READ = {"GET", "HEAD", "OPTIONS"}
Make = Callable[..., Any]


@pytest.fixture
def app(app: Flask, make_user: Make) -> Flask:
    """Give the app with rows: a book, and users whose ids are 1 to 3, so that the routes find their rows."""
    if books:
        with app.app_context():
            books.add_book()
            db.session.commit()
    make_user(email="reader@example.com")
    make_user(email="admin@example.com", is_admin=True)
    make_user(email="viewer@example.com", is_viewer=True)
    return app


@pytest.fixture
def clients(app: Flask) -> dict[str, FlaskClient]:
    """Give the clients of a stranger, a customer, a viewer and an admin."""
    clients = {name: app.test_client() for name in ("stranger", "customer", "viewer", "admin")}
    for name, user_id in (("customer", 1), ("admin", 2), ("viewer", 3)):
        with app.app_context():
            known_as = db.session.get_one(User, user_id).get_id()
        with clients[name].session_transaction() as session:
            session.update(_user_id=known_as, fs_paa=time.time())
    return clients


def whose(endpoint: str, method: str) -> str:
    if endpoint in ANYBODYS:
        return "everyone's"
    if endpoint in CUSTOMERS:
        return "customers'"
    assert endpoint.split(".")[0] in ADMINS_BLUEPRINTS, f"The route {endpoint} is missing in this file."
    return "viewers'" if endpoint.startswith("background.") and method in ONLY_READ else "admins'"


def routes(app: Flask) -> Iterator[tuple[str, str, str]]:
    """Return method, path and owner of every route."""
    adapter = app.url_map.bind("localhost")
    for rule in app.url_map.iter_rules():
        path = adapter.build(rule.endpoint, sample(rule))
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            yield method, path, whose(rule.endpoint, method)


def sample(rule: Rule) -> dict[str, Any]:
    given = {"filename": "style.css", "name": "passive_user_checker_worker", "token": "x"}
    return {argument: given.get(argument, 1) for argument in rule.arguments}


def verdict(client: FlaskClient, method: str, path: str) -> str:
    """Return the kind of response: log in first, not allowed, or anything else."""
    response = client.open(path, method=method, buffered=True)
    if response.status_code == 302 and response.location.startswith("/login?next="):
        return "log in"
    return "for others" if response.status_code == 403 else "welcome"


@on_sqlite
@pytest.mark.parametrize(
    ("visitor", "verdicts"),
    [
        ("stranger", ["welcome", "log in", "log in", "log in"]),
        ("customer", ["welcome", "welcome", "for others", "for others"]),
        ("viewer", ["welcome", "welcome", "welcome", "for others"]),
        ("admin", ["welcome", "welcome", "welcome", "welcome"]),
    ],
)
def test_every_route_is_open_to_the_right_visitors_only(
    app: Flask, clients: dict[str, FlaskClient], visitor: str, verdicts: list[str]
) -> None:
    asked = list(routes(app))
    expected = dict(zip(("everyone's", "customers'", "viewers'", "admins'"), verdicts, strict=True))
    assert {owner for *_, owner in asked} == set(expected)
    for method, path, owner in asked:
        if path not in ENDS_SESSIONS:
            assert verdict(clients[visitor], method, path) == expected[owner], f"{method} {path}"
    if visitor != "admin":
        assert traces(app) == [0, 0, 1]


@on_sqlite
def test_no_visitor_changes_anything_without_a_token(app: Flask, clients: dict[str, FlaskClient]) -> None:
    app.config["WTF_CSRF_ENABLED"] = True
    changing = [(method, path) for method, path, _ in routes(app) if method not in ONLY_READ]
    assert len(changing) >= 9
    for method, path in changing:
        for visitor, client in clients.items():
            response = client.open(path, method=method, data={"quantity": "1", "name": "Nat"})
            assert response.status_code == 400, f"{visitor}: {method} {path}"
            assert "Please go back, reload and try again." in response.text
    assert traces(app) == [0, 0, 1]


def traces(app: Flask) -> list[int | None]:
    """Count the messages, audit entries and admins."""
    counted = (
        select(func.count()).select_from(messages),
        select(func.count(AuditEntry.id)),
        select(func.count(User.id)).where(User.is_admin),
    )
    with app.app_context():
        return [db.session.scalar(each) for each in counted]


@on_sqlite
def test_an_admins_route_refuses_every_method_before_its_view(clients: dict[str, FlaskClient]) -> None:
    for method in ("GET", "HEAD", "OPTIONS"):
        assert clients["stranger"].open("/admin/users", method=method).status_code == 302
        assert clients["customer"].open("/admin/users", method=method).status_code == 403
