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
from support.processes import ROOT, environment

import workers
from background import WorkerContext, current_workers
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
    manager = fleet.manager(pasted["DeliveryWorker"])
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


def test_the_deploy_commands_are_all_about_the_one_database(tmp_path: Path) -> None:
    """The last is gunicorn, in whose place the shop is asked whether it is ready."""
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
