"""The engine's loggers, which no `logging.config.dictConfig` of the application silences by the way."""

import logging


def logger_of(name: str) -> logging.Logger:
    """The logger `name`. Its level and its handlers silence it; that it was made before a `dictConfig` does not.

    By default, that function disables every logger which it does not name and which is there already.
    """
    logger = logging.getLogger(name)
    if not isinstance(logger, _Enabled):
        logger.__class__ = _enabled(type(logger))
    return logger


class _Enabled:
    @property
    def disabled(self) -> bool:
        return False

    @disabled.setter
    def disabled(self, value: bool) -> None:
        pass


_kinds: dict[str, type[logging.Logger]] = {}


def _enabled(kind: type[logging.Logger]) -> type[logging.Logger]:
    """Made once for each class of loggers, which the application may have chosen."""
    return _kinds.setdefault(f"{kind.__module__}.{kind.__qualname__}", type(kind.__name__, (_Enabled, kind), {}))
