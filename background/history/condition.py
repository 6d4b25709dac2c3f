"""The condition of the fleet: whether an instance is alive, and which workers wait or are stuck."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import String, cast, distinct, func, select

from ..database.tables import executions, instances, messages, workers
from ..ledger.claim import is_of_claim
from ..ledger.leases import is_alive
from ..stores import Stores
from ..worker import PeriodicWorker
from .instances import InstanceHistory, Silence
from .status import WorkerStatus, statuses
from .text import second, silent, span


@dataclass(frozen=True)
class Condition:
    """The known state of the fleet at one moment."""

    silence: Silence | None
    alive: int
    statuses: list[WorkerStatus]
    full: dict[str, int]
    """By the name of each instance whose threads are all in use: the number of these threads."""

    @property
    def overdue(self) -> list[str]:
        """The workers with a tick that waits although two later ticks came."""
        return [each.name for each in self.statuses if each.is_overdue]

    @property
    def stuck(self) -> dict[str, str]:
        """The workers whose run will not end by itself, each with the reason."""
        return {each.name: each.stuck for each in self.statuses if each.stuck}

    @property
    def late(self) -> list[WorkerStatus]:
        """The workers with a tick that waits longer than an instance takes to begin it."""
        return [each for each in self.statuses if each.is_late]

    def problems(self) -> list[str]:
        """Return one sentence for each problem that an operator must solve."""
        found = [silent(self.silence)] if self.silence else []
        found += map(self.tardy, self.late)
        found += [f"The worker {name} is stuck: {why}." for name, why in self.stuck.items()]
        if self.late:
            found += [
                f"The threads of {name} are used up ({count} of WORKERS_THREADS): raise it, or start another instance."
                for name, count in self.full.items()
            ]
        return found

    def tardy(self, worker: WorkerStatus) -> str:
        """Return the sentence about an overdue worker."""
        since = f"since {second(worker.waits_since)} ({span(worker.waits_for)})"
        alive = "" if self.silence else f", although {_are(self.alive)} alive: the log of an instance says why"
        return f"The worker {worker.name} is overdue {since}{alive}."


def _are(count: int) -> str:
    return "1 instance is" if count == 1 else f"{count} instances are"


def condition(stores: Stores, ours: Mapping[str, type[PeriodicWorker]]) -> Condition:
    """Return the fleet's condition by the database's clock, in a constant number of queries.

    `ours` are the workers of this release. Each instance should have as many threads as this process.
    """
    threads = stores.app.config["WORKERS_THREADS"]
    # Read where the instances' rows are. On SQLite that is a file of its own, which can read the other rows too.
    alive: dict[str, str] = {row.id: row.name for row in stores.leases.read(_alive)}
    full = {alive[id]: count for id, count in _busy(stores).items() if id in alive and count >= threads}
    return Condition(InstanceHistory(stores.leases).silence(), len(alive), statuses(stores, ours), full)


_name = instances.c.host + ":" + cast(instances.c.pid, String)
_alive = select(instances.c.id, _name.label("name")).where(is_alive)
_runs = select(executions.c.instance, func.count()).join(workers, is_of_claim).group_by(executions.c.instance)
_batches = (
    select(messages.c.instance, func.count(distinct(messages.c.batch)))
    .where(messages.c.state == "running")
    .group_by(messages.c.instance)
)


def _busy(stores: Stores) -> dict[str, int]:
    """Count the threads that each instance uses for runs and for batches of messages."""
    busy: Counter[str] = Counter()
    for query in (_runs, _batches):
        for instance, count in stores.leases.read(query):
            busy[instance] += count
    return busy
