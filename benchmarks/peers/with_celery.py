"""celery on Redis: a pool of threads, no results, many messages fetched ahead, and no gossip between workers."""

import effect
from celery import Celery

app = Celery("peers", broker=effect.REDIS)
app.conf.update(task_ignore_result=True, worker_prefetch_multiplier=100, broker_connection_retry_on_startup=True)


@app.task(name="write")
def write(message: int) -> None:
    effect.write(message)


if __name__ == "__main__":
    what, number = effect.order()
    if what == "enqueue":
        with app.producer_pool.acquire() as producer:
            for message in range(number):
                write.apply_async((message,), producer=producer)
    else:
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel=error"]
        app.worker_main(["worker", "--pool=threads", "--concurrency=4", *quiet])
