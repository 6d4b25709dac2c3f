"""Real databases for every test: SQLite files, and a PostgreSQL that is started from a wheel and stopped again."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from flask import Flask
from flask.testing import FlaskClient, FlaskCliRunner
from sqlalchemy import URL, Engine
from support import cached_url_rules as rules  # noqa: F401 - makes applications quickly
from support.databases import administer, administration, close, freeze, text

from background import BackgroundWorkerManager

if TYPE_CHECKING:
    from support.fleet import Fleet
    from support.fork_server import Nursery, Shops
    from support.run_traces import Effects

pytest_plugins = ["background.testing.plugin"]

PROCESSES = 6  # tests of real processes mostly wait for them

HOUR_SECONDS = 3600
TURN_SECONDS = 10  # longer than a test takes to whose outcome the hour matters

# The fixtures, parameters and markers of tests that take long.
NOT_QUICK = {"postgresql", "postgresql_server", "server", "nursery", "browser", "fuzz", "promise"}

_numbers = count(1)

# Compiled once, whatever the environment says: hundreds of interpreters are started from the same files.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell starts what runs in its background with these ignored, and the servers of the tests would inherit that.
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: given by conftest.py; needs only SQLite and this process")
    config.addinivalue_line("markers", "promise: given by conftest.py; real fleets, run by -m promise or by their path")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the promise: real fleets under faults, which wait for leases and processes.

    Mark as quick the tests without PostgreSQL, a nursery, a browser and bad input.
    """
    for item in items:
        if item.path.parent.name == "promise":
            item.add_marker("promise")
        parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
        needs = {each for each in parameters if isinstance(each, str)} | {each.name for each in item.iter_markers()}
        if not NOT_QUICK & needs.union(getattr(item, "fixturenames", ())):
            item.add_marker("quick")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite without the promise, in several processes if pytest-xdist is there.

    Tests that are named by their path run as they are, in this process.
    """
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return
    if "promise" not in config.option.markexpr:
        chosen = config.option.markexpr
        config.option.markexpr = f"({chosen}) and not promise" if chosen else "not promise"
    is_undecided = getattr(config.option, "numprocesses", 0) is None and not hasattr(config, "workerinput")
    if is_undecided and not config.option.usepdb:
        config.option.numprocesses = PROCESSES


def pytest_collection_finish() -> None:
    freeze()


def pytest_runtest_setup() -> None:
    """No test begins where an hour is about to end: the last tick of many workers would be another one amid it."""
    left = HOUR_SECONDS - time.time() % HOUR_SECONDS
    if left < TURN_SECONDS:
        time.sleep(left)


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """So does what the tests of the files before have left in caches."""
    freeze()


@pytest.fixture(scope="session")
def databases(postgresql_server: URL) -> Iterator[Callable[[str], object]]:
    """Execute a statement on the server, on one connection for all tests."""
    with administration(postgresql_server) as execute:
        yield execute


@pytest.fixture(scope="session")
def template_postgresql(postgresql_server: URL) -> str:
    """The name of a database with the tables of the engine and its tests. Each test gets a copy."""
    from support.fleet import make_tables

    administer(postgresql_server, "CREATE DATABASE template")
    make_tables(text(postgresql_server.set(database="template")))
    freeze()
    return "template"


@pytest.fixture(scope="session")
def template_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.fleet import make_tables

    path = tmp_path_factory.mktemp("template") / "template.sqlite"
    make_tables(f"sqlite:///{path}")
    freeze()
    return path


@pytest.fixture
def empty_postgresql_url(postgresql_server: URL, databases: Callable[[str], object]) -> Iterator[str]:
    """A database without any schema."""
    name = f"empty_{next(_numbers)}"
    databases(f"CREATE DATABASE {name} STRATEGY FILE_COPY")
    yield text(postgresql_server.set(database=name))
    databases(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def postgresql_url(
    postgresql_server: URL, template_postgresql: str, databases: Callable[[str], object]
) -> Iterator[str]:
    name = f"test_{next(_numbers)}"
    databases(f"CREATE DATABASE {name} TEMPLATE {template_postgresql} STRATEGY FILE_COPY")
    yield text(postgresql_server.set(database=name))
    databases(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def sqlite_url(tmp_path: Path, template_sqlite: Path) -> str:
    path = tmp_path / "bookstore.sqlite"
    shutil.copyfile(template_sqlite, path)
    return f"sqlite:///{path}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A fresh database with the schema and nothing in it, on each engine."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without any schema, on each engine."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.sqlite'}"
    url: str = request.getfixturevalue("empty_postgresql_url")
    return url


@pytest.fixture
def app(database_url: str) -> Iterator[Flask]:
    """The application of the engine's tests, without a worker."""
    from support.fleet import make_app

    app = make_app(database_url)
    yield app
    close(app)


@pytest.fixture
def manager(app: Flask) -> BackgroundWorkerManager:
    manager: BackgroundWorkerManager = app.extensions["background_workers"]
    return manager


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def runner(app: Flask) -> FlaskCliRunner:
    return app.test_cli_runner()


@pytest.fixture
def engine(app: Flask) -> Iterator[Engine]:
    with app.app_context():
        yield app.extensions["sqlalchemy"].engine


@pytest.fixture
def fleet(database_url: str) -> Iterator["Fleet"]:
    """Instances on one database, stopped at the end; see fleet.py."""
    from support.fleet import Fleet

    fleet = Fleet(database_url)
    yield fleet
    fleet.close()


@pytest.fixture(scope="session")
def nursery() -> Iterator["Nursery"]:
    from support.fork_server import Nursery

    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def effects(database_url: str) -> "Effects":
    """Return the effects that the traced app's workers leave in this test's database."""
    from support.run_traces import Effects

    return Effects(database_url)


@pytest.fixture
def shops(nursery: "Nursery", effects: "Effects") -> Iterator["Shops"]:
    """Processes on this test's database, all gone at its end; see fork_server.py."""
    from support.fork_server import Shops

    shops = Shops(nursery, effects.url)
    yield shops
    shops.close()


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0o000)
    yield
    os.umask(before)
