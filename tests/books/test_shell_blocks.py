"""Each block of shell commands in the README and in docs/ is executed: here, or by the test that TESTED names."""

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

import click
import pytest
from flask import Flask
from flask.cli import FlaskGroup, ScriptInfo
from support.processes import environment, flask, run, started
from support.shop import settings

from app import create_app
from background import Message, MessageWorker, WorkerContext, current_workers
from background.testing import drain
from models import db
from tests.books.documents import PAGES, ROOT, blocks, text

README, QUICKSTART = "README.md", "docs/quickstart.md"
DEPLOYING, OWN_APP = "docs/deploying.md", "docs/your-own-app.md"
DOCUMENTS, EMPTIED = "tests/books/test_documents.py", "tests/books/test_emptying.py"
DEPLOYED = "tests/deploy/test_deploying.py"

ON_A_FLEET = ("docs/messages.md", "docs/operating.md")
WITH_TOOLS = ("docs/incidents.md", "docs/promise.md", "docs/upgrading.md")

# The blocks of the other pages: the page, the beginning of the block, and the file and the function that execute it.
TESTED = (
    (README, "python3 -m venv", ".ci/run", "first_command"),
    (README, ". .venv", DOCUMENTS, "test_the_deploy_commands_all_use_the_same_database"),
    (QUICKSTART, "python3 -m venv", "tests/books/test_shell_blocks.py", "test_the_quickstart_begins_as_the_readme"),
    (QUICKSTART, "flask db migrate", DOCUMENTS, "test_the_quickstart_leads_to_a_table_a_worker_and_a_test"),
    (QUICKSTART, "flask workers trigger", DOCUMENTS, "test_the_quickstart_leads_to_a_table_a_worker_and_a_test"),
    (QUICKSTART, "pytest", DOCUMENTS, "test_the_quickstart_leads_to_a_table_a_worker_and_a_test"),
    (DEPLOYING, "export DATABASE_URL", DEPLOYED, "test_the_commands_of_production_and_of_migrations_work"),
    (DEPLOYING, "useradd", DEPLOYED, "test_the_commands_for_one_machine_work"),
    (DEPLOYING, "cp deploy/nginx", DEPLOYED, "test_the_commands_for_one_machine_work"),
    (DEPLOYING, "# SQLite", "tests/deploy/test_restoring.py", "execute"),
    (DEPLOYING, "# PostgreSQL", "tests/deploy/test_restoring.py", "execute"),
    (DEPLOYING, "python3 -m venv", "tests/deploy/test_lock.py", "test_a_deployment_installs_by_hash"),
    (DEPLOYING, "PGOPTIONS", DEPLOYED, "test_the_commands_of_production_and_of_migrations_work"),
    (OWN_APP, "rm -r books.py", EMPTIED, "make_emptied"),
    (OWN_APP, "DROP TABLE", EMPTIED, "test_the_shops_tables_are_dropped_and_own_tables_made"),
    (OWN_APP, "flask db migrate", EMPTIED, "test_the_shops_tables_are_dropped_and_own_tables_made"),
    (OWN_APP, "pip wheel", "tests/promise/test_wheel.py", "wheel"),
    (OWN_APP, "pip install dist", "tests/promise/test_wheel.py", "wheel"),
    (
        "docs/performance.md",
        "python -m",
        "tests/benchmarks/test_harness.py",
        "test_each_command_of_the_page_is_accepted",
    ),
    ("docs/testing.md", "[tool.pytest", "tests/promise/test_wheel.py", "test_pytest_finds_the_fixtures_by_itself"),
)

# Blocks that are not commands.
DRAWINGS = (
    "1 tests/",
    "INFO background.",
    "WARNING security:",
    "APScheduler -> ",
    "testing       --> ",
    "2 * (WORKERS_THREADS",
)


@pytest.mark.parametrize("page", PAGES)
def test_each_block_of_commands_is_executed(page: str) -> None:
    found = [each for each in blocks(page) if not each.startswith(DRAWINGS)]
    if page in (*ON_A_FLEET, *WITH_TOOLS):
        assert found
        return
    for block in found:
        named = [(path, name) for of, start, path, name in TESTED if of == page and block.startswith(start)]
        assert named, f"No test executes this block of {page}:\n{block}"
        for path, name in named:
            assert re.search(rf"^(def )?{name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), name


def test_the_quickstart_begins_as_the_readme() -> None:
    assert blocks(QUICKSTART)[0] == blocks(README)[0].splitlines(keepends=True)[0]


# -- commands on a fleet ---------------------------------------------------------------------------


class BrokenWorker(MessageWorker):
    topic = "broken"
    max_attempts = 1

    def handle(self, message: Message, context: WorkerContext) -> None:
        raise ValueError("out of paper")


@pytest.fixture
def dead_letter(app: Flask) -> int:
    """Return the id of a dead letter, in a topic that only this application has."""
    app.extensions["background_workers"].add(BrokenWorker)
    with app.app_context():
        found = current_workers.enqueue("broken", {})
        db.session.commit()
    assert drain(app, "broken").dead == 1
    assert found is not None
    return found


@pytest.mark.promise
@pytest.mark.parametrize("page", ON_A_FLEET)
def test_the_commands_of_the_page_succeed(app: Flask, dead_letter: int, database_url: str, page: str) -> None:
    """The line `flask workers run` of the page is the process beside which the other lines are executed."""
    values = {"NAME": "system_health_worker", "ID": str(dead_letter), "JSON": "{}"}
    values |= dict.fromkeys(("TOPIC", "deliveries"), "broken")
    with alive(database_url) if START in lines(page) else nullcontext():
        values["TIME"] = datetime.now(UTC).isoformat()  # the worker has run a tick by now
        for line in lines(page):
            if line != START:
                succeed([values.get(word, word) for word in line], app)


START = ["flask", "workers", "run"]


@contextmanager
def alive(database_url: str) -> Iterator[None]:
    with started(flask("workers", "run"), environment(database_url, FLASK_APP="app:create_app")) as process:
        process.wait_for("system_health_worker: Ran the tick")
        yield


# -- commands of tools -----------------------------------------------------------------------------


@pytest.mark.promise
@pytest.mark.parametrize("page", WITH_TOOLS)
def test_the_commands_of_the_page_are_accepted(app: Flask, page: str) -> None:
    for line in lines(page):
        succeed(line, app)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make, of Debian's package of that name")
def test_make_has_each_target_for_contributors() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:^    |`)make (\w+)", page, re.MULTILINE))
    assert {"setup", "test"} < targets
    code, said = run(["make", "--dry-run", *sorted(targets)], environment())
    assert code == 0, said


@pytest.mark.parametrize("page", PAGES)
def test_each_command_in_a_sentence_is_accepted(tmp_path: Path, page: str) -> None:
    """The command's own parser reads it. No command is executed."""
    app = create_app(settings(f"sqlite:///{tmp_path / 'unused.sqlite'}"))
    for found in re.findall(r"`(flask [^`]+)`", text(page)):
        for command in found.split(" && "):
            parse(shlex.split(command)[1:], app)


def parse(words: list[str], app: Flask) -> None:
    command: click.Command | None = FlaskGroup(create_app=lambda: app)
    if words[0] == "--app":
        del words[:2]
    with click.Context(command, obj=ScriptInfo(create_app=lambda: app)) as context:
        while isinstance(command, click.Group) and words:
            name = words.pop(0)
            command = command.get_command(context, name)
            assert command is not None, name
        if not isinstance(command, click.Group):
            command.make_context(name, words, context)


def lines(page: str) -> list[list[str]]:
    """Return the words of each command of the page."""
    commands = [block for block in blocks(page) if not block.startswith(DRAWINGS)]
    split = [shlex.split(line, comments=True) for block in commands for line in block.splitlines()]
    return [words for words in split if words]


def succeed(words: list[str], app: Flask) -> None:
    """Execute the command. pip installs nothing, pytest runs no test, and the soak only reads its arguments."""
    match words:
        case ["flask", *arguments]:
            done = app.test_cli_runner().invoke(FlaskGroup(create_app=lambda: app), arguments)
            assert done.exit_code == 0, (words, done.output)
            return
        case ["pip", "install", *arguments]:
            command = ["-m", "pip", "install", "--dry-run", "--no-index", "--disable-pip-version-check", *arguments]
        case ["pytest", *arguments]:
            command = ["-m", "pytest", "--collect-only", "-q", *arguments]
        case ["python", "-m", "benchmarks.soak", *arguments]:
            command = ["-c", "from benchmarks.soak import parse; parse()", *arguments]
        case _:
            pytest.fail(f"No test knows how to execute {words}.")
    code, said = run([sys.executable, *command], environment())
    assert code == 0, said
