"""The tables of books and orders come and go by a migration of their own."""

import re

from flask import Flask
from flask.testing import FlaskCliRunner
from sqlalchemy import Engine, inspect, text
from support.processes import ROOT

import demo
from tests.shop.test_schema import at_revision


def test_the_last_revision_before_0_1_0_works_after_one_command(
    app: Flask, engine: Engine, runner: FlaskCliRunner
) -> None:
    assert runner.invoke(args=["db", "downgrade", "1002"]).exit_code == 0
    at_revision(engine, "0006")
    for command_line in ("db stamp --purge 1002", "db upgrade", "db check"):
        assert runner.invoke(args=command_line.split()).exit_code == 0, command_line
    demo.ensure_ready()


def test_the_pages_statements_drop_the_tables_of_books_and_orders_alone(engine: Engine) -> None:
    before = set(inspect(engine).get_table_names())
    page = (ROOT / "docs" / "your-own-app.md").read_text(encoding="utf-8")
    with engine.begin() as connection:
        for statement in re.findall(r"^    (DROP TABLE \w+);$", page, re.MULTILINE):
            connection.execute(text(statement))
    assert before - set(inspect(engine).get_table_names()) == {"books", "orders"}
