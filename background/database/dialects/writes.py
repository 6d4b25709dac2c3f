"""SQL statements that may change the database."""

import re

COMMITS_ITSELF = "background_commits_itself"
"""The option of a connection to SQLite that begins no transaction before a write with WITH."""

_BEFORE = re.compile(r"(?:[\s(]|--[^\n]*\n|/\*.*?\*/)*", re.DOTALL)  # spaces and comments before a statement
_READS = re.compile(r"(select|show|explain|values|table|pragma|begin|savepoint|release|rollback|set)\b", re.IGNORECASE)
_WRITES = re.compile(r"\b(insert|update|delete|merge)\b", re.IGNORECASE)


def is_write(statement: str) -> bool:
    """Return whether the statement may change the database."""
    bare = _BEFORE.sub("", statement, count=1)
    return not _READS.match(bare) and (not _has_cte(bare) or bool(_WRITES.search(bare)))


def is_write_with_cte(statement: str) -> bool:
    """Return whether the statement begins with WITH and may change rows."""
    bare = _BEFORE.sub("", statement, count=1)
    return _has_cte(bare) and bool(_WRITES.search(bare))


def _has_cte(bare: str) -> bool:
    return bare[:4].lower() == "with"
