"""The engine's loggers. A `dictConfig` of the application cannot silence them by accident."""

import logging
from time import monotonic

from sqlalchemy.exc import SQLAlchemyError

from ..errors import BackgroundError


def logger_of(name: str) -> logging.Logger:
    """Return the logger `name`. Its level and its handlers can silence it, a later `dictConfig` cannot.

    By default, `dictConfig` disables every existing logger that it does not name.
    """
    logger = logging.getLogger(name)
    if not isinstance(logger, _Enabled):
        logger.__class__ = _enabled(type(logger))
    return logger


def quieten(library: str) -> None:
    """Have a library log warnings only, unless the application gave its logger a level."""
    logger = logging.getLogger(library)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.WARNING)


def unless_expected(error: Exception) -> Exception | None:
    """Return an unexpected error, so that the log shows its traceback. None for an error whose text suffices."""
    return None if isinstance(error, BackgroundError | SQLAlchemyError | OSError) else error


class Outage:
    """Gives the first log line about an outage the level WARNING, and its further lines the level DEBUG."""

    def __init__(self) -> None:
        self._since: float | None = None

    @property
    def is_on(self) -> bool:
        """True from the first line about the outage until its end."""
        return self._since is not None

    def level(self) -> int:
        """Return the level of the next line about the outage."""
        if self._since is not None:
            return logging.DEBUG
        self._since = monotonic()
        return logging.WARNING

    def ended(self) -> float | None:
        """End the outage. Return its length in seconds, or None if there was no outage."""
        since, self._since = self._since, None
        return None if since is None else monotonic() - since


class _Enabled:
    @property
    def disabled(self) -> bool:
        return False

    @disabled.setter
    def disabled(self, value: bool) -> None:
        pass


_kinds: dict[str, type[logging.Logger]] = {}


def _enabled(kind: type[logging.Logger]) -> type[logging.Logger]:
    """Return the class of loggers for `kind`, which is made once. The application may have its own `kind`."""
    return _kinds.setdefault(f"{kind.__module__}.{kind.__qualname__}", type(kind.__name__, (_Enabled, kind), {}))
