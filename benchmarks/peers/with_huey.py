"""huey on Redis, or on SQLite if the effects are there: threads, no results, and a short pause when idle."""

import effect
from huey import RedisHuey, SqliteHuey

if effect.IS_SQLITE:
    huey = SqliteHuey("peers", filename=f"{effect.DATABASE}.huey", results=False)
else:
    huey = RedisHuey("peers", url=effect.REDIS, results=False)


@huey.task()
def write(message: int) -> None:
    effect.write(message)


if __name__ == "__main__":
    what, number = effect.order()
    if what == "enqueue":
        for message in range(number):
            write(message)
    else:
        workers = 1 if effect.IS_SQLITE else 4  # SQLite has one writer
        huey.create_consumer(workers=workers, worker_type="thread", initial_delay=0.01, max_delay=0.1).run()
