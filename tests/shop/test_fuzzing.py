"""Bad input of any kind neither breaks the shop nor appears as markup.

`FUZZ_EXAMPLES=40 pytest -m fuzz` tries forty times as many examples, and different ones each time.
"""

import re
import socket
from collections.abc import Iterator
from datetime import UTC, datetime

import click
import pytest
from flask import Flask
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import insert, select, update
from support.bad_http import GET, NONSENSE, assert_unbroken, mangled, said
from support.bad_input import MARK, MARKUP, bounded, texts
from support.databases import close
from support.processes import environment, gunicorn, started
from support.shop import settings
from support.visitors import Visitors, requests
from werkzeug.routing import Rule

import demo
from app import create_app
from background import BackgroundWorkerManager, MessageWorker, PeriodicWorker
from background.database.tables import executions, incidents, instances, message_errors, messages, topics
from models import AuditEntry, User, db

try:
    from tests.books import rows as books
except ImportError:  # an application without the shop
    books = None  # type: ignore[assignment]

pytestmark = pytest.mark.fuzz

EVIL = "".join(["\x1b[2J", *MARKUP])


class Babble(PeriodicWorker):
    cron = "* * * * *"
    run_on_first_start = True

    def do_work(self, context):
        context.logger.warning(EVIL)
        raise ValueError(EVIL)


class Prattle(MessageWorker):
    topic = "prattle"
    max_attempts = 1

    def handle(self, message, context):
        raise ValueError(EVIL)


@pytest.fixture
def app(database_url, tmp_path) -> Iterator[Flask]:
    """Give a shop in which every text from outside is markup."""
    app = create_app(settings(database_url, MAIL_URL="smtp://127.0.0.1:9"))
    manager = app.extensions["background_workers"]
    manager.add(Babble)
    manager.add(Prattle)
    with app.app_context():
        fill(manager)
        db.session.remove()
    yield app
    close(app)


def fill(manager: BackgroundWorkerManager) -> None:
    manager.tick("babble", manager.history.clock())
    manager.trigger("babble")
    for name, is_admin in (("customer", False), ("admin", True)):
        db.session.add(User(email=f"{name}@example.com", name=EVIL[:120], is_admin=is_admin))
    db.session.flush()
    at = datetime.now(UTC)
    for user in db.session.scalars(select(User)).all():
        db.session.add(AuditEntry(user_id=user.id, action=EVIL[:100], details=EVIL, address=EVIL[:45]))
    if books:
        books.add_book(EVIL)
    for state in ("dead", "waiting", "running", "done"):
        manager.enqueue("prattle", {EVIL: [EVIL]}, key=f"{state}{MARKUP[1]}")
        newest = select(messages.c.id).order_by(messages.c.id.desc()).limit(1).scalar_subquery()
        claimed = {"instance_name": EVIL[:255], "claimed_at": at, "finished_at": None if state == "running" else at}
        db.session.execute(update(messages).where(messages.c.id == newest).values(state=state, **claimed))
    dead = db.session.scalar(select(messages.c.id).where(messages.c.state == "dead"))
    db.session.execute(
        insert(message_errors).values(message=dead, attempt=1, at=at, instance_name=EVIL[:255], error=EVIL)
    )
    noted = {"reason": EVIL, "log": EVIL, "cancelled_at": at, "cancelled_by": EVIL[:255]}
    db.session.execute(update(executions).values(instance_name=EVIL[:255], **noted))
    postponed = {"postponed": 1, "postponed_because": EVIL}
    db.session.execute(update(messages).where(messages.c.state == "waiting").values(postponed))
    db.session.execute(insert(topics).values(topic="prattle", paused_at=at))
    for kind in ("failing", "dead", "clock"):
        db.session.execute(insert(incidents).values(kind=kind, subject=EVIL[:255], opened_at=at, detail=EVIL))
    db.session.commit()
    with manager.stores.leases.engine.begin() as connection:
        connection.execute(update(instances).values(host=EVIL[:255], release=EVIL[:100]))


# -- the shop as its visitors see it ------------------------------------------------------------


@pytest.fixture
def visitors(app) -> Visitors:
    return Visitors(app)


# -- bad requests -----------------------------------------------------------------------


def test_no_stored_text_appears_as_markup(visitors):
    there = {name: visitors.endpoints(name) for name in ("", "customer", "admin")}
    assert "account.profile" in there["customer"] - there[""]
    assert not books or "shop.orders" in there["customer"] - there[""]
    assert {"admin.users", "background.overview"} <= there["admin"] - there["customer"]
    shown = {visitors.learn(path) for path, page in visitors.look_around("admin").items() if MARK in page}
    assert shown >= {"account.profile", "admin.users", "admin.audit"}
    assert not books or shown >= {"shop.book", "shop.orders"}
    assert shown >= {f"background.{name}" for name in ("worker", "execution", "timeline", "instances", "message")}


# Werkzeug leaves a part's file to the garbage collector when the next part is nonsense.
@pytest.mark.filterwarnings("ignore:Unclosed file <tempfile.SpooledTemporaryFile:ResourceWarning")
def test_no_request_to_any_route_breaks_the_shop(visitors):
    for name in ("", "customer", "admin"):
        visitors.look_around(name)
    for rule in visitors.rules():
        for method in sorted({"GET", "POST"} & rule.methods):
            send_nonsense(visitors, rule, method)
        for method in ("HEAD", "PATCH", "DELETE", "OPTIONS", "TRACE", "NONSENSE"):
            visitors.ask("admin", method, rule.rule)
    assert visitors.answers >= {200, 302, 403, 404, 405}
    visitors.look_around("admin")


def send_nonsense(visitors: Visitors, rule: Rule, method: str) -> None:
    @bounded(3 if method == "POST" else 2)
    @given(requests(visitors, rule, method))
    def send(request):
        name, path, more = request
        visitors.ask(name, method, path, **more)

    send()


# -- bad command lines -----------------------------------------------------------------------

NOT_OURS = {"run", "shell", "db"}  # `flask run` and a shell have no end, and Flask-Migrate writes migrations
THERE = ["babble", "prattle", "system_health_worker", "1", "2", "dead", "failed", "2026-11-20T12:00Z", "--json"]


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in sorted(group.commands.items()):
        if not path and name in NOT_OURS:
            continue
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        yield (*path, name), command


@st.composite
def arguments(draw, command: click.Command) -> list[str]:
    """Draw options and arguments for the command, real and meaningless ones, in any order."""
    words = st.sampled_from(THERE) | texts.map(lambda text: text.replace("\0", ""))  # no system passes a NUL on
    given = []
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            given += draw(st.lists(words, min_size=0 if parameter.nargs < 0 else 1, max_size=2))
        elif parameter.name != "watched" and draw(st.booleans()):  # a watched list has no end
            option = draw(st.sampled_from(parameter.opts))
            given += [option] if parameter.is_flag else [option, draw(words)]
    return given + draw(st.just([]) | st.just([]) | st.lists(words, max_size=2))


def test_no_argument_breaks_any_command(app, monkeypatch):
    monkeypatch.setattr(demo, "MOST_USERS", 20)
    codes = set()
    for path, command in commands(app.cli):
        first = ["--once"] if path == ("workers", "run") else []
        codes |= type_nonsense(app, [*path, *first], command)
    assert codes == {0, 1, 2}


def type_nonsense(app: Flask, line: list[str], command: click.Command) -> set[int]:
    codes = set()

    @bounded(6)
    @given(arguments(command))
    def type_in(arguments):
        codes.add(assert_answered(app, [*line, *arguments]))

    type_in()
    return codes


def assert_answered(app: Flask, line: list[str]) -> int:
    result = app.test_cli_runner().invoke(args=line, color=True)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code in (0, 1, 2)
    assert "Traceback" not in result.stderr
    assert result.output.strip() or result.exit_code == 0
    is_clicks = result.stderr.startswith("Usage:") and line[0] not in ("workers", "messages")
    assert is_clicks or not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", result.output), repr(result.output)
    return result.exit_code


# -- bad bytes on a socket ----------------------------------------------------------


@pytest.fixture
def server(sqlite_url, tmp_path):
    settings = {"WORKERS_ENABLED": "false", "FLASK_APP": "app"}
    with started(gunicorn("-w", "2"), environment(sqlite_url, **settings)) as server:
        yield server


def test_no_bytes_on_a_socket_break_the_server(server):
    port = int(server.wait_for(r"Listening at: http://127.0.0.1:(\d+)")[1])
    for data in NONSENSE:
        assert_unbroken(said(port, data), data)

    @bounded(60)
    @given(mangled())
    def send(data):
        assert_unbroken(said(port, data), data)

    send()
    assert said(port, GET).startswith(b"HTTP/1.1 200 OK\r\n")
    assert "Traceback" not in server.output
    assert "Worker exiting" not in server.output


def test_one_client_that_never_ends_its_request_holds_up_one_of_two_processes_only(server):
    port = int(server.wait_for(r"Listening at: http://127.0.0.1:(\d+)")[1])
    server.wait_for("Booting worker", times=2)
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
        for _ in range(5):
            assert said(port, GET).startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_body_with_invalid_chunks_is_a_bad_request(server):
    port = int(server.wait_for(r"Listening at: http://127.0.0.1:(\d+)")[1])
    head = b"POST /login HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    kind = b"Content-Type: application/x-www-form-urlencoded\r\n\r\n"
    for chunks in (b"nonsense\r\n\r\n", b"7\r\nemail=a"):
        assert said(port, head + kind + chunks).startswith(b"HTTP/1.1 400 ")
