"""Reports when a process touches a file, which sets its times. Linux does this by inotify, which Python lacks."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_IN_ATTRIB = 0x4  # the times of the file changed


@contextmanager
def touches(path: str | None) -> Iterator[int | None]:
    """Yield a descriptor that becomes readable at each touch of the file. None if the system reports no touches."""
    opened = None if path is None else _opened(os.fsencode(path))
    try:
        yield opened
    finally:
        if opened is not None:
            os.close(opened)


def _opened(path: bytes) -> int | None:
    with suppress(AttributeError, OSError, TypeError):  # this is not Linux
        library = ctypes.CDLL(None)
        if (opened := library.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)) >= 0:
            if library.inotify_add_watch(opened, path, _IN_ATTRIB) >= 0:
                return int(opened)
            os.close(opened)
    return None  # or the limit of watches is reached
