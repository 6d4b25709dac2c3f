"""The presence of this process in the fleet: the instance that it signs on as, and the lease of that instance."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import SQLAlchemyError

from ..database.clock import steady
from ..database.connections import again_if_stale
from ..database.notifications import ring
from ..errors import first_line
from ..host.logs import Outage, logger_of
from ..ledger.leases import LEASE_IS_OVER, Instance
from ..runs.running import Runs
from ..stores import Stores
from .heartbeat import Heartbeat

log = logger_of(__name__)


class Presence:
    """This process's instance, if it has joined the fleet."""

    def __init__(self, stores: Stores, runs: Runs) -> None:
        self._stores, self._runs = stores, runs
        self.instance: Instance | None = None
        """Set from joining the fleet to leaving it."""

    def sign_on(self) -> Instance:
        """Begin a new instance of this process, and make it known to the fleet."""
        instance = Instance(self._stores.lease, release=self._stores.app.config.get("RELEASE"))
        self._stores.leases.renew(instance)
        return instance

    def sign_off(self, instance: Instance, forget: bool = False) -> None:
        """End the instance. Everything that it still holds counts as handed back, or as lost if its lease is over.

        With `forget` delete the instance's row.
        """
        if not instance.is_alive:
            return
        try:
            if forget:
                self._stores.leases.forget(instance)
            else:
                self._stores.leases.sign_off(instance)
                ring(self._stores.connections)
        except SQLAlchemyError as error:
            log.warning("Could not sign off, so the lease must run out first: %s", first_line(error))

    def deadline(self) -> float:
        """Return the end of this instance's lease, on the `steady()` clock."""
        return instance.deadline if (instance := self.instance) else 0.0

    def until_expiry(self) -> float:
        """Return the seconds until the first lease of another instance ends."""
        return max(instance.first_expiry - steady(), 0.0) if (instance := self.instance) else math.inf

    def lose_lease(self) -> None:
        """Stop the runs of this process's instance, if there is one: its lease is over."""
        if (instance := self.instance) is not None:
            self.lose(instance)

    def lose(self, instance: Instance) -> None:
        """Stop the runs of `instance`, whose lease is over. Cut the connections, so that no call waits longer."""
        self._runs.lose(LEASE_IS_OVER, instance)
        self._stores.connections.cut()

    @contextmanager
    def present(self, forget: bool = False) -> Iterator[Instance]:
        """Give this process's instance. Outside the fleet (a command, a test), sign an instance on for the block.

        With `forget` delete its row afterwards. Locks do this, as they leave no execution.
        """
        if (instance := self.instance) is not None:
            yield instance
            return
        instance = again_if_stale(self.sign_on)
        outage = Outage()

        def beat() -> None:
            if instance.is_alive:
                self._runs.cancel(self._stores.leases.renew(instance).cancels)
                outage.ended()

        heartbeat = Heartbeat(
            self._stores.app.config["WORKERS_HEARTBEAT_SECONDS"],
            beat,
            lambda error: log.log(outage.level(), "No heartbeat: %s", first_line(error)),
            lambda: instance.deadline,
            lambda: self.lose(instance),
        )
        heartbeat.start()
        try:
            yield instance
        finally:
            heartbeat.stop()
            self.sign_off(instance, forget)
