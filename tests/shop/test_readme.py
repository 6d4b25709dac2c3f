"""The snippets of the README work when they are pasted."""

import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import create_engine, text
from support.fleet import Fleet, Hourly, wait_until
from support.processes import ROOT, environment, run
from support.shop import make_shop

import workers
from background import WorkerContext, current_workers
from background.database.tables import metadata
from models import Book, db

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_worker_works_when_it_is_pasted(app: Flask) -> None:
    declared, added = re.search(r"```python\n(.*?)(# app\.py.*?)```", README, re.DOTALL).groups()
    pasted = dict(vars(workers))
    exec(declared, pasted)
    worker = pasted["RestockWorker"]
    assert f"workers.add({worker.__name__})" in added
    manager = app.extensions["background_workers"]
    manager.add(worker)
    with app.app_context():
        db.session.add(Book(title="Emma", author="Jane Austen", price_cents=900, stock=1))
        db.session.commit()
    manager.tick("restock_worker", datetime.now(UTC))
    with app.app_context():
        assert db.session.scalars(db.select(Book.stock)).all() == [11]


def test_the_example_of_a_message_works_when_it_is_pasted(fleet: Fleet) -> None:
    enqueueing, declared = re.search(r"```python\n(# in a view.*?\n)\n(.*?)```", README, re.DOTALL).groups()
    pasted = {**vars(workers), "Book": Book, "current_workers": current_workers}
    exec(declared, pasted)
    fleet.apps.append(make_shop(fleet.database_url, pasted["DeliveryWorker"]))
    manager = fleet.apps[-1].extensions["background_workers"]
    with manager.app.app_context():
        db.session.add(Book(title="Emma", author="Jane Austen", price_cents=900, stock=1))
        exec(enqueueing, pasted)
        exec(enqueueing, pasted)
        current_workers.enqueue_many("deliveries", [{"book": 1, "copies": copies} for copies in (2, 3)])
        db.session.commit()
    manager.start()
    wait_until(lambda: [row.state for row in fleet.messages()] == ["done"] * 3, "the deliveries")
    with manager.app.app_context():
        assert db.session.scalars(db.select(Book.stock)).all() == [16]


def test_the_example_of_a_signal_works_when_it_is_pasted(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            raise ValueError("out of paper")

    pasted: dict[str, Any] = {}
    exec(re.search(r"```python\n(from background import signals.*?)```", README, re.DOTALL)[1], pasted)
    try:
        fleet.manager(Failing).tick("failing", datetime.now(UTC))
    finally:
        pasted["signals"].execution_failed.disconnect(pasted["page_operator"])
    [record] = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert record.getMessage().startswith("failing failed at ")
    assert "ValueError: out of paper" in caplog.text


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
first.write_text(first.read_text().partition("def upgrade")[0] + "import background\n" + STEPS)
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
def test_the_example_of_an_applications_own_migrations_works_when_it_is_pasted(
    empty_database_url: str, tmp_path: Path
) -> None:
    migrate, steps = re.search(r"## Migrate.*?```python\n(.*?)\n(# a migration.*?)```", README, re.DOTALL).groups()
    program = OWN_APPLICATION.replace("MIGRATE", migrate).replace("STEPS", repr(steps))
    code, said = run([sys.executable, "-c", program, empty_database_url], environment(), tmp_path)
    assert code == 0, said
    engines = " ".join(sorted(metadata.tables))
    last = ["False True", "No new upgrade operations detected.", f"{engines} note", "left:"]
    assert said.splitlines()[-4:] == last, said


@pytest.mark.promise
def test_the_deploy_commands_all_use_one_database(tmp_path: Path) -> None:
    """Replace the last command, gunicorn, by one that checks whether the shop is ready."""
    block = re.search(r"## Deploy\n\n((?:    .*\n)+)", README)[1]
    url = f"sqlite:///{tmp_path / 'shop.sqlite'}"
    script, replaced = re.subn(r"postgresql://\S+", url, block)
    assert replaced == 1
    script = re.sub(r"gunicorn\n", "flask workers list\n", script).replace("flask ", f"{sys.executable} -m flask ")
    command = ["sh", "-ec", script]
    own = environment(FLASK_APP="app:create_app", WORKERS_LEASE_SECONDS=10)
    done = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "The admin is" in done.stdout + done.stderr
    engine = create_engine(url)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM users WHERE is_admin")) == 1
    engine.dispose()
