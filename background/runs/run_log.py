"""Keeps the log lines of a run, from any logger, with its execution, for people to read."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import shortened

_MOST_LINES = 500
_FEW_LINES = 20
_MOST_CHARACTERS = 2_000  # of one line, or of one traceback


class LogLines(logging.Handler):
    """The latest lines of one run, each with its moment (UTC, by this host's clock) and level."""

    def __init__(self, is_ours: Callable[[], bool]) -> None:
        super().__init__()
        self.setFormatter(_formatter)
        self._is_ours = is_ours
        self._lines: deque[str] = deque(maxlen=_MOST_LINES)
        self._count = self._read = 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Keep the lines that any logger logs in this block, if they are `is_ours`."""
        root = logging.getLogger()
        if not root.handlers and logging.lastResort:
            root.addHandler(logging.lastResort)  # it prints only without a handler, and this class is a handler
        root.addHandler(self)
        try:
            yield
        finally:
            root.removeHandler(self)
            self.close()

    def emit(self, record: logging.LogRecord) -> None:
        if not self._is_ours():
            return
        try:
            line = self.format(record)
        except Exception:  # its arguments do not fit its text
            self.handleError(record)
            return
        self._lines.append(shortened(line, _MOST_CHARACTERS))
        self._count += 1

    @property
    def has_news(self) -> bool:
        """True if there are lines since the last `text()`."""
        return self._count > self._read

    @property
    def is_short(self) -> bool:
        return len(self._lines) <= _FEW_LINES

    def text(self) -> str | None:
        """Return all kept lines as one text, or None."""
        self._read, lines = self._count, list(self._lines)
        if left_out := self._read - len(lines):
            lines.insert(0, f"({left_out} earlier lines are not kept)")
        return "\n".join(lines) or None


_formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)-7s %(message)s", "%Y-%m-%dT%H:%M:%S")
_formatter.converter = time.gmtime
