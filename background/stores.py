"""The connections of one application, and the objects that read and write rows with them, one of each."""

from datetime import timedelta
from functools import partial

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Engine

from .database import opening, tables
from .database.connections import Connections, made_once
from .database.dialects import postgresql, sqlite
from .database.migrations import refuse_old_tables
from .database.notifications import Notifier, ring
from .database.outages import Outages, place
from .database.sessions import refuse_autocommit_options, schema_of
from .database.store import Store
from .ledger.controls import Controls
from .ledger.leases import Leases
from .ledger.ledger import Ledger
from .messages.dead_letters import DeadLetters
from .messages.pauses import Pauses
from .messages.queue import Queue
from .repair.clock_ahead import ClockRepair
from .repair.edited_rows import RowRepair
from .tallies.rollup import RollUp


class Stores:
    """The engine's access to one database. Opens nothing before its first use."""

    def __init__(self, app: Flask, db: SQLAlchemy, outages: Outages) -> None:
        self.app, self.db, self.outages = app, db, outages

    @property
    def lease(self) -> timedelta:
        """The time for which an instance counts as alive without a heartbeat."""
        return timedelta(seconds=self.app.config["WORKERS_LEASE_SECONDS"])

    @made_once
    def connections(self) -> Connections:
        """The engine's own pools."""
        with self.app.app_context():
            return Connections(self.db.engine, self.lease.total_seconds(), schema_of(self.db), self.outages)

    @made_once
    def notifier(self) -> Notifier:
        """The notifications of committed messages."""
        return Notifier(self.connections)

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
        """Rows that a user edited."""
        return RowRepair(self.ledger)

    @made_once
    def clock_repair(self) -> ClockRepair:
        """Rows from a time when the database's clock was ahead."""
        return ClockRepair(self.main, timedelta(days=self.app.config["WORKERS_HISTORY_DAYS"]))

    @made_once
    def queue(self) -> Queue:
        """Messages and their errors."""
        return Queue(self.main)

    @made_once
    def dead_letters(self) -> DeadLetters:
        """Messages that a user retries or discards."""
        return DeadLetters(self.main)

    @made_once
    def pauses(self) -> Pauses:
        """The paused topics."""
        return Pauses(self.main)

    @made_once
    def roll_up(self) -> RollUp:
        """The counts for charts."""
        return RollUp(self.main, timedelta(days=self.app.config["WORKERS_HISTORY_DAYS"]))

    @made_once
    def leases(self) -> Leases:
        """Leases and heartbeats."""
        return Leases(self.connections.heartbeats, self.lease.total_seconds())

    def refuse_autocommit(self) -> None:
        """Open a session as the application does. Raises InvalidConfig if it commits each statement."""
        with self.db.session() as session:
            self.connections.sessions.within(session)

    def refuse_old_tables(self) -> None:
        """Raise DatabaseNotReady if the engine's tables are of an older version. Needs an app context."""
        with self.db.engine.connect() as connection:
            refuse_old_tables(connection, schema_of(self.db))

    def write(self) -> None:
        """Change nothing, and raise the errors of a database that takes no writes."""
        self.leases.write()
        if self.connections.heartbeat_file:  # on SQLite the instances are not in the main database's file
            sqlite.is_locked(self.main.engine)  # raises the errors of a write

    def close(self) -> None:
        """Close the connections. They open again with their next use."""
        if "notifier" in self.__dict__:
            self.notifier.close()
        if "connections" in self.__dict__:
            self.connections.close()


def add_tables(db: SQLAlchemy) -> None:
    """Add the engine's tables to the metadata of the application."""
    schema = db.metadata.schema
    for name, table in tables.metadata.tables.items():
        if (f"{schema}.{name}" if schema else name) not in db.metadata.tables:
            table.to_metadata(db.metadata, schema=schema)  # type: ignore[arg-type]


def prepare_engines(db: SQLAlchemy, outages: Outages) -> tuple[Engine, ...]:
    """Prepare the application's engines and return them. Opens no connection, and needs an app context.

    Raises InvalidConfig for a database that the workers cannot use.
    """
    opening.refuse_driver(db.engine)
    sqlite.refuse_memory(db.engine)
    refuse_autocommit_options(db.engine)
    opening.prepare(db.engine)
    engines = tuple(db.engines.values())
    for engine in engines:
        sqlite.prepare(engine)
        postgresql.prepare(engine)
        if place(engine.url) == place(db.engine.url):  # a bind may lead to another database
            outages.watch(engine)
    return engines
