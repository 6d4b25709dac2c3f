"""The shop's log and JSON: no text ends a request, and each line can be read by a machine."""

import io
import json
import logging
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from support.databases import close
from support.processes import ROOT
from support.shop import settings

from app import create_app
from config import hide_password_links, json_formatter, spell_failed_path_out
from models import db


class Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("%d books", ("three",)),
        ("%s and %s", ("one",)),
        ("%(name)s", ("three",)),
        ("%s", (Unspeakable(),)),
        (Unspeakable(), ()),
        ("100%", ("full",)),
        ("no place", ("for this",)),
    ],
)
def test_a_record_that_cannot_be_formatted_does_not_end_the_request(
    tmp_path: Path, message: Any, arguments: tuple[Any, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    app = create_app(settings(f"sqlite:///{tmp_path / 'never.sqlite'}"))

    @app.get("/list")
    def list_books() -> str:
        app.logger.info(message, *arguments)
        return "fine"

    app.logger.setLevel(logging.INFO)
    handler = logging.StreamHandler(io.StringIO())
    app.logger.addHandler(handler)
    app.logger.propagate = False
    try:
        assert app.test_client().get("/list").text == "fine"
    finally:
        app.logger.removeHandler(handler)
        app.logger.propagate = True
    assert "--- Logging error ---" in capsys.readouterr().err


def test_the_filters_pass_a_record_that_cannot_be_formatted() -> None:
    record = logging.LogRecord("app", logging.INFO, "", 0, "%d books", ("three",), None, "log_exception")
    assert hide_password_links(record)
    assert spell_failed_path_out(record)
    assert (record.msg, record.args) == ("%d books", ("three",))


# -- values in errors -------------------------------------------------------------------------------


def test_the_errors_of_every_bind_hide_their_values(tmp_path: Path) -> None:
    binds = {
        "archive": f"sqlite:///{tmp_path / 'archive.sqlite'}",
        "reports": {"url": f"sqlite:///{tmp_path / 'reports.sqlite'}"},
        "open": {"url": f"sqlite:///{tmp_path / 'open.sqlite'}", "hide_parameters": False},
    }
    app = create_app(settings(f"sqlite:///{tmp_path / 'shop.sqlite'}", SQLALCHEMY_BINDS=binds))
    with app.app_context():
        for name, engine in db.engines.items():
            with engine.connect() as connection, pytest.raises(DBAPIError) as raised:
                connection.execute(text("SELECT * FROM missing WHERE password = :password"), {"password": "hunter2"})
            assert ("hunter2" in str(raised.value)) == (name == "open")
    close(app)


# -- JSON -------------------------------------------------------------------------------------------


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_view_returns_valid_json_for_any_number(app: Flask, value: float) -> None:
    @app.get("/numbers")
    def numbers() -> dict[str, Any]:
        return {"value": value, "title": "Łódź", "infinity": "Infinity"}

    answer = app.test_client().get("/numbers")
    assert strict(answer.text) == {"value": None, "title": "Łódź", "infinity": "Infinity"}


def test_a_log_in_json_is_json_whatever_is_added_to_a_record() -> None:
    record = logging.LogRecord("app", logging.INFO, "", 0, "Took %s", (float("nan"),), None)
    record.took, record.at = float("inf"), datetime(2026, 1, 1, tzinfo=UTC)  # type: ignore[attr-defined]
    line = strict(json_formatter().format(record))
    assert (line["message"], line["took"], line["at"][:10]) == ("Took nan", None, "2026-01-01")


PROGRAM = """
import logging
import re
from datetime import UTC, datetime, timedelta
from app import create_app
from background import PeriodicWorker

class Talking(PeriodicWorker):
    period = timedelta(hours=1)
    run_on_first_start = True
    def do_work(self, context):
        context.logger.info("Counting %s", "sheep")
        logging.getLogger("a.library").warning("Wolf")
        raise ValueError("eaten")

app = create_app({"DATABASE_URL": "sqlite://", "LOG_FORMAT": "json"})
workers = app.extensions["background_workers"]
workers.add(Talking)
workers.prepare()
workers.tick("talking", datetime.now(UTC))
app.logger.info("Outside")
workers.stop()
"""


@pytest.mark.promise
def test_a_log_in_json_names_worker_tick_execution_and_instance_in_every_line_of_a_run(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    ours = [line for line in lines if "worker" in line]
    assert [line["message"] for line in ours[:2]] == ["Counting sheep", "Wolf"]
    assert ours[2]["exc_info"].endswith("ValueError: eaten")
    assert {(line["worker"], line["execution"]) for line in ours} == {("talking", 1)}
    assert all(datetime.fromisoformat(line["tick"]).tzinfo and ":" in line["instance"] for line in ours)
    outside = next(line for line in lines if line["message"] == "Outside")
    assert not {"worker", "tick", "execution", "instance"} & outside.keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", outside["time"])
