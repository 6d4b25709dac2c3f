"""Packages that the engine needs. The start refuses a missing package, so that no page has to."""

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec

from sqlalchemy import Engine

from ..errors import InvalidConfig, MissingDependency

# Modules that the start imports anyway, each with the name of its package.
_AT_ONCE = {
    "flask": "flask",
    "sqlalchemy": "sqlalchemy",
    "flask_sqlalchemy": "flask-sqlalchemy",
    "svcs": "svcs",
}
# Modules that are imported when a worker starts or a cron is read, which may be hours later.
_LATER = {"apscheduler": "apscheduler", "cronsim": "cronsim"}


def require(modules: Iterable[str], purpose: str) -> None:
    """Raise MissingDependency unless each of the `modules` can be imported. Imports none of them."""
    for module in modules:
        if not _is_there(module):
            raise missing(module, purpose)


def refuse_driver(engine: "Engine") -> None:
    """Raise InvalidConfig for a database or a driver that the engine does not support."""
    dialect = engine.dialect
    if dialect.name != "sqlite" and (dialect.name, dialect.driver) != ("postgresql", "psycopg"):
        raise InvalidConfig(
            f"The database is reached by {dialect.name}+{dialect.driver}; expected SQLite, or PostgreSQL by psycopg 3. "
            "Write postgresql+psycopg://... and install it with `pip install psycopg`."
        )


def missing(module: str, purpose: str) -> MissingDependency:
    """Return the error for a module that is not installed."""
    package = (_AT_ONCE | _LATER).get(module, module.replace("_", "-"))
    return MissingDependency(
        f"The package {package!r} is not installed; expected it, as {purpose} needs it. "
        f"Install it with `pip install {package}`."
    )


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _refuse_missing() -> None:
    for module in _AT_ONCE:
        try:
            import_module(module)
        except ImportError as error:
            name = (error.name or module).partition(".")[0]
            raise missing(name, "the engine of the background workers") from None
    require(_LATER, "the engine of the background workers")


_refuse_missing()
