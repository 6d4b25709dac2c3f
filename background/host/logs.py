"""The engine's loggers, which no `dictConfig` of the application silences by accident."""

import logging
from time import monotonic


def logger_of(name: str) -> logging.Logger:
    """Return the logger `name`, which only its level and its handlers silence, not a later `dictConfig`.

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


class Outage:
    """Has the first line about an outage logged as a warning, and the rest of its lines as details."""

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
        """End the outage, as there was an answer. Return how many seconds it lasted. None if there was no outage."""
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
    """Return the class of loggers for `kind`, made once. The application may have chosen `kind`."""
    return _kinds.setdefault(f"{kind.__module__}.{kind.__qualname__}", type(kind.__name__, (_Enabled, kind), {}))
