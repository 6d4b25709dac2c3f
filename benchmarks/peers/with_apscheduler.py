"""APScheduler with its own job store: many jobs that are due at the same instant, each second.

Its job stores do not share ticks between processes, so this is one process. The settings let no tick be dropped: no
grace time, and no merging of late ticks. Each job writes one row as its effect.

APScheduler does not tell a job its tick. As it drops no tick, the tick of a job follows from the number of its runs.
"""

import itertools
import os
import sys
import time
from datetime import UTC, datetime

import effect
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
from apscheduler.schedulers.background import BackgroundScheduler

VALUES = "?, ?, ?" if effect.IS_SQLITE else "%s, %s, %s"
STATEMENT = f"INSERT INTO benchmark_late (worker, tick, late) VALUES ({VALUES})"

ticks: dict[int, "itertools.count[int]"] = {}
"""The ticks of each job that are still to run."""


def work(number: int) -> None:
    tick = next(ticks[number])
    effect.connection().execute(STATEMENT, (number, tick, time.time() - tick))


def main(number: int) -> None:
    scheduler = BackgroundScheduler(
        jobstores={"default": SQLAlchemyJobStore(os.environ["PEERS_URL"])},
        executors={"default": ThreadPoolExecutor(10)},
        job_defaults={"misfire_grace_time": None, "coalesce": False, "max_instances": 1_000_000},
        timezone=UTC,
    )
    start = datetime.fromtimestamp(int(time.time()), UTC)
    scheduler.start(paused=True)
    scheduler.remove_all_jobs()
    for each in range(number):
        job = scheduler.add_job("__main__:work", "interval", seconds=1, start_date=start, args=[each], id=str(each))
        ticks[each] = itertools.count(int(job.next_run_time.timestamp()))
    scheduler.resume()
    print("ready", flush=True)
    sys.stdin.readline()
    scheduler.shutdown(wait=False)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
