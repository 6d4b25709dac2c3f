"""Locks of real processes: they count under a lock, die with one, and wake up after losing one."""

import signal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from support.fleet import PATIENCE, Fleet
from support.fork_server import Shops

from background import BackgroundWorkerManager
from background.database import tables

NAME = "invoice-42"


def row(manager: BackgroundWorkerManager) -> Any:
    with manager.stores.connections.locks.connect() as connection:
        return connection.execute(select(tables.locks).where(tables.locks.c.name == NAME)).one_or_none()


def expiry(manager: BackgroundWorkerManager, instance: str) -> Any:
    with manager.stores.leases.engine.connect() as connection:
        query = select(tables.instances.c.expires_at).where(tables.instances.c.id == instance)
        return connection.scalar(query)


def test_processes_that_count_under_a_lock_count_correctly(shops: Shops, tmp_path: Path) -> None:
    counted = tmp_path / "counted"
    counted.touch()
    for process in [shops.start("count", str(counted), "5") for _ in range(6)]:
        process.wait()
        assert "Error" not in process.output, process.output
    assert counted.read_text().splitlines() == [f"{number} {number + 1}" for number in range(30)]


def test_the_lock_of_a_killed_process_is_free_when_its_lease_is_over_and_not_before(
    shops: Shops, fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    victim, manager = shops.start(PROBE_WORKERS="locker", WORKERS_LEASE_SECONDS=1.5), fleet.manager()
    victim.wait_for("The locker has the token 1")
    victim.kill()
    until = expiry(manager, row(manager).instance)
    with manager.lock(NAME, timeout=PATIENCE) as lock:
        assert lock.token == 2
        assert row(manager).since >= until
    assert f"{victim.pid} held it and stopped renewing its lease" in caplog.text


def test_a_process_that_wakes_after_its_lease_knows_that_it_lost_the_lock_and_leaves_the_next_holders_lock_alone(
    shops: Shops, fleet: Fleet
) -> None:
    zombie, manager = shops.start(PROBE_WORKERS="locker", WORKERS_LEASE_SECONDS=1.5), fleet.manager()
    zombie.wait_for("The locker has the token 1")
    zombie.freeze()
    with manager.lock(NAME, timeout=PATIENCE) as lock:
        assert lock.token == 2
        zombie.thaw()
        zombie.wait_for("The locker is told, and still has it: False")
        zombie.wait_for("The locker released it")
        assert lock.still_held()
        assert row(manager).token == 2


def test_the_lock_of_a_stopping_process_is_free_at_once(shops: Shops, fleet: Fleet) -> None:
    patient = {"WORKERS_LEASE_SECONDS": 600, "WORKERS_SHUTDOWN_SECONDS": PATIENCE}
    holder, manager = shops.start(PROBE_WORKERS="locker", **patient), fleet.manager()
    holder.wait_for("The locker has the token 1")
    holder.signal(signal.SIGTERM)
    with manager.lock(NAME, timeout=PATIENCE) as lock:
        assert lock.token == 2
    holder.wait_for("The locker is told, and still has it: True")
