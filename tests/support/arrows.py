"""The rooms of the engine, and the imports between its files."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENGINE = sorted((ROOT / "background").rglob("*.py"))

ORDER = (
    "errors", "host", "signals", "settings", "schedule", "database", "messages", "ledger", "tallies", "repair",
    "context", "worker", "declarations", "registry", "stores", "runs", "process", "lifecycle", "history", "manager",
    "pruning", "alarms", "cli", "monitoring", "dashboard", "testing",
)  # fmt: skip
"""The rooms and the files at the top of the engine, from the bottom up."""


def nodes(path: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "background").with_suffix("").as_posix()


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
ARROWS = {name: set(arrows(path)) for name, path in FILES.items()}


def room(name: str) -> str:
    return name.split("/")[0]
