"""Compiled statements that all applications of one process share. A cache per engine would be empty in each test."""

from typing import Any

from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.util import LRUCache

CAPACITY = 2_000
# Attributes of a dialect that do not change how it compiles a statement.
REMEMBERED = {"_bind_typing_render_casts", "_supports_statement_cache", "_has_events"}

_compiled: LRUCache[Any, Any] = LRUCache(CAPACITY)
_alike: dict[object, Dialect] = {}
_compile = ClauseElement._compile_w_cache


def alike(dialect: Dialect) -> Dialect:
    """Return the first dialect with the same settings. It stands for all of them."""
    simple = (bool, int, str, tuple, type(None))
    settings = ((name, value) for name, value in sorted(vars(dialect).items()) if isinstance(value, simple))
    key = type(dialect), *(setting for setting in settings if setting[0] not in REMEMBERED)
    return _alike.setdefault(key, dialect)


def _compile_once(self: ClauseElement, dialect: Dialect, *, compiled_cache: Any, **more: Any) -> Any:
    if compiled_cache is None or dialect._json_serializer or dialect._json_deserializer:
        return _compile(self, dialect, compiled_cache=compiled_cache, **more)
    return _compile(self, alike(dialect), compiled_cache=_compiled, **more)


ClauseElement._compile_w_cache = _compile_once  # type: ignore[method-assign]
