"""The tables of books and orders come and go by a migration of their own."""

from flask import Flask
from flask.testing import FlaskCliRunner
from sqlalchemy import Engine

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
