"""SQL statements that may change the database."""

import re

_BEFORE = re.compile(r"(?:[\s(]|--[^\n]*\n|/\*.*?\*/)*", re.DOTALL)  # spaces and comments before a statement
_READS = re.compile(r"(select|show|explain|values|table|pragma|begin|savepoint|release|rollback|set)\b", re.IGNORECASE)
_CHANGES = re.compile(r"(insert|update|delete|replace)\b", re.IGNORECASE)
_WRITES = re.compile(r"\b(insert|update|delete|merge)\b", re.IGNORECASE)


def is_write(statement: str) -> bool:
    """Return whether the statement may change the database."""
    bare = _BEFORE.sub("", statement, count=1)
    return not _READS.match(bare) and (not _has_cte(bare) or bool(_WRITES.search(bare)))


def changes_rows(statement: str) -> bool:
    """Return whether the statement may change rows on SQLite."""
    bare = _BEFORE.sub("", statement, count=1)
    return bool(_CHANGES.match(bare)) or (_has_cte(bare) and bool(_WRITES.search(bare)))


def _has_cte(bare: str) -> bool:
    return bare[:4].lower() == "with"
