"""Packages that the engine needs. The start refuses a missing package, so that no page has to."""

from collections.abc import Iterable
from importlib.util import find_spec

from ..errors import MissingDependency

# A worker that starts, or a cron that is read, imports the last two. That may be hours after the start.
_MODULES = ("flask", "sqlalchemy", "flask_sqlalchemy", "svcs", "apscheduler", "cronsim")


def require(modules: Iterable[str], purpose: str) -> None:
    """Raise MissingDependency unless each of the `modules` can be imported. Imports none of them."""
    for module in modules:
        if find_spec(module) is None:
            package = module.replace("_", "-")
            raise MissingDependency(
                f"The package {package!r} is not installed; expected it, as {purpose} needs it. "
                f"Install it with `pip install {package}`."
            )


require(_MODULES, "the engine of the background workers")
