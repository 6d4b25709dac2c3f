"""Messages a second beside other queues, counted in the table of the effects. Installs the queues by pip."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from sqlalchemy import Connection, create_engine, text

from ..harness.databases import context, database, driver_address, settle
from ..harness.figures import Figure, Setup, check, check_once, in_turns
from ..peers.environment import python, redis

PROGRAMS = Path(__file__).parents[1] / "peers"
PEERS = {"postgresql": ("procrastinate", "pgqueuer", "huey", "dramatiq", "celery"), "sqlite": ("huey",)}
BROKERS = {"huey": "Redis", "dramatiq": "Redis", "celery": "Redis"}
OURS = {"handle": "write", "handle_many": "write_many"}
LONGEST_SECONDS = 120


def run(setup: Setup) -> Iterator[Figure]:
    peers = [peer for peer in PEERS[setup.engine] if setup.only in (None, peer)]
    if not peers:
        return
    with ExitStack() as started:
        url = started.enter_context(database(setup.engine))
        with context(url):
            pass  # makes the tables
        brokers = {peer: BROKERS.get(peer, "") if setup.engine == "postgresql" else "SQLite" for peer in peers}
        race = Race(setup, url, started.enter_context(redis(python())) if "Redis" in brokers.values() else "")
        rates = in_turns(setup, "peers", {way: lambda way=way: race.rate(way) for way in (*OURS, *peers)})
        for peer, broker in brokers.items():
            name = f"{peer} on {broker}" if broker else peer
            for way in OURS:
                yield Figure(f"{way}, one consumer", "messages/s", rates[way], name, rates[peer])
        race.engine.dispose()


class Race:
    """Measures one way after another. Each way handles its messages in a process of its own."""

    def __init__(self, setup: Setup, url: str, redis: str) -> None:
        self._setup, self.engine = setup, create_engine(url)
        addresses = {"PEERS_URL": url, "PEERS_DATABASE": driver_address(url), "PEERS_REDIS": redis}
        self._environment = {**os.environ, **addresses}
        with self.engine.begin() as connection:
            connection.execute(text("CREATE TABLE peer_effects (message bigint, at double precision)"))

    def rate(self, way: str) -> float:
        """Return the messages in a second, from the first effect to the last."""
        number = self._number(way)
        with self.engine.begin() as connection:
            connection.execute(text("DELETE FROM peer_effects"))
        subprocess.run(
            self._command(way, "enqueue", number), env=self._environment, check=True, timeout=LONGEST_SECONDS
        )
        settle(self.engine, "")  # all tables
        command = self._command(way, "work", number)
        quiet = subprocess.DEVNULL
        with subprocess.Popen(command, env=self._environment, stdout=quiet, stderr=quiet) as process:
            try:
                self._wait(way, number)
            finally:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
        with self.engine.begin() as connection:
            found, different, seconds = self._counted(connection)
        check_once(number, found, different, way)
        return (number - 1) / seconds

    def _number(self, way: str) -> int:
        """Return the number of messages: enough for some seconds of each way."""
        full = 20_000 if way in OURS else 3_000 if way == "procrastinate" else 8_000
        return self._setup.size(300, full)

    def _command(self, way: str, what: str, number: int) -> list[str]:
        if way in OURS:
            return [sys.executable, "-m", "benchmarks.peers.ours", what, str(number), OURS[way]]
        return [python(), str(PROGRAMS / f"with_{way}.py"), what, str(number)]

    def _wait(self, way: str, number: int) -> None:
        deadline = time.monotonic() + LONGEST_SECONDS
        found = 0
        while found < number:
            check(time.monotonic() < deadline, f"{way}: {found} of {number} messages after {LONGEST_SECONDS} s")
            time.sleep(0.2)
            with self.engine.begin() as connection:
                found = self._counted(connection)[0]

    def _counted(self, connection: Connection) -> tuple[int, int, float]:
        counted = "SELECT count(*), count(DISTINCT message), max(at) - min(at) FROM peer_effects"
        found, different, seconds = connection.execute(text(counted)).one()
        return found, different, seconds or 0.0
