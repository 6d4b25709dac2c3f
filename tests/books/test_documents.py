"""The README and the pages of docs/: short, linked, and with snippets that run."""

import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from flask import Flask
from sqlalchemy import create_engine, select
from sqlalchemy import text as sql
from support.alert_receiver import Receiver
from support.fleet import Fleet, Hourly, wait_until
from support.processes import copy_project, environment, run
from support.shop import make_shop

import accounts
import sessions
import workers
from background import WorkerContext, current_workers
from background.database.tables import metadata
from background.testing import run_worker
from models import Book, db
from tests.books.documents import PAGES, ROOT, commands, snippet, snippets, text

README, WORKERS, MESSAGES, LOCKS = "README.md", "docs/workers.md", "docs/messages.md", "docs/locks.md"
TESTING, QUICKSTART, UPGRADING = "docs/testing.md", "docs/quickstart.md", "docs/upgrading.md"
SECURITY, OPERATING = "docs/security.md", "docs/operating.md"


# -- their form ------------------------------------------------------------------------------------


def test_the_readme_is_read_in_five_minutes() -> None:
    lines = text(README).splitlines()
    assert len(lines) <= 110
    assert max(map(len, lines)) <= 100
    assert len(text(README).split()) <= 750


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        linked = (PAGES[page].parent / unquote(path)).resolve() if path else PAGES[page]
        assert linked.exists(), f"{page} links to {target}"
        if heading:
            assert heading in _anchors(linked.read_text(encoding="utf-8")), f"{page} links to {target}"


def _anchors(markdown: str) -> set[str]:
    """Return the anchors that a forge gives to the headings."""
    headings = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\((docs/[\w-]+\.md)\)", text(README)))
    assert linked == PAGES.keys() - {README}


def test_the_page_of_the_settings_matches_the_code() -> None:
    done = subprocess.run([sys.executable, ".ci/configuration", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_snippet_is_run() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    used = re.findall(r"snippet\((\w+), \"([^\"]+)\"\)", source)
    for page in PAGES:
        markers = [marker for name, marker in used if globals()[name] == page]
        missed = [each for each in snippets(page) if not any(marker in each for marker in markers)]
        assert not missed or page in ("docs/your-own-app.md", "docs/deploying.md"), f"{page}: {missed[0]}"


# -- README ----------------------------------------------------------------------------------------


def add_book(stock: int) -> None:
    db.session.add(Book(title="Emma", author="Jane Austen", price_cents=900, stock=stock))
    db.session.commit()


def stocks() -> list[int]:
    return list(db.session.scalars(select(Book.stock)))


@pytest.mark.parametrize("page", [README, WORKERS])
def test_the_worker_works_when_it_is_pasted(app: Flask, page: str) -> None:
    found = snippet(README, "class RestockWorker") if page == README else snippet(WORKERS, "class RestockWorker")
    declared, _, added = found.partition("# app.py")
    pasted = dict(vars(workers))
    exec(declared, pasted)
    assert page == WORKERS or "from workers import RestockWorker" in added
    assert page == WORKERS or "workers.add(RestockWorker)" in added
    with app.app_context():
        add_book(1)
    run_worker(app, pasted["RestockWorker"])
    with app.app_context():
        assert stocks() == [11]


def test_a_monthly_worker_that_fails_is_retried_when_it_is_pasted(app: Flask) -> None:
    def fail(self: workers.PeriodicWorker, context: WorkerContext) -> None:
        raise ValueError("out of paper")

    pasted = dict(vars(workers))
    exec(snippet(WORKERS, "class MonthlyReportWorker"), pasted)
    worker = type("Monthly", (pasted["MonthlyReportWorker"],), {"do_work": fail})
    at = datetime(2030, 3, 10, tzinfo=UTC)
    with pytest.raises(ValueError, match="out of paper"):
        run_worker(app, worker, at)
    state = app.extensions["background_workers"].stores.ledger.look("monthly")
    assert timedelta(minutes=7) < state.retry_at - at < timedelta(minutes=13)


def test_the_worker_with_a_dead_mans_switch_works_when_it_is_pasted(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = Receiver()
    try:
        monkeypatch.setenv("PASSIVE_USERS_PING_URL", f"{receiver.url}/an-id")
        pasted = {**vars(workers), "os": os}
        exec(snippet(OPERATING, "ping_url"), pasted)
        worker = type("Passive", (pasted["PassiveUserCheckerWorker"],), {"do_work": lambda self, context: None})
        fleet.apps.append(make_shop(fleet.database_url, worker))
        fleet.apps[-1].extensions["background_workers"].trigger("passive")
        wait_until(lambda: receiver.paths() == ["/an-id/start", "/an-id"], "the pings")
    finally:
        receiver.close()


@pytest.mark.parametrize("page", [README, MESSAGES])
def test_the_message_works_when_it_is_pasted(fleet: Fleet, page: str) -> None:
    found = snippet(README, "class DeliveryWorker") if page == README else snippet(MESSAGES, "class DeliveryWorker")
    enqueueing, declared = found.split("\n\n", maxsplit=1)
    pasted = {**vars(workers), "Book": Book, "current_workers": current_workers, "db": db}
    exec(declared, pasted)
    fleet.apps.append(make_shop(fleet.database_url, pasted["DeliveryWorker"]))
    manager = fleet.apps[-1].extensions["background_workers"]
    with manager.app.app_context():
        add_book(1)
        exec(enqueueing, pasted)
        exec(enqueueing, pasted)
        current_workers.enqueue_many("deliveries", [{"book": 1, "copies": copies} for copies in (2, 3)])
        db.session.commit()
    manager.start()
    wait_until(lambda: [row.state for row in fleet.messages()] == ["done"] * 3, "the deliveries")
    with manager.app.app_context():
        assert stocks() == [16]


@pytest.mark.promise
def test_the_deploy_commands_all_use_the_same_database(tmp_path: Path) -> None:
    """gunicorn only reads its configuration and loads the application. Other tests start gunicorn."""
    url = f"sqlite:///{tmp_path / 'shop.sqlite'}"
    script, replaced = re.subn(r"postgresql://\S+", url, commands(README, "Deploy"))
    assert replaced == 1
    script = script.replace(". .venv/bin/activate\n", "")
    script = script.replace("&& gunicorn", "&& python -m gunicorn --check-config").replace("flask ", "python -m flask ")
    script = script.replace("python -m ", f"{sys.executable} -m ")
    own = environment(FLASK_APP="app:create_app", WORKERS_LEASE_SECONDS=10)
    done = subprocess.run(["sh", "-ec", script], env=own, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "The admin is" in done.stdout + done.stderr
    engine = create_engine(url)
    with engine.connect() as connection:
        assert connection.scalar(sql("SELECT count(*) FROM users WHERE is_admin")) == 1
    engine.dispose()


# -- docs ------------------------------------------------------------------------------------------


def test_long_work_goes_on_behind_the_slices_that_are_done(app: Flask) -> None:
    with app.app_context():
        db.session.add_all([Book(title=f"Book {id}", author="A", price_cents=100, stock=1) for id in range(1, 601)])
        db.session.commit()
        ids = list(db.session.scalars(select(Book.id).order_by(Book.id)))
    pasted: dict[str, Any] = {"select": db.select, "update": db.update, "Book": Book}
    exec(snippet(WORKERS, "context.raise_if_stopping()"), pasted)
    worker = type(
        "SliceWorker", (workers.PeriodicWorker,), {"period": timedelta(hours=1), "do_work": pasted["do_work"]}
    )
    assert run_worker(app, worker, cursor=ids[9]).state == "succeeded"
    with app.app_context():
        assert list(db.session.scalars(select(Book.price_cents).order_by(Book.id))) == [100] * 10 + [200] * 590


def test_a_signal_is_received_when_it_is_pasted(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            raise ValueError("out of paper")

    pasted: dict[str, Any] = {}
    exec(snippet(WORKERS, "execution_failed.connect"), pasted)
    try:
        fleet.manager(Failing).tick("failing", datetime.now(UTC))
    finally:
        pasted["signals"].execution_failed.disconnect(pasted["page_operator"])
    [record] = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert record.getMessage().startswith("failing failed at ")
    assert "ValueError: out of paper" in caplog.text


def test_the_locks_are_taken_when_they_are_pasted(app: Flask) -> None:
    done: list[object] = []
    function = "def view():\n" + re.sub(r"^", "    ", snippet(LOCKS, "make_invoice"), flags=re.MULTILINE)
    pasted: dict[str, Any] = {
        "current_workers": current_workers,
        "make_invoice": done.append,
        "pay": lambda token: done.append(token),
    }
    exec(function, pasted)
    with app.app_context():
        assert pasted["view"]() is None
        with current_workers.lock("invoice-42"):
            assert "Another request" in pasted["view"]()
        exec(snippet(LOCKS, "lock.still_held()"), pasted)
    assert done == [42, 1]


SAMPLE_WORKERS = """
import pytest
from background import MessageWorker, PeriodicWorker, current_workers
from models import Book, User, db
from workers import PassiveUserCheckerWorker

class HourlyWorker(PeriodicWorker):
    period = timedelta(hours=1)

    def do_work(self, context):
        context.logger.info("done")

class DeliveryWorker(MessageWorker):
    topic = "deliveries"

    def handle(self, message, context):
        context.session.get(Book, message.payload["book"]).stock += message.payload["copies"]

@pytest.fixture(autouse=True)
def prepared(workers_app):
    manager = workers_app.extensions["background_workers"]
    manager.add(HourlyWorker)
    manager.add(DeliveryWorker)
    with workers_app.app_context():
        db.session.add(Book(title="Emma", author="Jane Austen", price_cents=900, stock=1))
        db.session.commit()
"""


@pytest.mark.promise
def test_the_examples_of_tests_pass(tmp_path: Path) -> None:
    plugin, run_one = snippet(TESTING, "pytest_plugins"), snippet(TESTING, "PassiveUserCheckerWorker")
    rest = [
        snippet(TESTING, "three_hours"),
        snippet(TESTING, "drain").replace('Book(id=1, title="Emma"', 'Book(title="Persuasion"'),
        snippet(TESTING, "worker_context"),
        snippet(TESTING, "with running"),
        re.sub("from workers .*\n", "", snippet(README, "def test_a_tick_runs")).replace("Restock", "Hourly"),
    ]
    (tmp_path / "conftest.py").write_text(plugin)
    imports, _, first = run_one.partition("\n\ndef ")
    (tmp_path / "test_examples.py").write_text("\n".join([imports, SAMPLE_WORKERS, "def " + first, *rest]))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_examples.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert "6 passed" in done.stdout, done.stdout


@pytest.mark.promise
def test_the_quickstart_leads_to_a_table_a_worker_and_a_test(tmp_path: Path) -> None:
    copy = copy_project(tmp_path / "copy")
    for name, marker_snippet in (
        ("models.py", snippet(QUICKSTART, "class Visit(db.Model)")),
        ("workers.py", snippet(QUICKSTART, "class VisitWorker")),
    ):
        with (copy / name).open("a") as file:
            file.write("\n\n" + marker_snippet)
    app = (copy / "app.py").read_text()
    app = app.replace("SystemHealthWorker\n", "SystemHealthWorker, VisitWorker\n", 1)
    app = app.replace(
        "    workers.add(PruneHistoryWorker)\n", "    workers.add(PruneHistoryWorker)\n    workers.add(VisitWorker)\n"
    )
    (copy / "app.py").write_text(app)
    (copy / "tests" / "test_visits.py").write_text(snippet(QUICKSTART, "def test_a_visit"))
    url = f"sqlite:///{tmp_path / 'shop.sqlite'}"
    own = environment(url, FLASK_APP="app:create_app") | {"PYTHONPATH": f"{copy}:{copy / 'tests'}"}
    shipped = len(list((copy / "migrations" / "versions").glob("*.py")))
    script = "flask db upgrade\n" + commands(QUICKSTART, "Add a table") + commands(QUICKSTART, "Add a worker")
    script += "flask db migrate\n"  # finds nothing more
    script = script.replace("flask ", f"{sys.executable} -m flask ")
    script = script.replace("why visit_worker", "why visit_worker && exit 9 || test $? = 1")  # as the page says
    done = subprocess.run(["sh", "-ec", script], env=own, cwd=copy, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "Recorded the visit" in done.stderr
    assert "no migration is made" in done.stdout
    assert len(list((copy / "migrations" / "versions").glob("*.py"))) == shipped + 1
    script = commands(QUICKSTART, "Test it").replace("pytest ", f"{sys.executable} -m pytest -p no:cacheprovider ")
    tested = subprocess.run(["sh", "-ec", script], env=own, cwd=copy, capture_output=True, text=True, timeout=120)
    assert "1 passed" in tested.stdout, tested.stdout


OWN_APPLICATION = r"""
import sys
from pathlib import Path

import background
from background import BackgroundWorkerManager, UtcDateTime
from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy

app, db = Flask("host"), SQLAlchemy()
app.config["SQLALCHEMY_DATABASE_URI"] = sys.argv[1]
db.init_app(app)
BackgroundWorkerManager(app, db)
MIGRATE

class Note(db.Model):
    id = db.mapped_column(db.Integer, primary_key=True)
    at = db.mapped_column(UtcDateTime)

def flask(*arguments):
    result = app.test_cli_runner().invoke(args=["db", *arguments])
    assert result.exit_code == 0, (arguments, result.output, result.exception)

def tables():
    with app.app_context():
        return sorted(set(db.inspect(db.engine).get_table_names()) - {"alembic_version"})

flask("init")
flask("revision", "--rev-id", "a")
[first] = Path("migrations/versions").glob("a_*.py")
first.write_text(first.read_text().partition("def upgrade")[0] + STEPS)
flask("upgrade")
flask("migrate", "--rev-id", "b")
[second] = Path("migrations/versions").glob("b_*.py")
print("background_" in second.read_text(), "from background import UtcDateTime" in second.read_text())
flask("upgrade")
flask("check")
print(*tables())
flask("downgrade", "base")
print("left:", *tables())
"""


@pytest.mark.promise
def test_an_applications_own_migrations_work_when_they_are_pasted(empty_database_url: str, tmp_path: Path) -> None:
    migrate, steps = snippet(UPGRADING, "Migrate(app, db"), snippet(UPGRADING, "migrate_to")
    program = OWN_APPLICATION.replace("MIGRATE", migrate).replace("STEPS", repr(steps))
    code, said = run([sys.executable, "-c", program, empty_database_url], environment(), tmp_path)
    assert code == 0, said
    engines = " ".join(sorted(metadata.tables))
    last = ["False True", "No new upgrade operations detected.", f"{engines} note", "left:"]
    assert said.splitlines()[-4:] == last, said


def test_each_row_of_the_page_of_security_has_tests_that_exist() -> None:
    page = text(SECURITY)
    rows = re.findall(r"^\| (\d+)\. [^|]+ \| yes \|", page, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| \d+\.", page, re.MULTILINE)) > 40
    named = re.findall(r"^(\d+) (tests/\S+\.py)::(test_\w+)$", page, re.MULTILINE)
    assert sorted({number for number, *_ in named}, key=int) == rows
    for _, path, name in named:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{SECURITY} names {name}, which {path} lacks"


def test_the_page_of_security_has_the_times_of_the_accounts() -> None:
    page = text(SECURITY)
    for row, time in (
        ("a session without a request | 12 hours", sessions.IDLE),
        ("a session, since the password was entered | 7 days", sessions.ABSOLUTE),
        ("a recent login, for an admin's change | 15 minutes", sessions.RECENT),
        ("a password reset link | 1 hour", accounts.SETTINGS["RESET_PASSWORD_WITHIN"]),
        ("a confirmation link | 2 days", accounts.SETTINGS["CONFIRM_EMAIL_WITHIN"]),
    ):
        number, unit = row.split()[-2:]
        assert f"| {row} |" in page
        assert timedelta(**{f"{unit.rstrip('s')}s": int(number)}) == time
