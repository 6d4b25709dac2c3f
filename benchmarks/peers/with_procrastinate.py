"""Procrastinate: ten jobs at a time in one process, enqueued in bulk, and deleted when they are done."""

import asyncio
import time

import effect
from procrastinate import App, PsycopgConnector
from psycopg_pool import AsyncConnectionPool

app = App(connector=PsycopgConnector(conninfo=effect.DATABASE, min_size=4, max_size=12))
pool = AsyncConnectionPool(effect.DATABASE, min_size=10, max_size=10, open=False, kwargs={"autocommit": True})


@app.task(name="write")
async def write(message: int) -> None:
    async with pool.connection() as connection:
        await connection.execute(effect.STATEMENT, (message, time.time()))


async def main() -> None:
    what, number = effect.order()
    async with app.open_async():
        if what == "enqueue":
            if not await app.check_connection_async():
                await app.schema_manager.apply_schema_async()
            await write.batch_defer_async(*({"message": each} for each in range(number)))
        else:
            async with pool:
                await app.run_worker_async(concurrency=10, delete_jobs="always")


if __name__ == "__main__":
    asyncio.run(main())
