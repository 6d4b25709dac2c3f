"""The rooms of the engine, and the imports between its files. A file is read once, and not before a test asks."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENGINE = sorted((ROOT / "background").rglob("*.py"))

ORDER = (
    "errors", "host", "signals", "settings", "schedule", "database", "messages", "ledger", "tallies", "repair",
    "context", "worker", "declarations", "registry", "stores", "runs", "process", "lifecycle", "history", "manager",
    "pruning", "alarms", "cli", "monitoring", "dashboard", "testing",
)  # fmt: skip
"""The rooms and the files at the top of the engine, from the bottom up."""


@cache
def nodes(path: Path) -> list[ast.Import | ast.ImportFrom]:
    """Return the imports of the file, wherever they are in it."""
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "background").with_suffix("").as_posix()


@cache
def all_arrows() -> dict[str, set[str]]:
    """Return for each file of the engine the files of the engine that it imports."""
    return {name: set(arrows(path)) for name, path in FILES.items()}


def arrows(path: Path) -> Iterator[str]:
    """Yield each file of the engine that the file imports, as "ledger/claim"."""
    package = path.relative_to(ROOT / "background").parts[:-1]
    for node in nodes(path):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        assert node.level <= len(package) + 1, f"{path} imports from outside the engine"
        base = [*package[: len(package) + 1 - node.level], *(node.module or "").split(".")]
        found = "/".join(filter(None, base))
        if found in FILES:
            yield found
        else:  # names of files, or of a room's __init__
            yield from (name for each in node.names if (name := f"{found}/{each.name}".lstrip("/")) in FILES)


FILES = {name_of(path): path for path in ENGINE if path.stem != "__init__"}


def room(name: str) -> str:
    return name.split("/")[0]
