"""The engine's loggers, which no `dictConfig` of the application silences by accident."""

import logging


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
