"""Binds the alarms to a manager. Without a setting for alarms, and without a `ping_url`, they add nothing to it."""

from functools import partial

from ..manager import BackgroundWorkerManager
from . import delivery
from .pings import Pings
from .watch import FleetWatch


def attach(manager: BackgroundWorkerManager) -> None:
    """Add the workers that send alerts, and the watch over the fleet, as far as the settings name channels."""
    manager.when_added(Pings(manager).follow)
    if channels := delivery.channels(manager.app):
        for worker in channels:
            manager.add(worker)
        manager.watch = FleetWatch(manager)
        refuse = partial(delivery.refuse_missing_mailer, manager)
        manager.before_start(refuse, check=refuse)
