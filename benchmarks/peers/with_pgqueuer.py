"""PgQueuer on asyncpg and uvloop, as its guides advise: its table tuned, large batches, and a pool for the effects."""

import asyncio
import signal
import time
from datetime import timedelta

import asyncpg
import effect
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries

STATEMENT = "INSERT INTO peer_effects (message, at) VALUES ($1, $2)"
BATCH = 300
CONNECTIONS = 10


async def enqueue(queries: Queries, number: int) -> None:
    if not await queries.has_table("pgqueuer"):
        await queries.install()
        await queries.optimize_autovacuum()
    payloads: list[bytes | None] = [str(message).encode() for message in range(number)]
    await queries.enqueue(["write"] * number, payloads, [0] * number)


async def work(driver: AsyncpgDriver) -> None:
    queue = PgQueuer(driver)
    async with asyncpg.create_pool(effect.DATABASE, min_size=CONNECTIONS, max_size=CONNECTIONS) as pool:

        @queue.entrypoint("write")
        async def write(job: Job) -> None:
            await pool.execute(STATEMENT, int(job.payload or b"0"), time.time())

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, queue.shutdown.set)
        await queue.run(dequeue_timeout=timedelta(seconds=1), batch_size=BATCH)


async def main() -> None:
    what, number = effect.order()
    connection = await asyncpg.connect(effect.DATABASE)
    driver = AsyncpgDriver(connection)
    await (enqueue(Queries(driver), number) if what == "enqueue" else work(driver))
    await connection.close()


if __name__ == "__main__":
    uvloop.run(main())
