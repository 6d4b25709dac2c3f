"""Real databases for every test: SQLite files, and a PostgreSQL from a wheel."""

import gc
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
from support import cached_statements as statements  # noqa: F401 - compiles each statement once
from support import cached_url_rules as rules  # noqa: F401 - makes applications quickly
from support.databases import administer, administration, close, freeze, text

from background import BackgroundWorkerManager

if TYPE_CHECKING:
    from support.fleet import Fleet
    from support.fork_server import Nursery, Shops
    from support.run_traces import Effects

pytest_plugins = ["background.testing.plugin"]

PROCESSES = 6  # tests of real processes mostly wait for them
FEW_PROCESSES = min(
    PROCESSES, 2 * (os.cpu_count() or 1)
)  # the other tests mostly work. Each process collects all tests

HOUR_SECONDS = 3600
TURN_SECONDS = 10  # longer than any test that depends on the hour

# The fixtures, parameters and markers of slow tests.
NOT_QUICK = {"postgresql", "postgresql_server", "server", "nursery", "browser", "fuzz", "promise"}

# The folders whose tests take long: real fleets under faults, and tools that an operator has.
LONG = ("promise", "deploy")
# The folders whose tests read pages and commands. Their second run, on PostgreSQL, is left to the long tests.
READING = ("alarms", "browsing", "cli", "dashboard", "history", "monitoring", "shop", "books", "tallies")

USUAL = "not browser and not fuzz"  # the choice in pyproject.toml

_numbers = count(1)

gc.disable()  # the imports and the collection make much that stays, and no garbage

# Keep compiled files, whatever the environment says: hundreds of interpreters start from the same files.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

os.environ["FLASK_SKIP_DOTENV"] = "1"  # a developer's own file
os.environ["TZ"] = "UTC"  # a developer's own zone
time.tzset()

# A shell starts its background processes with these signals ignored, and the tests' servers would inherit this.
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: given by conftest.py; needs only SQLite and this process")
    config.addinivalue_line("markers", "promise: takes long, as with real fleets; run by -m promise or by its path")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests in the folders that take long. Tests elsewhere that take long have this mark as a decorator.

    Mark as quick the tests without PostgreSQL, a nursery, a browser and bad input.
    """
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
        folder, marks = item.path.parent.name, {each.name for each in item.iter_markers()}
        if folder in LONG or (folder in READING and "postgresql" in parameters and not {"browser", "fuzz"} & marks):
            item.add_marker("promise")
            marks.add("promise")
        needs = {each for each in parameters if isinstance(each, str)} | marks
        if not NOT_QUICK & needs.union(getattr(item, "fixturenames", ())):
            item.add_marker("quick")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite without the promise, in several processes if pytest-xdist is there.

    Tests that are named by their path run as they are, in this process.
    """
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return
    is_usual = config.option.markexpr == USUAL
    if is_usual:
        config.option.markexpr = f"{USUAL} and not promise"
    is_undecided = getattr(config.option, "numprocesses", 0) is None and not hasattr(config, "workerinput")
    if is_undecided and not config.option.usepdb:
        config.option.numprocesses = FEW_PROCESSES if is_usual else PROCESSES


def pytest_collection_finish() -> None:
    freeze()
    gc.enable()


def pytest_runtest_setup() -> None:
    """Begin no test right before an hour ends, because the latest tick of many workers would change amid the test."""
    left = HOUR_SECONDS - time.time() % HOUR_SECONDS
    if left < TURN_SECONDS:
        time.sleep(left)


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """Exclude the objects that earlier test files left in caches from garbage collection."""
    freeze()


@pytest.fixture(scope="session")
def databases(postgresql_server: URL) -> Iterator[Callable[[str], object]]:
    """Execute a statement on the server, on one connection for all tests."""
    with administration(postgresql_server) as execute:
        yield execute


@pytest.fixture(scope="session")
def template_postgresql(postgresql_server: URL) -> str:
    """Give the name of a database with the tables of the engine and its tests. Each test gets a copy."""
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
    """Give a database without a schema."""
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
    """Give a new database with the schema and no rows, on each engine."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Give a database without a schema, on each engine."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.sqlite'}"
    url: str = request.getfixturevalue("empty_postgresql_url")
    return url


@pytest.fixture
def app(database_url: str) -> Iterator[Flask]:
    """Give the application of the engine's tests, without a worker."""
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
    """Give instances on one database, which stop at the end of the test. See fleet.py."""
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
    """Give processes on this test's database, which end with the test. See fork_server.py."""
    from support.fork_server import Shops

    shops = Shops(nursery, effects.url)
    yield shops
    shops.close()


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0o000)
    yield
    os.umask(before)
