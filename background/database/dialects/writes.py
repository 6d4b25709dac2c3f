"""SQL statements that may change the database."""

import re

COMMITS_ITSELF = "background_commits_itself"
"""The option of a connection to SQLite that begins no transaction before a write with WITH."""

_BEFORE = re.compile(r"(?:[\s(]|--[^\n]*\n|/\*.*?\*/)*", re.DOTALL)  # spaces and comments before a statement
_READS = re.compile(r"(select|show|explain|values|table|pragma|begin|savepoint|release|rollback|set)\b", re.IGNORECASE)
_CHANGES = re.compile(r"(insert|update|delete|replace)\b", re.IGNORECASE)
_WRITES = re.compile(r"\b(insert|update|delete|merge)\b", re.IGNORECASE)


def is_write(statement: str) -> bool:
    """Return whether the statement may change the database."""
    bare = _bare(statement)
    return not _READS.match(bare) and (not _begins_with_cte(bare) or bool(_WRITES.search(bare)))


def changes_rows(statement: str) -> bool:
    """Return whether the statement may change rows on SQLite."""
    bare = _bare(statement)
    return bool(_CHANGES.match(bare)) or (_begins_with_cte(bare) and bool(_WRITES.search(bare)))


def has_cte(statement: str) -> bool:
    """Return whether the statement begins with WITH."""
    return _begins_with_cte(_bare(statement))


def _bare(statement: str) -> str:
    return _BEFORE.sub("", statement, count=1)


def _begins_with_cte(bare: str) -> bool:
    return bare[:4].lower() == "with"
