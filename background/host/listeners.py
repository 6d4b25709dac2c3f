"""Remembers the targets of event listeners, so that each listener comes to a target once."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

_known: WeakKeyDictionary[Any, set[tuple[object, int]]] = WeakKeyDictionary()


def is_new(target: object, listener: Callable[..., Any]) -> bool:
    """Return True the first time that `listener` comes to `target`. The caller attaches the listener then.

    SQLAlchemy's `event.contains` knows a target by its `id`, which a later object may have again. That object would
    get no listener. Sessions, for example, would have no fence.
    """
    # Not the method itself, which would keep its object and so the target. The target keeps the object alive.
    key = getattr(listener, "__func__", listener), id(getattr(listener, "__self__", None))
    known = _known.setdefault(target, set())
    if key in known:
        return False
    known.add(key)
    return True
