"""The engine in an application that is not this shop: its own Flask, its own models, and no settings of ours."""

import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
import svcs
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from support.databases import close
from support.fleet import wait_until
from support.processes import environment, run

from background import BackgroundWorkerManager, Message, MessageWorker, PeriodicWorker, WorkerContext
from background.errors import InvalidConfig

NOW = datetime.now(UTC)


class Host:
    """A small application, and the rows that its workers leave in its table."""

    def __init__(self, url: str) -> None:
        self.app, self.db = Flask("host"), SQLAlchemy()
        self.app.config["SQLALCHEMY_DATABASE_URI"] = url
        self.db.init_app(self.app)
        self.notes = self.db.Table("notes", self.db.Column("text", self.db.String(100)))

    def bind(self) -> BackgroundWorkerManager:
        manager = BackgroundWorkerManager(self.app, self.db)
        for worker in (Noting, Taking):
            worker.notes = self.notes
            manager.add(worker)
        with self.app.app_context():
            self.db.create_all()
        return manager

    def noted(self) -> list[str]:
        with self.app.app_context():
            return sorted(self.db.session.scalars(self.db.select(self.notes.c.text)))


class Noting(PeriodicWorker):
    period = timedelta(days=300)
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        context.session.execute(self.notes.insert().values(text="a tick"))


class Taking(MessageWorker):
    topic = "notes"

    def handle(self, message: Message, context: WorkerContext) -> None:
        context.session.execute(self.notes.insert().values(text=message.payload))


@pytest.fixture
def host(empty_database_url: str) -> Iterator[Host]:
    host = Host(empty_database_url)
    yield host
    if "background_workers" in host.app.extensions:
        host.app.extensions["background_workers"].stop()
    with host.app.app_context():
        host.db.engine.dispose()
    close()


def test_ticks_messages_and_locks_need_no_setting_of_the_shop(host: Host) -> None:
    manager = host.bind()
    assert manager.tick("noting", NOW).state == "succeeded"
    assert manager.tick("noting", NOW) is None
    with host.app.app_context():
        assert manager.enqueue("notes", "a message")
        host.db.session.commit()
    with manager.lock("invoice-42") as lock:
        assert lock.still_held()
    manager.start()
    wait_until(lambda: host.noted() == ["a message", "a tick"], "the message")


def test_the_applications_settings_are_kept_and_the_heartbeat_follows_the_lease(host: Host) -> None:
    host.app.config["WORKERS_LEASE_SECONDS"] = 4
    host.bind()
    assert host.app.config["WORKERS_LEASE_SECONDS"] == 4
    assert host.app.config["WORKERS_HEARTBEAT_SECONDS"] == 1


def test_a_setting_that_is_written_as_text_is_cast(host: Host) -> None:
    host.app.config |= {"WORKERS_LEASE_SECONDS": "10", "WORKERS_ENABLED": "no", "WORKERS_THREADS": "3"}
    manager = host.bind()
    assert host.app.config["WORKERS_LEASE_SECONDS"] == 10
    assert host.app.config["WORKERS_ENABLED"] is False
    assert host.app.config["WORKERS_THREADS"] == 3
    assert manager.tick("noting", NOW).state == "succeeded"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"WORKERS_LEASE_SECONDS": "ten"}, "WORKERS_LEASE_SECONDS is 'ten'; expected a number of seconds from 0.5"),
        ({"WORKERS_THREADS": 0}, "WORKERS_THREADS is 0; expected a whole number from 1 to 1000"),
        ({"WORKERS_HEARTBEAT_SECONDS": 60, "WORKERS_LEASE_SECONDS": 4}, "WORKERS_LEASE_SECONDS is 4; expected more"),
        ({"WORKERS_LEASE_SECOND": 4}, "There is no setting WORKERS_LEASE_SECOND. Did you mean WORKERS_LEASE_SECONDS?"),
        ({"METRICS_TOKEN": "two words"}, "METRICS_TOKEN is a value that is not shown; expected printable ASCII"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_key_value_and_remedy(
    host: Host, given: dict[str, object], said: str
) -> None:
    host.app.config |= given
    with pytest.raises(InvalidConfig, match=re.escape(said)):
        host.bind()


def test_a_hosts_own_setting_may_begin_like_an_engine_setting(host: Host) -> None:
    host.app.config |= {"METRICS_PORT": 9100, "WORKERS_COMP": "a department", "MESSAGES_PER_PAGE": 20}
    host.bind()


def test_services_are_there_whether_or_not_the_application_uses_svcs(host: Host) -> None:
    class Serving(PeriodicWorker):
        period = timedelta(hours=1)
        run_on_first_start = True

        def do_work(self, context: WorkerContext) -> None:
            context.session.execute(Noting.notes.insert().values(text=context.services.get(str)))

    manager = host.bind()
    manager.add(Serving)
    svcs.flask.register_value(host.app, str, "a service")
    assert manager.tick("serving", NOW).state == "succeeded"
    assert host.noted() == ["a service"]


@pytest.mark.parametrize("given", ["app", "db"])
def test_a_manager_with_only_one_of_its_two_arguments_is_refused(given: str) -> None:
    half = {"app": Flask("host")} if given == "app" else {"db": SQLAlchemy()}
    with pytest.raises(TypeError, match=r"expected both, or neither and `init_app\(app, db\)`"):
        BackgroundWorkerManager(**half)


SILENT = """
from datetime import UTC, datetime, timedelta
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from background import BackgroundWorkerManager, PeriodicWorker

class Failing(PeriodicWorker):
    period = timedelta(hours=1)
    run_on_first_start = True
    def do_work(self, context):
        context.logger.info("a line for an info log")
        raise ZeroDivisionError("the worker's own")

app, db = Flask("host"), SQLAlchemy()
app.config["SQLALCHEMY_DATABASE_URI"] = "{url}"
db.init_app(app)
manager = BackgroundWorkerManager(app, db)
manager.add(Failing)
with app.app_context():
    db.create_all()
print(manager.tick("failing", datetime.now(UTC)).state)
"""


@pytest.mark.promise
def test_without_a_configured_log_a_failure_is_printed_on_standard_error(tmp_path) -> None:
    url = f"sqlite:///{tmp_path / 'host.sqlite'}"
    code, said = run([sys.executable, "-c", SILENT.replace("{url}", url)], environment())
    assert code == 0
    assert "ZeroDivisionError: the worker's own" in said
    assert "a line for an info log" not in said
    assert said.endswith("failed")
