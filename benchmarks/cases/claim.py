"""Claims of a tick: one that wins, beside hand-written SQL, and one that loses, beside one read."""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import psycopg
from sqlalchemy import text, update

from background import PeriodicWorker, WorkerContext
from background.database.tables import executions, workers
from background.ledger.ledger import Ledger
from background.ledger.statements import at_tick
from models import db

from ..harness.clock import clock
from ..harness.databases import context, database, driver_address, without_workers
from ..harness.figures import Figure, Setup, check, check_once, in_turns, median

INSTANCE = ("i" * 32, "host:1")
RACERS = 4

# The columns and conditions of the engine's claim, written by hand.
CLAIMED = """
    UPDATE background_workers SET mark = :at, token = token + 1, running = token + 1, claim = :claim_id,
        claim_tick = :at, claim_attempt = 1, claim_trigger = 'schedule', claim_instance = :on,
        claim_instance_name = :on_name, claim_at = {now}, pending_tick = NULL, pending_after = NULL,
        pending_until = NULL
    WHERE name = :of AND (mark IS NULL OR mark < :at) AND :at <= {now} AND schedule = :by
        AND (mark >= :previous OR scheduled_at >= :previous) AND paused_at IS NULL AND pending_tick IS NULL
        AND running IS NULL
    RETURNING token
"""
STARTED = """
    INSERT INTO background_executions
        (worker, tick, trigger, state, attempt, token, claim, instance, instance_name, started_at)
    SELECT :of, :at, 'schedule', 'running', 1, {token}, :claim_id, :on, :on_name, {now} {source}
    RETURNING attempt, token, trigger, id, started_at
"""
FREE = text("UPDATE background_workers SET running = NULL, claim = NULL WHERE name = 'hourly'")


class Hourly(PeriodicWorker):
    """The worker whose ticks this case claims. It never runs."""

    name = "hourly"
    period = timedelta(hours=1)

    def do_work(self, context: WorkerContext) -> None:
        pass


def run(setup: Setup) -> Iterator[Figure]:
    with database(setup.engine) as url, context(url):
        manager = without_workers()
        manager.add(Hourly)
        manager.recovery.look(Hourly, asked=datetime.now(UTC))
        claims = Claims(manager.stores.ledger, by_hand())
        number = setup.size(20, 300)
        ways = {
            "engine": lambda: claims.win(claims.by_engine, number),
            "hand": lambda: claims.win(claims.by_hand, number),
        }
        aim = ">= 0.85" if setup.engine == "postgresql" else ""
        won = in_turns(setup, "a claim that wins", ways)
        claims.check()
        yield Figure("a claim that wins", "claims/s", won["engine"], "hand-written SQL", won["hand"], aim)
        ways = {"engine": lambda: rate(number, claims.lose), "read": lambda: rate(number, read)}
        lost = in_turns(setup, "a claim that loses", ways)
        yield Figure("a claim that loses", "claims/s", lost["engine"], "one read by SQLAlchemy", lost["read"])
        for _ in range(setup.size(5, 50)):
            claims.race()
        claims.check()


class Claims:
    """Claims one tick after another, by the engine or by hand-written SQL."""

    def __init__(self, ledger: Ledger, hand: Callable[[dict[str, Any]], Any]) -> None:
        self._ledger, self._hand = ledger, hand
        self._schedule = self._look()
        self._tick = datetime(2020, 1, 1, tzinfo=UTC)
        self.won = 0
        with db.engine.begin() as connection:
            connection.execute(update(workers).values(mark=None, scheduled_at=self._tick))

    def _look(self) -> str:
        state = self._ledger.look(Hourly.name)
        assert state is not None
        return state.schedule_text

    def free(self) -> None:
        """Free the worker, and go on to its next tick."""
        with db.engine.begin() as connection:
            connection.execute(FREE)
        self._tick += Hourly.period

    def win(self, claim: Callable[[datetime], bool], number: int) -> float:
        """Claim `number` ticks. Return the rate of the median claim."""
        self.won += number
        return rate(number, lambda: check(claim(self._tick), "a claim of a new tick did not win"), self.free)

    def by_engine(self, tick: datetime) -> bool:
        return bool(self._ledger.claim(Hourly.name, tick, self._schedule, INSTANCE))

    def by_hand(self, tick: datetime) -> bool:
        names = {"on": INSTANCE[0], "on_name": INSTANCE[1], "claim_id": uuid4().hex}
        return bool(self._hand(at_tick(Hourly.name, tick, self._schedule) | names))

    def lose(self) -> None:
        check(not self.by_engine(self._tick), f"the tick {self._tick} was claimed twice")

    def race(self) -> None:
        """Let some threads claim the same tick at once. Exactly one of them may win."""
        self.free()
        tick, start, won = self._tick, threading.Barrier(RACERS), []

        def claim() -> None:
            start.wait()
            won.append(self.by_engine(tick))

        threads = [threading.Thread(target=claim) for _ in range(RACERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        check(sorted(won) == [False] * (RACERS - 1) + [True], f"{RACERS} claims of {tick} at once: {won}")
        self.won += 1

    def check(self) -> None:
        """Check that each claim that won has one row."""
        with db.engine.connect() as connection:
            found = connection.scalars(db.select(executions.c.tick)).all()
        check_once(self.won, len(found), len(set(found)), "claims")


def rate(number: int, work: Callable[[], None], prepare: Callable[[], None] = lambda: None) -> float:
    """Return the rate of the median call. The time of `prepare` before each call does not count."""
    took = []
    for _ in range(number):
        prepare()
        began = clock()
        work()
        took.append(clock() - began)
    return 1 / median(took)


def read() -> None:
    """Send one read on a connection of the pool, in a transaction of its own."""
    with db.engine.connect() as connection:
        connection.execute(text("SELECT 1")).all()


def connect() -> Any:
    """Open a connection of the driver, which commits each statement."""
    if db.engine.dialect.name == "sqlite":
        connection = sqlite3.connect(driver_address(db.engine.url), isolation_level=None, timeout=10)
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection
    return psycopg.connect(driver_address(db.engine.url), autocommit=True, prepare_threshold=None)


def by_hand() -> Callable[[dict[str, Any]], Any]:
    """Return a function that claims a tick by hand: in one statement, or in one transaction on SQLite."""
    connection = connect()
    if db.engine.dialect.name == "sqlite":
        return lambda values: on_sqlite(connection, values)
    claimed, source = CLAIMED.format(now="clock_timestamp()"), "FROM claimed"
    started = STARTED.format(now="clock_timestamp()", token="token", source=source)
    statement = with_names(f"WITH claimed AS ({claimed}) {started}")
    return lambda values: connection.execute(statement, values).fetchone()


def with_names(statement: str) -> str:
    """Return the statement with the parameters of psycopg."""
    for name in ("at", "claim_id", "on_name", "on", "of", "by", "previous"):
        statement = statement.replace(f":{name}", f"%({name})s")
    return statement


NOW = "strftime('%Y-%m-%d %H:%M:%f000', 'now')"
CLAIMED_ON_SQLITE = CLAIMED.format(now=NOW)
STARTED_ON_SQLITE = STARTED.format(now=NOW, token=":token", source="")


def on_sqlite(connection: sqlite3.Connection, values: dict[str, Any]) -> Any:
    given = {
        name: f"{each:%Y-%m-%d %H:%M:%S.%f}" if isinstance(each, datetime) else each for name, each in values.items()
    }
    connection.execute("BEGIN IMMEDIATE")
    [token] = connection.execute(CLAIMED_ON_SQLITE, given).fetchone()
    row = connection.execute(STARTED_ON_SQLITE, given | {"token": token}).fetchone()
    connection.execute("COMMIT")
    return row
