"""The help texts: their examples are accepted, and their options have types."""

import shlex
from collections.abc import Iterator
from datetime import timedelta

import click
import pytest
from flask import Flask
from support.databases import close, on_sqlite
from support.fleet import make_app

from background import Message, MessageWorker, PeriodicWorker, WorkerContext, messages_cli, workers_cli
from background.testing import drain

GROUPS: dict[str, click.Group] = {"workers": workers_cli, "messages": messages_cli}
COMMANDS = [(group, name) for group, cli in GROUPS.items() for name in cli.commands]


class Greet(PeriodicWorker):
    period = timedelta(minutes=10)

    def do_work(self, context: WorkerContext) -> None:
        pass


class Count(MessageWorker):
    topic = "orders"
    max_attempts = 1

    def handle(self, message: Message, context: WorkerContext) -> None:
        raise ValueError("no such book")


@pytest.fixture
def app(database_url: str) -> Iterator[Flask]:
    app = make_app(database_url, Greet, Count)
    manager = app.extensions["background_workers"]
    with app.app_context():
        assert manager.enqueue("orders", 1) == 1
        manager.db.session.commit()
    assert drain(app, "orders").dead == 1
    yield app
    close(app)


def examples(command: click.Command) -> list[list[str]]:
    lines = (command.epilog or "").splitlines()
    assert lines[:2] == ["\b", "Examples:"], command.name
    return [shlex.split(line, comments=True) for line in lines[2:]]


def test_each_command_and_each_group_has_examples_of_itself() -> None:
    for group, name in COMMANDS:
        found = examples(GROUPS[group].commands[name])
        assert found
        assert all(words[:3] == ["flask", group, name] for words in found)
    assert all(words[:2] == ["flask", name] for name, group in GROUPS.items() for words in examples(group))


ENDLESS = ("--watch", "--test")


@on_sqlite
@pytest.mark.parametrize(("group", "name"), COMMANDS)
def test_each_example_is_accepted(app: Flask, group: str, name: str) -> None:
    """All are executed, but not a command that runs until a signal, or that needs a channel for alerts."""
    values = {"NAME": "greet", "TOPIC": "orders", "ID": "1", "FIRST_NAME": "greet", "SECOND_NAME": "count"}
    command = GROUPS[group].commands[name]
    for words in examples(command):
        arguments = [values.get(word, word) for word in words[1:]]
        if set(ENDLESS) & set(words) or arguments[:2] == ["workers", "run"]:
            command.make_context(name, arguments[2:])
        else:
            result = app.test_cli_runner().invoke(args=arguments)
            assert result.exit_code in (0, 1), (words, result.output)
            assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)


@pytest.mark.parametrize(("group", "name"), COMMANDS)
def test_each_option_says_the_type_of_its_value(group: str, name: str) -> None:
    command = GROUPS[group].commands[name]
    with command.make_context(name, ["--help"], resilient_parsing=True) as context:
        assert "TEXT" not in command.get_help(context)
