"""The schedules that this release declares, written into the workers' rows."""

from collections.abc import Collection, Mapping

from ..ledger.claim import WorkerState
from ..registry import begins, declared_schedule
from ..stores import Stores
from ..worker import PeriodicWorker
from .presence import Presence


class DeclaredSchedules:
    """Writes the schedules of `workers` (by name), and notices rows that need them again."""

    def __init__(self, stores: Stores, presence: Presence, workers: Mapping[str, type[PeriodicWorker]]) -> None:
        self._stores, self._presence, self._workers = stores, presence, workers
        self._declared: dict[str, str] = {}
        self.are_settled = False
        """False while a row is missing, or has another release's schedule. Then each heartbeat should look."""

    def declare(self, names: Collection[str], again: bool = False) -> None:
        """Write the schedules of the workers `names`. With `again`, replace the schedules of an instance that left."""
        ours = {name: self._workers[name] for name in names if name in self._workers}
        schedules = {name: declared_schedule(worker) for name, worker in ours.items()}
        instance = self._presence.instance
        by, known = instance.id if instance else None, schedules.keys() if again else ()
        self._stores.controls.register(schedules, by, begins(ours.values()), known)
        # Do this afterwards: for `stale`, a declared worker without a row is a worker whose row was deleted.
        self._declared |= {name: str(schedule) for name, schedule in schedules.items()}

    def stale(self, states: Mapping[str, WorkerState]) -> list[str]:
        """Return the workers to declare again: their row was deleted, or the instance that declared them left.

        Only reads. When two releases run side by side, the most recently started instance sets the schedule. After it
        leaves, the remaining instances set the schedule.
        """
        known = self._declared.copy()  # another thread may declare a worker meanwhile
        declared = {name: text for name, text in known.items() if name in self._workers}
        others = [states[name] for name, text in declared.items() if name in states and states[name].declared != text]
        deleted = [name for name in declared if name not in states]
        self.are_settled = not (others or deleted)
        gone = self._stores.leases.gone({str(state.declared_by) for state in others}) if others else {}
        return deleted + [state.name for state in others if str(state.declared_by) in gone]
