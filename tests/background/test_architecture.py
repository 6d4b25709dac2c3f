"""Imports point one way: the application knows the engine, and the engine knows no application."""

import ast
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from support.arrows import ENGINE, FILES, ORDER, ROOT, all_arrows, name_of, nodes, room

import background

APPLICATION = {path.stem for path in ROOT.glob("*.py")} | {"migrations", "tests", "benchmarks"}


def imports(path: Path) -> Iterator[str]:
    """Yield the first name of every absolute import of a file, wherever in it."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif node.module and not node.level:
            yield node.module.split(".")[0]


def test_the_engine_never_imports_the_application() -> None:
    assert {"app", "routes", "models", "workers", "config", "migrations"} <= APPLICATION
    assert len(ENGINE) > 100
    assert {name_of(path): found for path in ENGINE if (found := set(imports(path)) & APPLICATION)} == {}


def test_the_engines_tests_never_import_the_application() -> None:
    """Check also the helpers that a test imports, and the programs that it contains as text."""
    files = sorted((ROOT / "tests" / "background").rglob("*.py"))
    assert len(files) > 50
    assert {path.stem: found for path in files if (found := reached(path) & (APPLICATION - {"tests"}))} == {}


@cache
def reached(path: Path) -> set[str]:
    """Return the first name of every import of a test's file, of its programs and of the helpers that it imports."""
    text = path.read_text(encoding="utf-8")
    programs = re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE)
    helpers = re.findall(r"^\s*from support(?:\.| import )(\w+)", text, re.MULTILINE)
    return {*imports(path), *programs}.union(*(reached(ROOT / "tests" / "support" / f"{name}.py") for name in helpers))


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room(name) for name in FILES} == set(ORDER)


def test_arrows_between_rooms_point_down_only() -> None:
    up = [
        f"{name} -> {target}"
        for name, targets in all_arrows().items()
        for target in targets
        if ORDER.index(room(target)) > ORDER.index(room(name))
    ]
    assert up == []


def test_the_files_have_no_circular_import() -> None:
    left = dict(all_arrows())
    while free := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in free}
    assert left == {}


def test_no_folder_has_more_than_a_handful_of_files() -> None:
    sizes = Counter(path.parent for path in FILES.values())
    top = sizes.pop(ROOT / "background")
    assert top <= 11
    assert {path.name: size for path, size in sizes.items() if size > 9} == {}


def test_no_import_is_hidden_from_the_arrows() -> None:
    """Check that an import for types only, or inside a function, also points down, and has a reason."""
    for name, path in FILES.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in nodes(path):
            if node.col_offset and isinstance(node, ast.ImportFrom) and node.level:
                is_typed = any("if TYPE_CHECKING" in line for line in lines[max(0, node.lineno - 4) : node.lineno])
                statement = "".join(lines[node.lineno - 1 : node.end_lineno])
                assert is_typed or "#" in statement, f"{name}:{node.lineno} does not say why"


def test_only_one_file_imports_apscheduler() -> None:
    others = (path for folder in ("migrations", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py"))
    others = (path for path in others if path.parent != ROOT / "benchmarks" / "peers")  # they are other schedulers
    candidates = (path for path in [*ROOT.glob("*.py"), *ENGINE, *others] if "apscheduler" in path.read_text("utf-8"))
    importers = {path.name for path in candidates if "apscheduler" in imports(path)}
    assert importers == {"scheduler.py"}


def test_all_public_names_exist() -> None:
    promised = {
        "BackgroundError",
        "BackgroundWorkerManager",
        "ClaimLost",
        "DuplicateWorker",
        "InvalidCursor",
        "InvalidLock",
        "InvalidMigration",
        "InvalidSchedule",
        "Later",
        "Lock",
        "LockNotAcquired",
        "PeriodicWorker",
        "UnknownWorker",
        "UtcDateTime",
        "WorkerContext",
        "current_workers",
        "include_object",
        "migrate_to",
        "render_item",
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
def test_the_public_interface_is_as_promised(owner: type, names: str) -> None:
    assert not [name for name in names.split() if not hasattr(owner, name)]


def test_a_context_has_the_promised_attributes() -> None:
    source = inspect.getsource(background.WorkerContext.__init__)
    promised = ("worker", "tick", "attempt", "token", "idempotency_key", "logger", "stopping")
    assert not [name for name in promised if f"self.{name}" not in source]


def test_every_error_of_the_engine_is_a_background_error() -> None:
    errors = [value for value in vars(background).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(errors) > 5
    assert all(issubclass(error, background.BackgroundError) for error in errors)
