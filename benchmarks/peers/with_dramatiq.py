"""dramatiq on Redis: one process with eight threads, its default."""

import os
import sys
from pathlib import Path

import dramatiq
import effect
from dramatiq.brokers.redis import RedisBroker

dramatiq.set_broker(RedisBroker(url=effect.REDIS))


@dramatiq.actor(actor_name="write")
def write(message: int) -> None:
    effect.write(message)


if __name__ == "__main__":
    what, number = effect.order()
    if what == "enqueue":
        for message in range(number):
            write.send(message)
    else:
        os.chdir(Path(__file__).parent)
        command = ["dramatiq", "with_dramatiq", "--processes", "1", "--threads", "8"]
        os.execv(sys.executable, [sys.executable, "-m", *command])
