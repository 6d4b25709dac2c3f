"""A database with a long history: workers, executions, instances and messages, and an admin who may see them."""

from dataclasses import dataclass
from datetime import UTC, datetime

from flask import Flask
from flask_security import hash_password
from sqlalchemy import Connection, text

from background.manager import the_manager
from models import User, db

EMAIL, PASSWORD = "admin@example.com", "correct horse battery staple"
RUNNING = 50


@dataclass(frozen=True)
class Size:
    workers: int
    executions: int
    instances: int
    messages: int


def fill(app: Flask, size: Size) -> None:
    admin = User(email=EMAIL, name="Admin", is_admin=True, created_at=datetime.now(UTC), confirmed_at=datetime.now(UTC))
    admin.password = hash_password(PASSWORD)
    db.session.add(admin)
    db.session.commit()
    stores = the_manager().stores
    with stores.connections.heartbeats.begin() as connection:
        fill_instances(connection, size)
    with db.engine.begin() as connection:
        fill_executions(connection, size)
        fill_workers(connection, size)
        fill_totals(connection, size)
        fill_messages(connection, size)
    while stores.roll_up.step():
        pass
    with db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        # The work that such inserts leave to a server would slow the first pages.
        is_server = connection.dialect.name == "postgresql"
        for statement in ("VACUUM ANALYZE", "CHECKPOINT") if is_server else ("ANALYZE",):
            connection.exec_driver_sql(statement)


def insert(connection: Connection, rows: int, table: str, **columns: str) -> None:
    """Insert `rows` rows. Each column is an SQL expression of `i`, which counts from 1."""
    names, expressions = ", ".join(columns), ", ".join(columns.values())
    numbers = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows})"
    connection.execute(text(f"INSERT INTO {table} ({names}) {numbers} SELECT {expressions} FROM n"))


def before(connection: Connection, seconds: str) -> str:
    """Return SQL for the moment `seconds` ago. `seconds` is an SQL expression."""
    if connection.dialect.name == "postgresql":
        return f"now() - ({seconds}) * interval '1 second'"
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', printf('%+.3f seconds', -({seconds})))"


def fill_instances(connection: Connection, size: Size) -> None:
    insert(
        connection,
        size.instances,
        "background_instances",
        id="'instance_' || i",
        host="'host-' || i",
        pid="4000 + i",
        started_at=before(connection, "86400 + i"),
        heartbeat_at=before(connection, "1"),
        expires_at=before(connection, "-86400"),
        clock_offset="0.001",
        release="'3f2a91c'",
    )


def fill_executions(connection: Connection, size: Size) -> None:
    """Insert the executions of a fleet that begins about 17 each second. Some fail, and the newest are running."""
    began = f"({size.executions} - i) * 0.06"
    is_running, has_failed = f"i > {size.executions - RUNNING}", "i % 97 = 0"
    insert(
        connection,
        size.executions,
        "background_executions",
        worker=f"'worker_' || (i % {size.workers})",
        tick=before(connection, f"{began} + 0.01"),
        trigger="'schedule'",
        state=f"CASE WHEN {is_running} THEN 'running' WHEN {has_failed} THEN 'failed' ELSE 'succeeded' END",
        attempt="1",
        token="i",
        instance=f"'instance_' || (1 + i % {size.instances})",
        instance_name=f"'host-' || (1 + i % {size.instances}) || ':' || (4001 + i % {size.instances})",
        started_at=before(connection, began),
        finished_at=f"CASE WHEN NOT ({is_running}) THEN {before(connection, f'{began} - 0.05')} END",
        reason=f"CASE WHEN {has_failed} THEN 'Traceback (most recent call last):\n  File ...\nOSError: no' END",
        log="'2026-11-20 12:00:00,000 INFO    looked at ' || i || ' rows'",
    )


def fill_workers(connection: Connection, size: Size) -> None:
    insert(
        connection,
        size.workers,
        "background_workers",
        name="'worker_' || (i - 1)",
        mark=before(connection, "60"),
        token=f"{size.executions} + 1",
        schedule="'every 3600s'",
        declared="'every 3600s'",
        scheduled_at=before(connection, "86400"),
        running=f"(SELECT token FROM background_executions WHERE id > {size.executions - RUNNING}"
        f" AND worker = 'worker_' || (n.i - 1) ORDER BY id DESC LIMIT 1)",
    )


def fill_totals(connection: Connection, size: Size) -> None:
    """Insert the sums of each worker: of three states, and of twelve buckets of each histogram."""
    for kind in ("state", "duration", "lateness"):
        labels = 3 if kind == "state" else 12
        insert(
            connection,
            size.workers * labels,
            "background_totals",
            worker=f"'worker_' || (i % {size.workers})",
            kind=f"'{kind}'",
            label=f"CASE (i - 1) / {size.workers} WHEN 0 THEN 'succeeded' WHEN 1 THEN 'failed' ELSE 'lost' END"
            if kind == "state"
            else f"'' || ((i - 1) / {size.workers})",
            count="i",
            seconds="i * 0.5",
            latest_at=before(connection, "60"),
        )


def fill_messages(connection: Connection, size: Size) -> None:
    """Insert messages. Most are done, 1 % wait, 0.1 % are dead and 0.01 % are running."""
    is_waiting, is_dead, is_running = "i % 100 = 1", "i % 1000 = 0", "i % 10000 = 2"
    state = f"CASE WHEN {is_waiting} THEN 'waiting' WHEN {is_dead} THEN 'dead' WHEN {is_running} THEN 'running'"
    at = f"({size.messages} - i) * 0.02"
    insert(
        connection,
        size.messages,
        "background_messages",
        topic="CASE i % 3 WHEN 0 THEN 'mail' ELSE 'orders' END",
        payload="'{\"order\": ' || i || '}'",
        state=f"{state} ELSE 'done' END",
        enqueued_at=before(connection, at),
        due_at=before(connection, at),
        attempt="1",
        token="1",
        instance=f"CASE WHEN {is_running} THEN 'instance_' || (1 + i % {size.instances}) END",
        claimed_at=before(connection, at),
        finished_at=f"CASE WHEN NOT ({is_waiting} OR {is_running}) THEN {before(connection, at)} END",
    )
    insert(
        connection,
        size.messages // 1000,
        "background_message_errors",
        message="i * 1000",
        attempt="1",
        at=before(connection, "60"),
        error="'Traceback (most recent call last):\n  File ...\nOSError: no'",
    )
