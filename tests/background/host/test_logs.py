"""The log, the terminal and the JSON: no text ends a request, a command or a reader."""

import json
import logging
import logging.config
import pkgutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, update
from support.databases import on_sqlite
from support.fleet import FLASK_APP, Fleet, Hourly, last_hour
from support.processes import environment

import background
from background import MessageWorker, WorkerContext
from background.database import tables as models
from background.host.logs import logger_of, quieten

# -- a dictConfig of the application ----------------------------------------------------------------

SILENCING: dict[str, Any] = {
    "version": 1,
    "handlers": {"console": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout"}},
    "root": {"level": "INFO", "handlers": ["console"]},
}


@pytest.mark.promise
def test_every_logger_of_the_engine_survives_a_plain_dict_config() -> None:
    program = f"""
import logging, logging.config, pkgutil
from importlib import import_module
import background
for module in pkgutil.iter_modules(background.__path__):
    import_module("background." + module.name)
from background.host.logs import logger_of
logger_of("background.some_worker")
logging.getLogger("elsewhere")
logging.config.dictConfig({SILENCING!r})
names = [name for name in logging.root.manager.loggerDict if name.startswith("background.")]
assert len(names) > 10, names
for name in [*names, "elsewhere"]:
    logging.getLogger(name).warning("heard %s", name)
print("all:", len(names))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), check=True, timeout=60
    )
    *heard, last = done.stdout.splitlines()
    assert len(heard) == int(last.removeprefix("all: "))
    assert "heard elsewhere" not in heard  # the configuration did disable the loggers that it found


def test_every_module_of_the_engine_has_a_logger_that_cannot_be_disabled_by_accident() -> None:
    for module in pkgutil.iter_modules(background.__path__):
        import_module(f"background.{module.name}")
    loggers = [each for name, each in logging.root.manager.loggerDict.items() if name.startswith("background.")]
    ours = [each for each in loggers if isinstance(each, logging.Logger) and each.name.count(".") == 1]
    for each in ours:
        before, each.disabled = each.disabled, True
        assert not each.disabled, f"{each.name}: get it by logger_of"
        each.disabled = before


def test_a_level_silences_a_logger_of_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    logger = logger_of("background.a_quiet_one")
    assert logger is logging.getLogger("background.a_quiet_one") is logger_of("background.a_quiet_one")
    logger.setLevel(logging.ERROR)
    logger.warning("unheard")
    logger.error("heard")
    assert [each.message for each in caplog.records] == ["heard"]


HOST = """
import logging
import time
from datetime import timedelta
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from background import BackgroundWorkerManager, PeriodicWorker

class HelloWorker(PeriodicWorker):
    period = timedelta(hours=1)

    def do_work(self, context):
        pass

logging.basicConfig(level=logging.INFO)
app, db = Flask("host"), SQLAlchemy()
app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:///{path}"
db.init_app(app)
manager = BackgroundWorkerManager(app, db)
manager.add(HelloWorker)
with app.app_context():
    db.create_all()
manager.start()
for _ in range(300):  # the instance joins the fleet in the background
    checked = app.test_cli_runner().invoke(args=["workers", "check"])
    if checked.exit_code == 0:
        break
    time.sleep(0.1)
manager.stop()
assert checked.exit_code == 0, checked.output
"""


@pytest.mark.promise
def test_the_libraries_below_the_engine_are_quiet_in_a_host_that_logs_at_info(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOST.replace("{path}", str(tmp_path / "host.sqlite"))],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    loggers = {line.split(":")[1] for line in done.stderr.splitlines()}
    assert "background.process.supervisor" in loggers
    assert all(name.startswith("background.") for name in loggers), done.stderr


def test_a_level_that_the_application_gave_to_a_library_is_kept() -> None:
    logger = logging.getLogger("a_library")
    logger.setLevel(logging.DEBUG)
    quieten("a_library")
    assert logger.level == logging.DEBUG


# -- a terminal of another encoding -----------------------------------------------------------------


class Failing(Hourly):
    def do_work(self, context: WorkerContext) -> None:
        raise ValueError("Łukasz – 山")


def leave_rows_of_other_characters(fleet: Fleet) -> None:
    fleet.manager(Failing).tick("failing", last_hour())
    with fleet.engine.begin() as connection:
        now = datetime.now(UTC)
        row = {"topic": "notes", "payload": '"Łukasz – 山"', "state": "done", "enqueued_at": now, "due_at": now}
        connection.execute(insert(models.messages).values(row))


@on_sqlite
@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_a_terminal_of_another_encoding_gets_escapes(fleet: Fleet, encoding: str) -> None:
    leave_rows_of_other_characters(fleet)
    commands = fleet.app().test_cli_runner(charset=encoding)
    for arguments in (("workers", "history", "failing"), ("workers", "why", "failing"), ("messages", "list")):
        done = commands.invoke(args=arguments)
        said = done.stdout_bytes.decode("latin-1")
        assert isinstance(done.exception, SystemExit | None), done.output
        assert "ukasz" in said
        assert "\\u5c71" in said or encoding == "ascii"  # Click itself sends UTF-8 to such a terminal


@pytest.mark.promise
@pytest.mark.parametrize("encoding", ["ascii", "cp1252:strict"])
@on_sqlite
def test_a_process_whose_output_has_another_encoding_prints_escapes(fleet: Fleet, encoding: str) -> None:
    leave_rows_of_other_characters(fleet)
    done = subprocess.run(
        [sys.executable, "-m", "flask", "workers", "history", "failing"],
        capture_output=True,
        env=environment(fleet.database_url, FLASK_APP=FLASK_APP, PYTHONIOENCODING=encoding),
        timeout=60,
    )
    said = done.stdout.decode("latin-1")
    assert b"Traceback" not in done.stderr, done.stderr
    assert "ukasz" in said
    assert "\\u5c71" in said or encoding == "ascii"  # Click itself sends UTF-8 to such a terminal


# -- JSON -------------------------------------------------------------------------------------------


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_the_commands_print_valid_json_for_any_row(fleet: Fleet, value: float) -> None:
    class Taking(MessageWorker):
        topic = "notes"

        def handle(self, message: Any, context: WorkerContext) -> None:
            pass

    app = fleet.app(Failing, Taking)
    app.extensions["background_workers"].tick("failing", last_hour())
    with fleet.engine.begin() as connection:
        if fleet.engine.dialect.name == "postgresql" or value == value:  # SQLite has no NaN
            connection.execute(update(models.executions).values(progress_done=value))
        now = datetime.now(UTC)
        row = {"topic": "notes", "payload": json.dumps([value]), "enqueued_at": now, "due_at": now}
        connection.execute(insert(models.messages).values(row))
    runner = app.test_cli_runner()
    history = strict(runner.invoke(args=["workers", "history", "failing", "--json"]).stdout)
    assert history[0]["progress_done"] in (0, None)  # SQLite stores NaN as NULL
    assert strict(runner.invoke(args=["workers", "why", "failing", "--json"]).stdout)["state"] == "failed"
    assert strict(runner.invoke(args=["workers", "list", "--json"]).stdout)
    (message,) = strict(runner.invoke(args=["messages", "list", "--json"]).stdout)
    assert message["payload"] == json.dumps([value])
