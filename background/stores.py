"""One of each: the connections of one application, and what reads and writes rows by them."""

from datetime import timedelta
from functools import partial

from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from .database.connections import Connections, made_once
from .database.dialects import sqlite
from .database.notifications import ring
from .database.outages import Outages
from .database.sessions import schema_of
from .database.store import Store
from .ledger.controls import Controls
from .ledger.leases import Leases
from .ledger.ledger import Ledger
from .messages.queue import Queue
from .repair.clock_ahead import ClockRepair
from .repair.edited_rows import RowRepair


class Stores:
    """What the engine keeps in one database. Nothing is opened before it is asked for."""

    def __init__(self, app: Flask, db: SQLAlchemy, outages: Outages) -> None:
        self._app, self._db, self.outages = app, db, outages

    @property
    def lease(self) -> timedelta:
        """How long an instance counts as alive without a heartbeat."""
        return timedelta(seconds=self._app.config["WORKERS_LEASE_SECONDS"])

    @made_once
    def connections(self) -> Connections:
        """The engine's own pools."""
        with self._app.app_context():
            return Connections(self._db.engine, self.lease.total_seconds(), schema_of(self._db), self.outages)

    @made_once
    def main(self) -> Store:
        """The transactions on the main database."""
        connections, lease = self.connections, self.lease.total_seconds()
        return Store(connections.claims, lease, partial(ring, connections), connections.sessions)

    @made_once
    def ledger(self) -> Ledger:
        """Claims and executions."""
        return Ledger(self.main)

    @made_once
    def controls(self) -> Controls:
        """Schedules and pauses."""
        return Controls(self.ledger)

    @made_once
    def row_repair(self) -> RowRepair:
        """Rows that were changed by hand."""
        return RowRepair(self.ledger)

    @made_once
    def clock_repair(self) -> ClockRepair:
        """Rows from a time when the database's clock was ahead."""
        return ClockRepair(self.main, timedelta(days=self._app.config["WORKERS_HISTORY_DAYS"]))

    @made_once
    def queue(self) -> Queue:
        """Messages and their errors."""
        return Queue(self.main)

    @made_once
    def leases(self) -> Leases:
        """Leases and heartbeats."""
        return Leases(self.connections.heartbeats, self.lease.total_seconds())

    def write(self) -> None:
        """Change nothing, and raise the errors of a database that takes no writes."""
        self.leases.write()
        if self.connections.heartbeat_file:  # on SQLite the instances are not in the main database's file
            sqlite.try_to_write(self.main.engine)

    def close(self) -> None:
        """Close the connections. They open again when they are asked for."""
        if "connections" in self.__dict__:
            self.connections.close()
