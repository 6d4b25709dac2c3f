"""An application without the shop, made by the commands of the page that describes it."""

import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect
from support.processes import ROOT, copy_project, environment, flask, run, started

from tests.books.documents import blocks

PAGE = (ROOT / "docs" / "your-own-app.md").read_text(encoding="utf-8")
PLACES = re.findall(r"^- `([^`]+)`", PAGE.partition("## Another name")[0], re.MULTILINE)
COMMANDS, DROP, MAKE, *_ = blocks("docs/your-own-app.md")


@pytest.fixture(scope="module")
def emptied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_emptied(tmp_path_factory.mktemp("emptied"))


def make_emptied(folder: Path) -> Path:
    """Copy the tracked files to `folder`, and run the page's commands there. Return the folder."""
    copy_project(folder)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    execute(f"{COMMANDS}\ngit init -q\ngit add -A", own_environment(folder), folder)  # some tests ask git for the files
    return folder


def execute(script: str, env: dict[str, str], folder: Path) -> None:
    env = env | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    code, said = run(["sh", "-ec", script], env, folder)
    assert code == 0, said


def own_environment(emptied: Path, url: str | None = None) -> dict[str, str]:
    paths = f"{emptied}:{emptied / 'tests'}"
    return environment(url, FLASK_APP="app:create_app", PYTHONPATH=paths)


def pytest_in(emptied: Path, *arguments: str) -> str:
    command = [".venv/bin/python", "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, env=own, cwd=emptied, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr
    return done.stdout


def test_the_commands_touch_the_seven_places_alone(emptied: Path) -> None:
    assert len(PLACES) == 7
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    touched = {name for name in listed.splitlines() if (ROOT / name).is_file() and is_touched(emptied, name)}
    assert {next((place for place in PLACES if name.startswith(place)), name) for name in touched} == set(PLACES)


def is_touched(emptied: Path, name: str) -> bool:
    return not (emptied / name).exists() or (emptied / name).read_bytes() != (ROOT / name).read_bytes()


def test_no_word_about_books_and_orders_is_left_in_the_code(emptied: Path) -> None:
    left = [
        f"{path.name}: {line}"
        for path in [*emptied.glob("*.py"), *(emptied / "templates").rglob("*.*")]
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\b(Books?|Orders?|OrderRepository|OrderWorker|catalogue)\b|shop\.", line)
    ]
    assert left == []


@pytest.mark.promise
def test_the_schema_has_no_table_of_books_and_orders(emptied: Path, empty_database_url: str) -> None:
    for command in ("upgrade", "check", "downgrade base", "upgrade"):
        code, said = run(flask("db", *command.split()), own_environment(emptied, empty_database_url), emptied)
        assert code == 0, said
    engine = create_engine(empty_database_url)
    tables = set(inspect(engine).get_table_names())
    engine.dispose()
    assert {"users", "audit_entries", "background_workers"} <= tables
    assert not {"books", "orders"} & tables


@pytest.mark.promise
def test_the_shops_tables_are_dropped_and_own_tables_made(tmp_path: Path, empty_database_url: str) -> None:
    copy, env = copy_project(tmp_path / "copy"), own_environment(tmp_path / "copy", empty_database_url)
    (copy / ".venv").symlink_to(ROOT / ".venv")
    execute(f"flask db upgrade\n{COMMANDS}", env, copy)
    engine = create_engine(empty_database_url)
    with engine.begin() as connection:
        for statement in filter(str.strip, DROP.split(";")):
            connection.exec_driver_sql(statement)
    with (copy / "models.py").open("a") as models:
        models.write("\n\nclass Plan(db.Model):\n    id: Mapped[int] = mapped_column(primary_key=True)\n")
    execute(f"{MAKE}\nflask db check", env, copy)
    tables = set(inspect(engine).get_table_names())
    engine.dispose()
    assert "plan" in tables
    assert not {"books", "orders"} & tables


@pytest.mark.promise
def test_flask_run_serves_a_page_and_runs_the_worker(emptied: Path) -> None:
    with started(flask("run", "-p", "0"), own_environment(emptied), emptied) as server:
        server.wait_for("Completed: Setting status of inactive users")
        address = server.wait_for(r"Running on (http://\S+)")[1]
        with urllib.request.urlopen(address, timeout=30) as response:
            assert response.status == 200
        assert "Traceback" not in server.output


@pytest.mark.promise
def test_a_quick_part_of_the_remaining_tests_passes(emptied: Path) -> None:
    paths = [f"tests/shop/test_{name}.py" for name in ("routes", "access", "name")]
    said = pytest_in(emptied, "-m", "quick", "-k", "sqlite or not server", *paths)
    assert re.search(r"\d\d passed", said)
