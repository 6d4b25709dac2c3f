"""A database that the migrations before 0.1.0 made has the shop's tables."""

from flask import Flask
from flask.testing import FlaskCliRunner
from sqlalchemy import Engine

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
