"""Who this process is in the fleet: the instance that it signs on as, and how it signs off."""

from collections.abc import Iterator
from contextlib import contextmanager

from flask import Flask
from sqlalchemy.exc import SQLAlchemyError

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

    def __init__(self, app: Flask, stores: Stores, runs: Runs) -> None:
        self._app, self._stores, self._runs = app, stores, runs
        self.instance: Instance | None = None
        """Set from joining the fleet to leaving it."""

    def sign_on(self) -> Instance:
        """A new life of this process, known to the fleet."""
        instance = Instance(self._stores.lease, release=self._app.config.get("RELEASE"))
        self._stores.leases.renew(instance)
        return instance

    def sign_off(self, instance: Instance, forget: bool = False) -> None:
        """The end of that life; what it still holds counts as handed back, or as lost if its lease is over."""
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

    def lose(self, instance: Instance) -> None:
        """The lease of `instance` ran out: tell its runs, and let nothing wait any longer for an answer."""
        self._runs.lose(LEASE_IS_OVER, instance)
        self._stores.connections.cut()

    @contextmanager
    def present(self, forget: bool = False) -> Iterator[Instance]:
        """This process's instance; where it has not joined (a command, a test) one that lives as long as the block.

        With `forget` nothing is kept of that: for what no execution tells of.
        """
        if (instance := self.instance) is not None:
            yield instance
            return
        instance = again_if_stale(self.sign_on)
        outage = Outage()

        def beat() -> None:
            if instance.is_alive:
                self._stores.leases.renew(instance)
                outage.ended()

        heartbeat = Heartbeat(
            self._app.config["WORKERS_HEARTBEAT_SECONDS"],
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
