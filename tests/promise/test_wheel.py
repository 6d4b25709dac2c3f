"""The engine in a wheel of its own, in a fresh environment and an application that is not this one."""

import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.processes import ROOT, Process, copy_project, environment, run, started

PAGE = (ROOT / "docs" / "your-own-app.md").read_text(encoding="utf-8")
TESTING = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
APP = re.search(r"```python\n(# notes\.py\n.*?)```", PAGE, re.DOTALL)[1]
MIGRATED = APP.replace("    with app.app_context():\n        db.create_all()\n", "    MIGRATE\n").replace(
    "MIGRATE", re.search(r"`(Migrate\(app, db, include_object.*?\))`", PAGE)[1]
)
MIGRATED = f"import background\nfrom flask_migrate import Migrate\n{MIGRATED}"
RAN = "A note is written"


def command(start: str) -> list[str]:
    """Return the words of the page's command that begins with `start`."""
    return re.search(rf"^    ({re.escape(start)}.*)$", PAGE, re.MULTILINE)[1].split()


def pip(python: Path, *arguments: str, cwd: Path = ROOT) -> None:
    done = subprocess.run([python, "-m", "pip", "-q", *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel by the page's command, in a copy of the tracked files."""
    copy = copy_project(tmp_path_factory.mktemp("clone"))
    pip(Path(sys.executable), *command("pip wheel")[1:], cwd=copy)
    [made] = (copy / "dist").iterdir()
    assert made.name == Path(command("pip install")[2]).name
    return made


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """Give the interpreter of a fresh environment with the engine and its dependencies."""
    return fresh(tmp_path_factory.mktemp("environment"), f"{wheel}[postgresql,dashboard]")


def fresh(folder: Path, *packages: str) -> Path:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip(folder / "bin" / "python", "install", *packages)
    return folder / "bin" / "python"


def own_environment(folder: Path) -> dict[str, str]:
    return environment(FLASK_APP="notes:create_app", PYTHONPATH=folder)


@contextmanager
def served(python: Path, folder: Path) -> Iterator[tuple[Process, str]]:
    """Run the application as the page says. Give the process and its address."""
    command = [str(python), "-m", "flask", "run", "-p", "0"]
    with started(command, own_environment(folder), folder) as server:
        yield server, server.wait_for(r"Running on (http://\S+)")[1]


def status(address: str, **headers: str) -> int:
    method = "POST" if headers else "GET"
    request = urllib.request.Request(address, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_the_wheel_has_the_engine_alone_and_all_its_files(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    listed = subprocess.run(["git", "ls-files", "background"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert names == set(listed.stdout.splitlines())


def test_four_lines_run_the_workers_and_the_dashboard(python: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.py").write_text(APP)
    code, said = run([str(python), "-c", "import flask_wtf"], own_environment(tmp_path), tmp_path)
    assert code == 1, said
    with served(python, tmp_path) as (server, address):
        server.wait_for(RAN)
        for path in ("", "timeline", "instances", "messages", "worker/note_worker", "static/dashboard.css"):
            assert status(f"{address}/workers/{path}") == 200, path
        pause = f"{address}/workers/worker/note_worker/pause"
        assert status(pause, Origin="https://evil.example") == 403
        assert status(pause, Origin=address) == 200  # after the redirect
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert "Traceback" not in server.output


def test_gunicorn_starts_the_workers_of_each_process(python: Path, tmp_path: Path) -> None:
    pip(python, "install", "gunicorn")
    (tmp_path / "notes.py").write_text(APP)
    (tmp_path / "gunicorn.conf.py").write_text(
        re.search(r"```python\n(# gunicorn\.conf\.py\n.*?)```", PAGE, re.DOTALL)[1]
    )
    code, said = run([str(python), "-m", "flask", "workers", "list"], own_environment(tmp_path), tmp_path)
    assert code == 0, said
    command = [str(python), "-m", "gunicorn", "--no-control-socket", "-b", "127.0.0.1:0"]
    with started(command, own_environment(tmp_path), tmp_path) as server:
        server.wait_for("joined with 1 worker", times=2)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert server.output.count(" left") == 2
    assert "Traceback" not in server.output


def test_a_migration_makes_the_tables(python: Path, tmp_path: Path) -> None:
    pip(python, "install", "flask-migrate")
    (tmp_path / "notes.py").write_text(MIGRATED)

    def flask(*arguments: str) -> str:
        command = [str(python), "-m", "flask", *arguments]
        code, said = run(command, own_environment(tmp_path), tmp_path)
        assert code == 0, said
        return said

    flask("db", "init")
    flask("db", "migrate", "--rev-id", "a")
    [first] = (tmp_path / "migrations" / "versions").glob("a_*.py")
    assert "background_" not in first.read_text()
    flask("db", "revision", "--rev-id", "b")
    [second] = (tmp_path / "migrations" / "versions").glob("b_*.py")
    step = re.search(r"`(background\.migrate_to\(.*?\))`", PAGE)[1]
    head, _, _ = second.read_text().partition("def upgrade")
    second.write_text(f"{head}import background\n\ndef upgrade():\n    {step}\n")
    flask("db", "upgrade")
    assert "No new upgrade operations" in flask("db", "check")
    with served(python, tmp_path) as (server, _address):
        server.wait_for(RAN)


def test_pytest_finds_the_fixtures_by_itself(python: Path, tmp_path: Path) -> None:
    pip(python, "install", "pytest")
    (tmp_path / "notes.py").write_text(APP)
    [configuration] = re.findall(r"```toml\n(.*?)```", TESTING, re.DOTALL)
    (tmp_path / "pyproject.toml").write_text(configuration.replace("shop:make_app", "notes:create_app"))
    (tmp_path / "test_notes.py").write_text(
        "from background.testing import run_worker\n"
        "from notes import Note, NoteWorker\n"
        "def test_a_note_is_written(workers_app, clock):\n"
        "    run_worker(workers_app, NoteWorker)\n"
        "    with workers_app.app_context():\n"
        "        assert Note.query.one().text.startswith('the tick 2')\n"
    )
    code, said = run([str(python), "-m", "pytest", "-q"], own_environment(tmp_path), tmp_path)
    assert code == 0, said
    assert "1 passed" in said


def test_a_missing_package_is_one_sentence_at_the_start(wheel: Path, tmp_path: Path) -> None:
    python = fresh(tmp_path / "environment", "flask", "flask-sqlalchemy")
    pip(python, "install", "--no-deps", str(wheel))
    (tmp_path / "notes.py").write_text(APP)
    code, said = run([str(python), "-m", "flask", "run", "-p", "0"], own_environment(tmp_path), tmp_path)
    assert code == 1
    assert said.splitlines() == [
        "Error: The package 'svcs' is not installed; expected it, as the engine of the background workers needs it. "
        "Install it with `pip install svcs`."
    ]
