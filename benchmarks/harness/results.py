"""The file of figures: JSON, one entry for each figure. A case that runs again replaces its own figures."""

import json
import os
import platform
import sqlite3
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .databases import postgresql_version
from .figures import Figure, Setup

Entry = dict[str, Any]


def entries(case: str, setup: Setup, figures: list[Figure]) -> list[Entry]:
    scale = "small" if setup.is_small else "full"
    moment = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    about = {"case": case, "engine": setup.engine, "scale": scale, "measured_at": moment}
    return [{**about, **figure.as_json()} for figure in figures]


def write(path: Path, new: list[Entry], keeps_other_peers: bool = False) -> None:
    """Write the new entries, and keep the entries of other cases and engines."""
    alike = ("case", "engine", "of") if keeps_other_peers else ("case", "engine")
    replaced = [_values(each, alike) for each in new]
    kept = [each for each in read(path) if _values(each, alike) not in replaced]
    found = {"machine": machine(), "figures": kept + new}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _values(entry: Entry, names: Iterable[str]) -> list[Any]:
    return [entry.get(name) for name in names]


def read(path: Path) -> list[Entry]:
    return list(json.loads(path.read_text(encoding="utf-8"))["figures"]) if path.exists() else []


def about(path: Path) -> str:
    """Return a sentence about the machine and the moments of the figures."""
    found = json.loads(path.read_text(encoding="utf-8"))
    on, moments = found["machine"], sorted({each["measured_at"] for each in found["figures"]})
    when = f"from {moments[0]} to {moments[-1]}" if len(moments) > 1 else f"at {''.join(moments)}"
    return (
        f"Measured {when} on {on['cores']} cores ({on['processor']}),\n"
        f"with Python {on['python']}, SQLite {on['sqlite']} and PostgreSQL {on['postgresql']}."
    )


def machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "postgresql": postgresql_version(),
    }
