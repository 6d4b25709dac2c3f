"""Which process runs the workers, for each way to start the shop, with real starts."""

import os
import re
import shutil
import signal
import sqlite3
import sys
import time
import urllib.request
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from sqlalchemy import make_url
from support.databases import close, on_sqlite
from support.fork_server import Nursery
from support.processes import PRODUCTION, ROOT, Process, environment, eventually, flask, gunicorn, margin, run, started
from support.run_traces import Effects
from support.servers import served
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.test import Client

from app import create_app

ENDS = r"Process (\d+) ends with threads \[(.*)\] and (\d+) connections made"


def get(url: str) -> int:
    with urllib.request.urlopen(url, timeout=30) as response:
        return int(response.status)


@pytest.fixture
def effects(database_url: str) -> Effects:
    return Effects(database_url)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Give a fresh clone: the project's files, and an empty instance/."""
    clone = tmp_path / "clone"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "tests", "benchmarks", "instance")
    shutil.copytree(ROOT, clone, ignore=ignored)
    (clone / "instance").mkdir()
    return clone


def clone_environment(clone: Path, **more: object) -> dict[str, str]:
    env = environment(FLASK_APP="", PYTHONPATH=clone, SECRET_KEY="", **more)
    return {name: value for name, value in env.items() if value}


# -- flask run -------------------------------------------------------------------------------------


def test_flask_run_prepares_a_fresh_clone_and_its_worker_runs_within_two_seconds(shop: Path) -> None:
    with started(flask("run", "--port", "0"), clone_environment(shop), shop) as server:
        server.wait_for(r"The admin is admin@example\.com, the password \S+ ")
        prepared = time.monotonic()
        server.wait_for("Starting: Setting status of inactive users...")
        server.wait_for(r"Set 5 users to passive\.")
        server.wait_for("Completed: Setting status of inactive users...")
        assert time.monotonic() - prepared < 2 + margin()
        assert get(server.wait_for(r"Running on (http://\S+)")[1]) == 200
        server.signal(signal.SIGINT)
        assert server.wait() == 0
        assert "Traceback" not in server.output
    with started(flask("run", "--port", "0"), clone_environment(shop), shop) as again:
        again.wait_for(r"`flask reset-password admin@example\.com` makes a new one")
        again.wait_for("joined")
        again.signal(signal.SIGTERM)
        assert again.wait() == 0
        assert "The admin is" not in again.output


def test_four_processes_that_start_at_once_prepare_a_fresh_clone_once(shop: Path) -> None:
    with ExitStack() as stack:
        servers = [
            stack.enter_context(started(flask("run", "--port", "0"), clone_environment(shop), shop)) for _ in range(4)
        ]
        for server in servers:
            server.wait_for("joined with 7 workers")
            assert get(server.wait_for(r"Running on (http://\S+)")[1]) == 200
        ran = re.compile("(checker|history)_worker: Ran the tick")  # the third runs at every full minute
        assert eventually(lambda: len({name for server in servers for name in ran.findall(server.output)}) == 2)
        for server in servers:
            server.signal(signal.SIGINT)
        assert [server.wait() for server in servers] == [0, 0, 0, 0]
        everything = "\n".join(server.output for server in servers)
    assert everything.count("The admin is") == 1
    assert everything.count("Set 5 users to passive.") == 1
    assert "Traceback" not in everything
    with closing(sqlite3.connect(shop / "instance" / "bookstore.sqlite")) as connection:
        assert connection.execute("SELECT count(*) FROM users WHERE is_admin").fetchone() == (1,)
        times = connection.execute(
            "SELECT worker, count(*) FROM background_executions WHERE worker NOT LIKE 'system%' GROUP BY worker, tick"
        ).fetchall()
        assert {worker for worker, _ in times} == {
            f"{name}_worker" for name in ("passive_user_checker", "prune_history", "prune_audit")
        }
        assert {count for _, count in times} == {1}


@pytest.mark.parametrize(
    ("place", "says", "remedy"),
    [
        ("sqlite:///{folder}/none.sqlite", "does not exist", "flask db upgrade"),
        ("postgresql://reader@127.0.0.1:1/none", "cannot be reached", "Start its server"),
        ("{postgresql}/none", "does not exist on its server", "createdb"),
        ("{empty}", "has no schema", "flask db upgrade"),
    ],
)
def test_flask_run_names_the_database_that_is_not_ready_and_the_command_that_prepares_it(
    place: str, says: str, remedy: str, tmp_path: Path, empty_postgresql_url: str, nursery: Nursery
) -> None:
    missing = make_url(empty_postgresql_url).set(database="none").render_as_string(hide_password=False)
    url = missing if "{postgresql}" in place else place.format(folder=tmp_path, empty=empty_postgresql_url)
    code, output = nursery.run(flask("run", "--port", "0"), environment(url))
    error = output.splitlines()[-2:]
    assert code == 1
    assert says in output
    assert remedy in output
    assert (make_url(url).database or "?") in output, error
    assert "Traceback" not in output
    assert not (tmp_path / "none.sqlite").exists()


def test_flask_run_names_the_command_for_a_database_behind_the_migrations(shop: Path, sqlite_url: str) -> None:
    newest = max((shop / "migrations" / "versions").glob("*.py")).stem.partition("_")[0]
    (shop / "migrations" / "versions" / "9999_later.py").write_text(
        f'revision = "9999"\ndown_revision = "{newest}"\n\n\ndef upgrade():\n    pass\n'
    )
    code, output = run(flask("run", "--port", "0"), clone_environment(shop, DATABASE_URL=sqlite_url), shop)
    assert code == 1
    assert "behind this release's 9999" in output
    assert "flask db upgrade" in output
    assert "Traceback" not in output


def test_flask_run_with_workers_disabled_serves_and_runs_no_worker(sqlite_url: str, nursery: Nursery) -> None:
    env = environment(sqlite_url, WORKERS_ENABLED="false")
    with nursery.forked(flask("run", "--port", "0"), env) as server:
        assert get(server.wait_for(r"Running on (http://\S+)")[1]) == 200
        server.signal(signal.SIGINT)
        server.wait()
        assert "workers" not in server.wait_for(ENDS)[2]
    assert Effects(sqlite_url).instances() == set()


@on_sqlite
def test_flask_run_debug_runs_the_workers_in_the_serving_child_only_and_across_a_reload(
    effects: Effects, tmp_path: Path
) -> None:
    edited = tmp_path / "edited.py"
    edited.touch()
    env = environment(effects.url)
    env["PYTHONPATH"] += os.pathsep + str(tmp_path)
    with started(flask("run", "--debug", "--port", "0"), env, terminal=True) as server:
        server.wait_for("joined")
        first = eventually(effects.pids)
        assert get(server.wait_for(r"Running on (http://\S+)")[1]) == 200  # by now it knows the age of its files
        os.utime(edited, (time.time() + 5, time.time() + 5))
        server.wait_for("Detected change")
        server.wait_for("joined", times=2)
        both = eventually(lambda: pids if len(pids := effects.pids()) == 2 else None)
        server.signal_group(signal.SIGINT)
        assert server.wait() == 0
        server.wait_for(rf"Process {server.pid} ends with threads \['MainThread'\] and 0 connections made")
    assert both
    assert first
    assert first < both
    assert server.pid not in both | effects.instances()
    assert effects.instances(alive=True) == set()
    effects.check_once()


# -- gunicorn --------------------------------------------------------------------------------------


@pytest.fixture(
    params=[("sqlite", 1, "sync", False), ("postgresql", 4, "gthread", True)],
    ids=["one-sync-worker-on-sqlite", "four-preloaded-gthread-workers-on-postgresql"],
)
def gunicorn_case(request: pytest.FixtureRequest) -> tuple[Effects, int, list[str]]:
    engine, workers, kind, preload = request.param
    effects = Effects(request.getfixturevalue(f"{engine}_url"))
    options = ["-w", str(workers), "-k", kind, *(["--preload"] if preload else [])]
    return effects, workers, gunicorn(*options, "--max-requests", "3", "support.traced_app:create_app()")


def test_gunicorn_runs_the_workers_in_each_worker_across_hup_and_max_requests_and_never_in_the_master(
    gunicorn_case: tuple[Effects, int, list[str]], nursery: Nursery
) -> None:
    effects, workers, command = gunicorn_case
    with nursery.forked(command, environment(effects.url)) as server:
        server.wait_for("joined", times=workers)
        address = server.wait_for(r"Listening at: (http://\S+)")[1]
        before = effects.instances()
        assert len(before) == workers

        server.signal(signal.SIGHUP)
        server.wait_for("joined", times=2 * workers)
        reloaded = effects.instances() - before
        assert len(reloaded) == workers
        assert eventually(lambda: effects.instances(alive=True) == reloaded)

        for _ in range(3 * workers):  # at least one process has had its three requests
            assert get(address) == 200
        server.wait_for("joined", times=2 * workers + 1)
        ticks = len(effects.ticks())
        assert eventually(lambda: len(effects.ticks()) >= ticks + 2)
        restarts = server.output.count("Autorestarting worker")
        server.wait_for("joined", times=2 * workers + restarts)  # gunicorn loses a signal right after the fork

        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        if "--preload" in command:  # otherwise the master never sees the application
            server.wait_for(rf"Process {server.pid} ends with threads \['MainThread'\] and 0 connections made")
        assert "Traceback" not in server.output
    assert server.pid not in effects.instances() | effects.pids()
    assert effects.instances(alive=True) == set()
    effects.check_once()


def test_gunicorn_goes_on_without_workers_when_they_are_disabled(postgresql_url: str, nursery: Nursery) -> None:
    effects = Effects(postgresql_url)
    env = environment(postgresql_url, WORKERS_ENABLED="no")
    with nursery.forked(gunicorn("-w", "1", "support.traced_app:create_app()"), env) as server:
        assert get(server.wait_for(r"Listening at: (http://\S+)")[1]) == 200
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert effects.instances() == set()


REFUSED = """
import app
from background import PeriodicWorker


class Endless(PeriodicWorker):
    def do_work(self, context):
        pass


def create_app():
    made = app.create_app()
    made.extensions["background_workers"].add(Endless)
    return made
"""


@pytest.mark.parametrize("more", [(), ("--preload",)], ids=["gunicorn", "preload"])
def test_gunicorn_ends_with_one_sentence_about_a_refused_worker(
    sqlite_url: str, tmp_path: Path, more: tuple[str, ...]
) -> None:
    (tmp_path / "refused.py").write_text(REFUSED)
    env = environment(sqlite_url, PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))))
    code, output = run(gunicorn("-w", "1", *more, "refused:create_app()"), env)
    assert code == (1 if more else 3)
    assert output.count("'endless': it has neither a period nor a cron") == 1
    assert "Traceback" not in output


def test_gunicorn_serves_a_wrapped_application_whose_workers_start_with_the_first_request(
    sqlite_url: str, nursery: Nursery
) -> None:
    effects = Effects(sqlite_url)
    with nursery.forked(gunicorn("-w", "1", "support.traced_app:wrapped()"), environment(sqlite_url)) as server:
        assert get(server.wait_for(r"Listening at: (http://\S+)")[1]) == 200
        server.wait_for("Background workers start with the first request")
        server.wait_for("joined")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert "Traceback" not in server.output
    assert effects.instances(alive=True) == set()


def test_gunicorn_waits_for_a_database_and_serves_meanwhile(
    tmp_path: Path, template_sqlite: Path, nursery: Nursery
) -> None:
    path = tmp_path / "late.sqlite"
    with nursery.forked(
        gunicorn("-w", "1", "support.traced_app:create_app()"), environment(f"sqlite:///{path}")
    ) as server:
        server.wait_for(r"The workers cannot start yet: The database file \S+ does not exist\.")
        server.wait_for("Listening at")
        shutil.copyfile(template_sqlite, tmp_path / "ready")
        os.rename(tmp_path / "ready", path)  # complete, or not at all
        effects = Effects(f"sqlite:///{path}")
        server.wait_for("joined")
        assert eventually(effects.ticks)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


# -- other servers ---------------------------------------------------------------------------------


def test_another_server_starts_the_workers_with_the_first_request_and_logs_a_better_way(
    effects: Effects, nursery: Nursery
) -> None:
    command = [sys.executable, "-m", "waitress", "--listen=127.0.0.1:0", "--call", "support.traced_app:create_app"]
    with nursery.forked(command, environment(effects.url)) as server:
        address = server.wait_for(r"Serving on (http://\S+)")[1]
        assert effects.instances() == set()
        assert get(address) == 200
        assert get(address) == 200
        server.wait_for("joined")
        server.wait_for("Background workers start with the first request")
        assert server.output.count("Background workers start with the first request") == 1
        assert "gunicorn.conf.py" in server.output
        assert "WORKERS_ENABLED=false" in server.output
        assert eventually(lambda: len(effects.ticks()) >= 2)
        server.signal(signal.SIGINT)
        server.wait()
    assert effects.instances(alive=True) == set()
    effects.check_once()


# -- flask workers run -----------------------------------------------------------------------------


def test_flask_workers_run_serves_the_workers_of_a_web_process_without_workers(
    effects: Effects, nursery: Nursery
) -> None:
    web = gunicorn("-w", "1", "support.traced_app:create_app()")
    with (
        nursery.forked(web, environment(effects.url, WORKERS_ENABLED="false")) as server,
        nursery.forked(flask("workers", "run"), environment(effects.url, WORKERS_ENABLED="false")) as workers,
    ):
        workers.wait_for("joined")
        assert eventually(lambda: len(effects.ticks()) >= 3)
        assert get(server.wait_for(r"Listening at: (http://\S+)")[1]) == 200
        workers.signal(signal.SIGTERM)
        assert workers.wait() == 0
        assert "Traceback" not in workers.output
        assert effects.instances() == effects.pids() == {workers.pid}
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert effects.instances(alive=True) == set()
    effects.check_once()


# -- processes that start nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["--help", "routes", "shell"])
def test_a_command_that_does_not_serve_starts_no_thread_and_opens_no_connection(
    command: str, tmp_path: Path, nursery: Nursery
) -> None:
    with nursery.forked(flask(command), environment(f"sqlite:///{tmp_path}/none.sqlite")) as process:
        starts_nothing(process)
    assert list(tmp_path.iterdir()) == []


def test_an_import_starts_no_thread_and_opens_no_connection(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from support import traced_app; traced_app.create_app()"]
    with started(command, environment(f"sqlite:///{tmp_path}/none.sqlite")) as process:
        starts_nothing(process)
    assert list(tmp_path.iterdir()) == []


def starts_nothing(process: Process) -> None:
    assert process.wait() == 0
    assert process.wait_for(ENDS).groups()[1:] == ("'MainThread'", "0")


def test_a_database_command_starts_no_thread_and_joins_no_fleet(sqlite_url: str, nursery: Nursery) -> None:
    effects = Effects(sqlite_url)
    with nursery.forked(flask("db", "current"), environment(sqlite_url)) as process:
        assert process.wait() == 0
        process.wait_for(r"\(head\)")
        assert process.wait_for(ENDS)[2] == "'MainThread'"
    assert not Path(f"{make_url(sqlite_url).database}-instances").exists()
    assert effects.ticks() == []


@pytest.mark.parametrize("agent", [None, "a reader's", "Mozilla/5.0"])
@pytest.mark.parametrize("testing", [True, False])
def test_a_test_client_never_starts_the_workers_whatever_its_user_agent_and_testing_are(
    sqlite_url: str, testing: bool, agent: str | None
) -> None:
    class Renamed(FlaskClient):
        """A client whose User-Agent is a browser's."""

        def open(self, *args: Any, **kwargs: Any) -> Any:
            self.environ_base["HTTP_USER_AGENT"] = "Mozilla/5.0"
            return super().open(*args, **kwargs)

    app = create_app({"DATABASE_URL": sqlite_url, "SECRET_KEY": "test", "TESTING": testing})
    workers = app.extensions["background_workers"]
    headers = {"User-Agent": agent} if agent else {}
    assert app.test_client().get("/", headers=headers).status_code == 200
    assert Client(app).get("/", headers=headers).status_code == 200
    app.test_client_class = Renamed
    with app.test_client() as client:
        assert client.get("/", headers=headers).status_code == 200
    app.wsgi_app = ProxyFix(app.wsgi_app)  # type: ignore[method-assign]
    assert app.test_client().get("/", headers=headers).status_code == 200
    with app.test_request_context("/", headers=headers):
        app.preprocess_request()
    with app.test_request_context("/", headers=headers):
        assert app.full_dispatch_request().status_code == 200
    assert not workers.has_served
    workers.serve()
    assert workers.is_started
    close(app)


def test_the_first_request_starts_nothing_if_the_workers_are_disabled(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app({"DATABASE_URL": sqlite_url, "WORKERS_ENABLED": False, **PRODUCTION})
    with served(app) as address:
        assert get(address.replace("127.0.0.1", "localhost")) == 200
    workers = app.extensions["background_workers"]
    assert workers.has_served
    assert not workers.is_started
    assert "Background workers start" not in caplog.text
    close(app)
