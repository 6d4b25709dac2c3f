"""PgQueuer: batches of 100 in one process, enqueued in bulk, and a pool for the effects."""

import asyncio
import signal
import time
from datetime import timedelta

import effect
import psycopg
from pgqueuer import PgQueuer
from pgqueuer.db import PsycopgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries
from psycopg_pool import AsyncConnectionPool


async def enqueue(queries: Queries, number: int) -> None:
    if not await queries.has_table("pgqueuer"):
        await queries.install()
    payloads: list[bytes | None] = [str(message).encode() for message in range(number)]
    await queries.enqueue(["write"] * number, payloads, [0] * number)


async def work(driver: PsycopgDriver) -> None:
    pool = AsyncConnectionPool(effect.DATABASE, min_size=10, max_size=10, open=False, kwargs={"autocommit": True})
    queue = PgQueuer(driver)

    @queue.entrypoint("write")
    async def write(job: Job) -> None:
        async with pool.connection() as connection:
            await connection.execute(effect.STATEMENT, (int(job.payload or b"0"), time.time()))

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, queue.shutdown.set)
    async with pool:
        await queue.run(dequeue_timeout=timedelta(seconds=1), batch_size=100)


async def main() -> None:
    what, number = effect.order()
    async with await psycopg.AsyncConnection.connect(effect.DATABASE, autocommit=True) as connection:
        driver = PsycopgDriver(connection)
        await (enqueue(Queries(driver), number) if what == "enqueue" else work(driver))


if __name__ == "__main__":
    asyncio.run(main())
