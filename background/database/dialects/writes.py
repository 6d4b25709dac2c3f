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
    return not _READS.match(_bare(statement)) and (not has_cte(statement) or bool(_WRITES.search(statement)))


def changes_rows(statement: str) -> bool:
    """Return whether the statement may change rows on SQLite."""
    return bool(_CHANGES.match(_bare(statement))) or (has_cte(statement) and bool(_WRITES.search(statement)))


def has_cte(statement: str) -> bool:
    """Return whether the statement begins with WITH."""
    return _bare(statement)[:4].lower() == "with"


def _bare(statement: str) -> str:
    return _BEFORE.sub("", statement, count=1)
