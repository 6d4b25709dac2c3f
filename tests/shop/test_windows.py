"""The application starts without the names that Python has on Unix only. Nothing here replaces a test on Windows."""

import shutil
import signal
import sys
import urllib.request
from pathlib import Path

import pytest
from support.processes import ROOT, environment, run, started

# On Linux, the standard library itself needs some of the names. So it is imported first.
WITHOUT_UNIX = """
import asyncio, multiprocessing, os, signal, subprocess, sys, tempfile

sys.modules["fcntl"] = None
for module, names in (
    (os, "register_at_fork fork fchmod fchown tcgetpgrp getpgrp geteuid getuid killpg"),
    (signal, "siginterrupt SIGHUP SIGQUIT pthread_sigmask"),
):
    for name in names.split():
        delattr(module, name)
"""
FLASK = f"{WITHOUT_UNIX}\nfrom flask.cli import main\nsys.argv[0] = 'flask'\nmain()"
PREPARE = f"""{WITHOUT_UNIX}
import app, demo

with app.create_app().app_context():
    demo.ensure_ready()
"""
RAN = r"Completed: Setting status of inactive users"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Give a folder with the application's code, and an instance folder of its own."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name in ("background", "migrations", "templates", "static"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", FLASK, *arguments]


def own_environment(clone: Path) -> dict[str, str]:
    return environment(FLASK_APP="app:create_app", PYTHONPATH=clone)


@pytest.mark.promise
def test_the_names_are_gone() -> None:
    program = f"{WITHOUT_UNIX}\nimport app\nimport fcntl"
    code, said = run([sys.executable, "-c", program], environment())
    assert code == 1
    assert "import of fcntl halted" in said.splitlines()[-1]


@pytest.mark.promise
def test_flask_run_makes_the_database_serves_and_runs_a_tick(clone: Path) -> None:
    with started(command("run", "-p", "0"), own_environment(clone), clone) as server:
        server.wait_for(RAN)
        address = server.wait_for(r"Running on (http://\S+)")[1]
        with urllib.request.urlopen(address, timeout=30) as response:
            assert response.status == 200
        server.signal(signal.SIGINT)
        assert server.wait() == 0
        assert "Traceback" not in server.output


@pytest.mark.promise
def test_flask_workers_run_runs_a_tick_and_stops(clone: Path) -> None:
    with started(command("workers", "run"), own_environment(clone), clone) as workers:
        workers.wait_for(RAN)
        workers.signal(signal.SIGINT)
        assert workers.wait() == 0
        assert "Traceback" not in workers.output


@pytest.mark.promise
def test_two_processes_prepare_one_database_once(clone: Path) -> None:
    program = (
        f"{WITHOUT_UNIX}\nfrom app import create_app\nimport demo\nwith create_app().app_context(): demo.ensure_ready()"
    )
    own, both = own_environment(clone), [sys.executable, "-c", program]
    with started(both, own, clone) as first, started(both, own, clone) as second:
        assert (first.wait(), second.wait()) == (0, 0), first.output + second.output
        assert (first.output + second.output).count("the password") == 1
