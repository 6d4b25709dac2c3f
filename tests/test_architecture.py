"""The arrow goes one way: the application knows the engine, and the engine knows no application."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import background

ROOT = Path(__file__).parents[1]
ENGINE = sorted((ROOT / "background").rglob("*.py"))
APPLICATION = {path.stem for path in ROOT.glob("*.py")} | {"migrations", "tests", "benchmarks"}


def imports(path: Path) -> Iterator[str]:
    """The first name of every absolute import of a file, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, f"{path} imports from outside the engine"


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: path.stem)
def test_the_engine_never_imports_the_application(path: Path) -> None:
    assert {"app", "routes", "models", "workers", "config", "migrations"} <= APPLICATION
    assert not set(imports(path)) & APPLICATION


def test_one_file_alone_imports_apscheduler() -> None:
    others = (path for folder in ("migrations", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py"))
    importers = {path.name for path in [*ROOT.glob("*.py"), *ENGINE, *others] if "apscheduler" in imports(path)}
    assert importers == {"scheduler.py"}


def test_the_public_names_are_all_there() -> None:
    promised = {
        "BackgroundError",
        "BackgroundWorkerManager",
        "ClaimLost",
        "DuplicateWorker",
        "InvalidLock",
        "InvalidSchedule",
        "Lock",
        "LockNotAcquired",
        "PeriodicWorker",
        "UnknownWorker",
        "WorkerContext",
        "current_workers",
    }
    assert promised <= set(background.__all__)
    assert all(hasattr(background, name) for name in background.__all__)


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (
            background.PeriodicWorker,
            "name period cron timezone enabled catch_up run_on_first_start max_attempts on_lost timeout jitter do_work",
        ),
        (background.WorkerContext, "services session commit progress raise_if_stopping"),
        (
            background.BackgroundWorkerManager,
            "init_app add remove start stop tick trigger pause resume reschedule lock before_start",
        ),
    ],
)
def test_the_public_face_is_as_promised(owner: type, names: str) -> None:
    assert not [name for name in names.split() if not hasattr(owner, name)]


def test_a_context_has_what_is_promised() -> None:
    source = inspect.getsource(background.WorkerContext.__init__)
    promised = ("worker", "tick", "attempt", "token", "idempotency_key", "logger", "stopping")
    assert not [name for name in promised if f"self.{name}" not in source]


def test_every_error_of_the_engine_is_a_background_error() -> None:
    errors = [value for value in vars(background).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(errors) > 5
    assert all(issubclass(error, background.BackgroundError) for error in errors)
