"""Making the shop's application starts nothing."""

import os
import subprocess
import sys
from pathlib import Path

from support.processes import ROOT

PROBE = """
import os, socket, sqlite3, sys, threading

def refuse(*arguments, **options):
    raise AssertionError("a connection was opened")

sqlite3.connect = sqlite3.dbapi2.connect = refuse
socket.socket.connect = refuse
before = set(os.listdir("."))
from app import create_app
from workers import PassiveUserCheckerWorker
for url in sys.argv[1:]:
    app = create_app({"DATABASE_URL": url, "SECRET_KEY": "x"})
    manager = app.extensions["background_workers"]
    assert "passive_user_checker_worker" in manager.workers
    assert not manager.is_started
assert threading.active_count() == 1, threading.enumerate()
assert not [name for name in sys.modules if name.startswith("apscheduler")], "APScheduler was imported"
assert set(os.listdir(".")) == before, "a file was made"
print("nothing was opened")
"""


def test_making_the_app_opens_no_thread_no_connection_and_no_file(tmp_path: Path) -> None:
    urls = [f"sqlite:///{tmp_path}/absent.sqlite", "postgresql://reader@127.0.0.1:1/nothing"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("DATABASE_URL", "FLASK_APP"):
        environment.pop(name, None)
    probe = subprocess.run(
        [sys.executable, "-c", PROBE, *urls],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert probe.stdout == "nothing was opened\n", probe.stderr
    assert list(tmp_path.iterdir()) == []
