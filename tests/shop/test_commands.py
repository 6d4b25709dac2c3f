"""The engine's commands in the shop, whose database may not exist yet."""

import os
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from support.databases import close
from support.fork_server import Nursery
from support.processes import ROOT, environment
from support.shop import settings

from app import create_app

Command = Callable[..., subprocess.CompletedProcess[str]]
PASSIVE = "passive_user_checker_worker"


@pytest.fixture
def command(nursery: Nursery, tmp_path: Path) -> Command:
    """Run `flask workers` in a process of its own."""

    def command(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        call, errors = [sys.executable, "-m", "flask", "workers", *arguments], tmp_path / "errors"
        code, output = nursery.run(call, environment(**{"FLASK_APP": "app", **more}), errors)
        return subprocess.CompletedProcess(call, code, output, errors.read_text())

    return command


def test_check_of_a_database_without_a_schema_names_the_command_that_mends_it(empty_database_url: str) -> None:
    app = create_app(settings(empty_database_url))
    try:
        for command in ("check", "list", "why", "history", "pause", "run", "trigger"):
            arguments = [command] if command in ("check", "list", "run") else [command, PASSIVE]
            result = app.test_cli_runner().invoke(args=["workers", *arguments])
            assert result.exit_code == 1, (command, result.output)
            assert len(result.stderr.splitlines()) == 1
            assert "`flask db upgrade`" in result.stderr
    finally:
        close(app)


EMBEDDED = """
    import os

    import app as bookstore


    class Flask(bookstore.Flask):
        def __init__(self, name, **more):
            super().__init__(name, instance_path=os.environ["INSTANCE"], **more)


    bookstore.Flask = Flask
    create_app = bookstore.create_app
"""


def test_check_on_the_embedded_default_makes_no_database(tmp_path: Path, command: Command) -> None:
    (tmp_path / "embedded.py").write_text(textwrap.dedent(EMBEDDED))
    instance = tmp_path / "instance"
    instance.mkdir()
    result = command("check", FLASK_APP="embedded", PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}", INSTANCE=str(instance))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "does not exist. Make it with `flask run`." in result.stderr
    assert list(instance.iterdir()) == []


def test_a_server_that_does_not_answer_is_one_sentence(command: Command) -> None:
    result = command("check", DATABASE_URL="postgresql://reader:hidden@127.0.0.1:9/shop")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "hidden" not in result.stderr
    assert "cannot be reached" in result.stderr


def test_without_a_schema_the_commands_for_messages_print_one_sentence(empty_database_url: str) -> None:
    app = create_app(settings(empty_database_url))
    try:
        for arguments in (["list"], ["show", "1"], ["retry", "--all"], ["discard", "1"], ["stats"]):
            result = app.test_cli_runner().invoke(args=["messages", *arguments])
            assert result.exit_code == 1, (arguments, result.output)
            assert result.stderr.count("\n") == 1
            assert "`flask db upgrade`" in result.stderr
    finally:
        close(app)


def test_run_on_a_database_that_is_not_ready_ends_with_a_sentence(empty_postgresql_url: str, command: Command) -> None:
    result = command("run", DATABASE_URL=empty_postgresql_url)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: The database ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["init-db", "reset-password", "demo"])
def test_the_help_of_the_applications_commands_has_examples_and_types(sqlite_url: str, name: str) -> None:
    app = create_app(settings(sqlite_url))
    command = app.cli.commands[name]
    with command.make_context(name, ["--help"], resilient_parsing=True) as context:
        text = command.get_help(context)
    assert "TEXT" not in text
    examples = [shlex.split(line)[2:] for line in text.partition("Examples:")[2].splitlines() if line.strip()]
    assert examples
    for words in examples:
        command.make_context(name, words)
    close(app)
