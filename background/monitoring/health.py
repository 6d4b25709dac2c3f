"""Health of this process, for load balancers and restarts, and of the fleet, for alerts.

No login is needed, so a response names the failed check and never the reason. It contains no host and no error text.
The fleet's response names workers. The log has the reasons. No session is read. The checks use the engine's own
connections. Two checks do not: the check of the migrations, and the check of the application's own pool.
"""

import sqlite3
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue
from sqlalchemy import false, null, update
from sqlalchemy.exc import ProgrammingError, SQLAlchemyError

from ..database.clock import steady
from ..database.connections import again_if_stale
from ..database.dialects.sqlite import is_locked
from ..database.tables import workers
from ..errors import BackgroundError, first_line
from ..history.condition import condition
from ..history.status import statuses
from ..history.text import silent
from ..host.logs import logger_of
from ..manager import BackgroundWorkerManager, current_workers, the_manager
from .timebox import Timebox

log = logger_of(__name__)

_ANSWER_SECONDS = 3.0
_MIGRATIONS_SECONDS = 10.0  # reading every migration takes longer than all other checks together
_OF_DATABASE = ("database", "migrations", "workers")


@dataclass(frozen=True)
class Check:
    """The result of one check. `figures` are for the response, and `reason` is for the log."""

    ok: bool
    figures: dict[str, Any]
    reason: str | None = None
    at: float | None = None
    """The moment of the check. The response has its age. None if the response gives no age."""

    def as_dict(self) -> dict[str, Any]:
        age = {} if self.at is None else {"age_seconds": round(steady() - self.at, 3)}
        return {"ok": self.ok, **self.figures, **age}


Ask = Callable[[BackgroundWorkerManager], dict[str, Check]]


def health() -> Blueprint:
    """Return a blueprint for GET /health/live, /ready and /workers, which respond with 200 or 503, and JSON."""
    blueprint = Blueprint("health", __name__, url_prefix="/health")
    readiness = Probe("Not ready", "Ready again", {_OF_DATABASE: Readiness().ask})
    fleet = Probe(
        "The fleet does not run as it should",
        "The fleet runs as it should again",
        {("instances", "overdue", "stuck"): _fleet, ("write",): _write},
    )

    @blueprint.get("/live")
    def live() -> ResponseReturnValue:
        """Report whether the process and its threads are alive, without a query."""
        return _answer("alive", {"process": Check(True, {}), **_threads(current_workers)})

    @blueprint.get("/ready")
    def ready() -> ResponseReturnValue:
        """Report whether the database, its migrations, this instance's heartbeat and the workers are in order."""
        return _answer("ready", readiness.checks(heartbeat=_heartbeat(current_workers)))

    @blueprint.get("/workers")
    def fleet_health() -> ResponseReturnValue:
        """Report whether an instance is alive, no worker is overdue or stuck, and the application can write.

        The response is about the whole fleet, so each process gives the same response.
        """
        return _answer("running", fleet.checks())

    return blueprint


def _answer(word: str, checks: dict[str, Check]) -> ResponseReturnValue:
    is_ok = all(check.ok for check in checks.values())
    answer = jsonify(
        status=word if is_ok else f"not {word}", checks={name: check.as_dict() for name, check in checks.items()}
    )
    answer.headers["Cache-Control"] = "no-store"
    answer.status_code = 200 if is_ok else 503
    return answer


def _threads(manager: BackgroundWorkerManager) -> dict[str, Check]:
    alive = manager.threads_alive()
    if alive is None:
        return {name: Check(True, {"here": False}) for name in ("scheduler", "heartbeat")}
    return {name: Check(is_alive, {"here": True}) for name, is_alive in alive.items()}


class Probe:
    """The checks of one endpoint. Logs when they begin to fail, fail in another way, or succeed again."""

    def __init__(self, failing: str, good: str, parts: Mapping[tuple[str, ...], Ask]) -> None:
        """Take the texts for the log, and the functions that make the checks, by the names of the checks."""
        self._failing, self._good = failing, good
        self._parts = [(names, Timebox(ask, _ANSWER_SECONDS)) for names, ask in parts.items()]
        self._failed: tuple[str, ...] = ()

    def checks(self, **more: Check) -> dict[str, Check]:
        """Return each check by its name, with the checks `more`. This takes seconds even if the database hangs."""
        checks: dict[str, Check] = {}
        for names, timebox in self._parts:
            try:
                checks |= timebox.answer(the_manager())
            except (BackgroundError, SQLAlchemyError, sqlite3.Error, OSError) as error:  # TimeoutError is an OSError
                checks |= dict.fromkeys(names, Check(False, {}, first_line(error)))
        self._log_change(checks | more)
        return checks | more

    def _log_change(self, checks: dict[str, Check]) -> None:
        """Log the change since the last call. A probe comes every few seconds."""
        failed = tuple(name for name, check in checks.items() if not check.ok)
        before, self._failed = self._failed, failed
        if failed and failed != before:
            reasons = (f"{name} ({check.reason})" for name, check in checks.items() if check.reason and not check.ok)
            log.warning("%s: %s", self._failing, "; ".join(reasons) or ", ".join(failed))
        elif before and not failed:
            log.info("%s", self._good)


class Readiness:
    """The checks of the database and the workers. Remembers when the migrations were last right."""

    def __init__(self) -> None:
        self._migrated_at: float | None = None

    def ask(self, manager: BackgroundWorkerManager) -> dict[str, Check]:
        """Return the checks. If the database fails, the other checks would fail as well."""
        checks = {"database": _checked(lambda: _database(manager))}
        if not checks["database"].ok:
            return checks | dict.fromkeys(_OF_DATABASE[1:], Check(False, {}))
        checks["migrations"] = _checked(lambda: self._migrations(manager))
        checks["workers"] = _checked(lambda: _workers(manager))
        return checks

    def _migrations(self, manager: BackgroundWorkerManager) -> Check:
        """Check that the migrations are at head. A good result is kept for seconds, a bad result is not kept."""
        if self._migrated_at is None or steady() - self._migrated_at > _MIGRATIONS_SECONDS:
            self._migrated_at = None
            manager.check()
            self._migrated_at = steady()
        return Check(True, {}, at=self._migrated_at)


def _fleet(manager: BackgroundWorkerManager) -> dict[str, Check]:
    manager.stores.connections.refuse_missing()
    asked_at = steady()
    found = condition(manager.stores, manager.workers)
    silent_for = found.silence.length if found.silence else None
    silence = {} if silent_for is None else {"silent_seconds": round(silent_for.total_seconds(), 1)}
    return {
        "instances": Check(
            not found.silence,
            {"alive": found.alive, **silence},
            silent(found.silence) if found.silence else None,
            asked_at,
        ),
        "overdue": Check(not found.overdue, {"workers": found.overdue}, f"{found.overdue}", asked_at),
        "stuck": Check(not found.stuck, {"workers": sorted(found.stuck)}, f"{found.stuck}", asked_at),
    }


def _write(manager: BackgroundWorkerManager) -> dict[str, Check]:
    manager.stores.connections.refuse_missing()
    began = steady()
    _write_as_the_application(manager)
    return {"write": Check(True, {"milliseconds": round((steady() - began) * 1000, 1)}, at=began)}


def _checked(check: Callable[[], Check]) -> Check:
    try:
        return again_if_stale(check)
    except (BackgroundError, SQLAlchemyError, OSError) as error:
        return Check(False, {}, first_line(error))


def _database(manager: BackgroundWorkerManager) -> Check:
    """Check that the database takes writes: after a fail-over, connections may lead to a read-only server."""
    manager.stores.connections.refuse_missing()
    began = steady()
    manager.history.clock()
    with suppress(ProgrammingError):  # without tables the database works, and the check of the migrations fails
        manager.stores.write()
    return Check(True, {"milliseconds": round((steady() - began) * 1000, 1)}, at=began)


def _workers(manager: BackgroundWorkerManager) -> Check:
    """Check that no worker is overdue. With WORKERS_ENABLED=false it cannot fail: this process only serves pages."""
    asked_at = steady()
    overdue = [each.name for each in statuses(manager.stores, manager.workers) if each.is_overdue]
    is_ours = manager.is_started or manager.app.config["WORKERS_ENABLED"]
    return Check(not (overdue and is_ours), {"overdue": len(overdue)}, f"overdue: {overdue}", asked_at)


def _heartbeat(manager: BackgroundWorkerManager) -> Check:
    """Check the heartbeat of this instance. It cannot fail in a process that should not have a heartbeat."""
    if not manager.is_to_run:
        return Check(True, {"here": False})
    instance = manager.presence.instance
    if instance is None or not instance.deadline:
        return Check(False, {"here": True}, "this process has not joined the fleet, or has left it")
    sent_at = instance.deadline - instance.lease.total_seconds()
    return Check(instance.is_alive, {"here": True}, f"{steady() - sent_at:.1f} s old", sent_at)


def _write_as_the_application(manager: BackgroundWorkerManager) -> None:
    """Try a write that changes nothing, on the application's own pool. Raises the errors of a real write.

    On SQLite this does not wait for another connection that writes at this moment.
    """
    with manager.app.app_context():
        engine = manager.db.engine
    if engine.dialect.name == "sqlite":
        is_locked(engine)  # raises the errors of a write
        return
    with engine.begin() as connection:
        connection.execute(update(workers).where(false()).values(paused_at=null()))
