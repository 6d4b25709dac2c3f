"""The dashboard in another application: it protects itself, and the start names a missing package."""

import logging
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from flask import Flask
from flask.testing import FlaskClient
from flask_sqlalchemy import SQLAlchemy
from flask_wtf import CSRFProtect
from sqlalchemy import create_engine
from support.processes import ROOT, environment, flask, run
from werkzeug.middleware.proxy_fix import ProxyFix

from background import BackgroundWorkerManager, InvalidConfig, MessageWorker, MissingDependency, PeriodicWorker
from background.dashboard import dashboard
from background.database.opening import refuse_driver
from background.host.dependencies import require

PAUSE, RESUME = ("/workers/worker/noting/pause", "/workers/worker/noting/resume")
PAGES = ("/workers/", "/workers/timeline", "/workers/instances", "/workers/messages", "/workers/worker/noting")


class Noting(PeriodicWorker):
    period = timedelta(days=300)

    def do_work(self, context):
        pass


class Taking(MessageWorker):
    topic = "notes"

    def handle(self, message, context):
        raise ZeroDivisionError("it never works")


@pytest.fixture
def make_host(tmp_path) -> Iterator[Callable[..., Flask]]:
    """Make an application with the engine, its dashboard and nothing else."""
    hosts: list[tuple[Flask, SQLAlchemy]] = []

    def make(prepare: Callable[[Flask], object] = lambda app: None, **config: object) -> Flask:
        app, db = Flask("host", root_path=str(tmp_path)), SQLAlchemy()
        app.config.update(SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path / 'host.sqlite'}", **config)
        prepare(app)
        db.init_app(app)
        manager = BackgroundWorkerManager(app, db)
        manager.add(Noting)
        manager.add(Taking)
        app.register_blueprint(dashboard(lambda: None))
        with app.app_context():
            db.create_all()
        manager.recovery.look(Noting)
        hosts.append((app, db))
        return app

    yield make
    for app, db in hosts:
        app.extensions["background_workers"].stop()
        with app.app_context():
            db.engine.dispose()


def is_paused(app: Flask) -> bool:
    return app.extensions["background_workers"].stores.ledger.look("noting").paused_at is not None


OWN = "http://shop.example:8000"


def pressed(app: Flask, headers: dict[str, str], base_url: str = OWN) -> bool:
    """Return whether a press of "pause" with these headers was taken. A refused one must change nothing."""
    response = app.test_client().post(PAUSE, base_url=base_url, headers=headers)
    taken = is_paused(app)
    assert response.status_code == (303 if taken else 403), response.text
    if taken:
        app.test_client().post(RESUME)
    return taken


OURS = [
    {},  # a script, curl
    {"Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "none"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "http://what-a-proxy-made-of-it"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "null"},  # a host with Referrer-Policy: no-referrer
    {"Origin": OWN},
    {"Origin": "http://SHOP.example:8000"},
    {"Origin": "https://shop.example:8000"},  # a proxy took the encryption away
    {"Referer": f"{OWN}/workers/"},
    {"Origin": OWN, "Referer": "http://evil.example/"},
]
FOREIGN = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Origin": OWN},
    {"Sec-Fetch-Site": "cross-site", "Origin": OWN, "Referer": f"{OWN}/workers/"},
    {"Sec-Fetch-Site": "something new"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "http://evil.example"},
    {"Origin": "http://shop.example"},  # the same host, another port
    {"Origin": "http://shop.example:8001"},
    {"Origin": "http://shop.example:8000.evil.example"},
    {"Origin": "http://shop.example:8000@evil.example"},
    {"Origin": "http://evil.shop.example:8000"},
    {"Origin": "http://shop.example:port"},
    {"Origin": "http://[shop.example:8000"},
    {"Origin": "file://"},
    {"Origin": "chrome-extension://shop.example:8000"},
    {"Referer": "http://evil.example/?http://shop.example:8000/workers/"},
    {"Referer": "about:blank"},
    {"Origin": "http://evil.example", "Referer": f"{OWN}/workers/"},
]


def test_a_button_on_another_sites_page_changes_nothing_with_or_without_flask_wtf(make_host, caplog) -> None:
    app = make_host()
    with caplog.at_level(logging.WARNING):
        assert [headers for headers in FOREIGN if pressed(app, headers)] == []
    assert len(caplog.messages) == len(FOREIGN)
    assert "sent with Origin 'http://evil.example'" in caplog.text
    assert [headers for headers in OURS if not pressed(app, headers)] == []


@pytest.mark.parametrize(
    "path",
    [
        "/workers/worker/noting/run",
        "/workers/worker/noting/resume",
        "/workers/worker/noting/reschedule",
        "/workers/messages/change",
        "/workers/messages/pause",
        "/workers/messages/resume",
        "/workers/messages/1/copy",
    ],
)
def test_every_button_refuses_another_sites_page(make_host, path) -> None:
    client = make_host(SECRET_KEY="x").test_client()
    response = client.post(path, headers={"Origin": "http://evil.example"}, data={"schedule": "1s", "topic": "notes"})
    assert response.status_code == 403
    assert (
        "This request came with Origin &#39;http://evil.example&#39;; expected a request of a page at" in response.text
    )


def test_links_from_another_site_are_followed(make_host) -> None:
    client = make_host().test_client()
    headers = {"Sec-Fetch-Site": "cross-site", "Referer": "http://evil.example/"}
    assert [client.get(path, headers=headers).status_code for path in PAGES] == [200] * len(PAGES)


def test_the_default_port_may_be_written_or_left_out(make_host) -> None:
    app = make_host()
    assert pressed(app, {"Origin": "http://shop.example", "Host": "shop.example:80"})
    assert pressed(app, {"Origin": "https://shop.example", "Host": "shop.example:443"})
    assert pressed(app, {"Origin": "https://shop.example:443", "Host": "shop.example"})
    assert pressed(app, {"Origin": "http://[::1]:8000", "Host": "[::1]:8000"})
    assert not pressed(app, {"Origin": "http://shop.example", "Host": "shop.example"}, "https://shop.example")


def test_behind_a_trusted_proxy_the_address_that_the_browser_knows_counts(make_host) -> None:
    app = make_host()
    app.wsgi_app = ProxyFix(app.wsgi_app, x_proto=1, x_host=1)  # type: ignore[method-assign]
    sent = {"X-Forwarded-Host": "shop.example", "X-Forwarded-Proto": "https"}
    assert pressed(app, sent | {"Origin": "https://shop.example"}, "http://127.0.0.1:8000")
    assert not pressed(app, sent | {"Origin": "https://evil.example"}, "http://127.0.0.1:8000")
    assert not pressed(app, sent | {"Origin": "http://shop.example"}, "http://127.0.0.1:8000")


def test_no_page_is_shown_in_a_frame_of_another_site(make_host) -> None:
    client = make_host().test_client()
    assert {client.get(path).headers["X-Frame-Options"] for path in PAGES} == {"SAMEORIGIN"}


def buried(app: Flask) -> int:
    """Enqueue a message. Return its id."""
    with app.app_context():
        id = app.extensions["background_workers"].enqueue("notes", "a message")
        app.extensions["sqlalchemy"].session.commit()
    assert id is not None
    return id


@pytest.mark.parametrize("prepare", [lambda app: None, CSRFProtect], ids=["without Flask-WTF", "with Flask-WTF"])
def test_every_page_can_be_read_without_a_secret_key(make_host, prepare) -> None:
    app = make_host(prepare)
    execution = app.extensions["background_workers"].trigger("noting").claim.execution
    client = app.test_client()
    for path in (*PAGES, f"/workers/worker/noting/{execution}", f"/workers/messages/{buried(app)}"):
        response = client.get(path)
        assert (response.status_code, "csrf_token" in response.text) == (200, False), path


def test_without_a_secret_key_a_button_works_and_its_page_shows_the_change(make_host) -> None:
    client: FlaskClient = make_host().test_client()
    assert "paused since" not in client.get("/workers/").text
    response = client.post(PAUSE)
    assert response.status_code == 303
    assert "paused" in client.get(response.location).text


# -- the start names a missing package ----------------------------------------------------------

HOST = """
import sys
sys.modules.update(dict.fromkeys({absent!r}))
from flask import Flask
from background import BackgroundWorkerManager, PeriodicWorker
from flask_sqlalchemy import SQLAlchemy
from background.dashboard import dashboard
from background.monitoring.health import health
from background.monitoring.metrics import metrics
class Noting(PeriodicWorker):
    cron = "0 3 * * *"
    def do_work(self, context):
        pass
app, db = Flask("host", root_path="{folder}"), SQLAlchemy()
app.config["SQLALCHEMY_DATABASE_URI"] = "{url}"
db.init_app(app)
BackgroundWorkerManager(app, db).add(Noting)
for blueprint in (dashboard(lambda: None), health(), metrics()):
    app.register_blueprint(blueprint)
with app.app_context():
    db.create_all()
"""


def looked(tmp_path, *absent: str) -> tuple[int, str]:
    """Return how `flask workers list` ends in a host without those packages, and its output."""
    url = f"sqlite:///{tmp_path / 'host.sqlite'}"
    (tmp_path / "host.py").write_text(HOST.format(absent=absent, folder=tmp_path, url=url))
    return run(flask("workers", "list"), environment(FLASK_APP="host", PYTHONPATH=f"{ROOT}:{tmp_path}"))


@pytest.mark.promise
@pytest.mark.parametrize(
    ("absent", "package", "whose"),
    [
        ("sqlalchemy", "sqlalchemy", "the engine of the background workers"),
        ("svcs", "svcs", "the engine of the background workers"),
        ("apscheduler", "apscheduler", "the engine of the background workers"),
        ("cronsim", "cronsim", "the engine of the background workers"),
        ("prometheus_client", "prometheus-client", "/metrics"),
    ],
)
def test_a_missing_package_is_one_sentence_at_the_start(tmp_path, absent, package, whose) -> None:
    code, said = looked(tmp_path, absent)
    assert code == 1, said
    assert said.splitlines() == [
        f"Error: The package '{package}' is not installed; expected it, as {whose} needs it. "
        f"Install it with `pip install {package}`."
    ]


def test_another_driver_of_the_database_is_refused_with_a_sentence() -> None:
    engine = create_engine("postgresql+psycopg://localhost/shop")
    refuse_driver(engine)
    engine.dialect.driver = "psycopg2"
    with pytest.raises(InvalidConfig, match=r"reached by postgresql\+psycopg2; expected SQLite, or PostgreSQL by"):
        refuse_driver(engine)


def test_an_async_driver_is_refused_with_a_sentence() -> None:
    engine = create_engine("postgresql+psycopg_async://localhost/shop")
    with pytest.raises(InvalidConfig, match=r"reached by postgresql\+psycopg \(async\); expected SQLite, or"):
        refuse_driver(engine)


@pytest.mark.promise
def test_the_engine_needs_no_package_of_the_shop(tmp_path) -> None:
    code, said = looked(tmp_path, "flask_wtf", "wtforms", "flask_login", "flask_limiter", "flask_bootstrap", "alembic")
    assert code == 0, said
    assert "noting" in said


def test_a_package_that_is_set_to_none_counts_as_missing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "nothing_of_this_name", None)
    with pytest.raises(MissingDependency, match="'nothing-of-this-name' is not installed; expected it, as a test"):
        require(["nothing_of_this_name"], "a test")
