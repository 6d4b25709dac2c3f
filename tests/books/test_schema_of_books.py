"""The tables of books and orders come and go by a migration of their own."""

import re

from flask import Flask
from flask.testing import FlaskCliRunner
from sqlalchemy import Engine, inspect
from support.processes import ROOT

import demo
from tests.shop.test_schema import at_revision


def test_the_last_revision_before_0_1_0_works_after_one_command(
    app: Flask, engine: Engine, runner: FlaskCliRunner
) -> None:
    at_revision(engine, "0006")
    assert runner.invoke(args=["db", "stamp", "--purge", "1002"]).exit_code == 0
    demo.ensure_ready()
    for command_line in ("db upgrade", "db check"):
        assert runner.invoke(args=command_line.split()).exit_code == 0, command_line


def test_the_pages_downgrade_drops_the_tables_of_books_and_orders_alone(engine: Engine, runner: FlaskCliRunner) -> None:
    before = set(inspect(engine).get_table_names())
    page = (ROOT / "docs" / "your-own-app.md").read_text(encoding="utf-8")
    revision = re.search(r"^    flask db downgrade (\S+)$", page, re.MULTILINE)[1]
    done = runner.invoke(args=["db", "downgrade", revision])
    assert done.exit_code == 0, done.output
    assert before - set(inspect(engine).get_table_names()) == {"books", "orders"}
