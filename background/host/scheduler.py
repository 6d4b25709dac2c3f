"""Calls functions at their time, with APScheduler. No other file imports APScheduler."""

import random
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from queue import SimpleQueue
from typing import Any

from apscheduler.executors.base import BaseExecutor, run_job
from apscheduler.job import Job
from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.schedulers.base import STATE_STOPPED

from .logs import quieten


class Scheduler:
    """Calls functions at given times, each on one of `threads` daemon threads. Makes late calls, too.

    All calls of one moment are one job of APScheduler: adding a job takes longer than losing a tick.
    """

    def __init__(self, threads: int) -> None:
        self._threads = _DaemonThreads(threads)
        self._planned: dict[str, datetime] = {}
        self._moments: dict[datetime, tuple[Job, dict[str, Callable[[], object]]]] = {}
        self._planning = threading.Lock()
        self._scheduler = _Scheduler(
            executors={"default": self._threads},
            # Make every call, also a late one or a second one at the same time. The ledger decides which tick runs.
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1_000_000},
            timezone=UTC,
            daemon=True,
        )

    def start(self) -> None:
        quieten("apscheduler")  # it logs several lines for each tick
        self._scheduler.start()

    @property
    def is_alive(self) -> bool:
        """False if the thread that makes the calls has died."""
        thread: threading.Thread | None = self._scheduler._thread
        return thread is None or thread.is_alive()

    def stop(self) -> None:
        """Begin no other call. Does not wait for calls in progress."""
        self._scheduler.shutdown(wait=False)

    def wait(self, seconds: float) -> bool:
        """Wait until no call is in progress, so that the connections in use can be closed. False if a call still is."""
        return self._threads.wait(seconds)

    def replace(self, thread: int) -> None:
        """Start another thread in the place of `thread`, which hangs. Ignores threads of other kinds."""
        self._threads.replace(thread)

    def at(self, when: datetime, key: str, function: Callable[..., object], *args: Any) -> None:
        """Call `function(*args)` at `when`, on this host's clock. Replaces an earlier call with that `key`."""
        with self._planning:
            self._forget(key)
            if when not in self._moments:
                self._moments[when] = self._scheduler.add_job(self._make_calls, "date", run_date=when, args=[when]), {}
            self._moments[when][1][key] = partial(function, *args)
            self._planned[key] = when

    def after(self, seconds: float, key: str, function: Callable[..., object], *args: Any) -> None:
        """Call `function(*args)` that many seconds from now. Replaces an earlier call with that `key`."""
        self.at(datetime.now(UTC) + timedelta(seconds=seconds), key, function, *args)

    def soon(self, function: Callable[..., object], *args: Any) -> None:
        """Call `function(*args)` as soon as a thread is free. This does not pass through APScheduler's own thread."""
        self._threads.call(partial(function, *args))

    @property
    def is_awaited(self) -> bool:
        """True while a call that is due waits for a thread."""
        return self._threads.is_awaited

    def look_again(self) -> None:
        """Make the calls that are due. APScheduler does not notice that the host slept, or that its clock was set."""
        self._scheduler.wakeup()

    def forget(self, key: str) -> None:
        """Do not make the call with that `key`."""
        with self._planning:
            self._forget(key)

    def _forget(self, key: str) -> None:
        if (when := self._planned.pop(key, None)) is not None:
            job, calls = self._moments[when]
            del calls[key]
            if not calls:
                del self._moments[when]
                with suppress(JobLookupError):
                    job.remove()

    def _make_calls(self, when: datetime) -> None:
        """Make the calls of one moment in a random order. In the same order, all instances would claim the same tick.

        Concurrency: another thread may plan a call for `when` at the same time. It joins these calls, or has a new job.
        """
        with self._planning:
            _, planned = self._moments.pop(when, (None, {}))
            for key in planned:
                del self._planned[key]
        calls = list(planned.values())
        random.shuffle(calls)
        for call in calls[1:]:
            self._threads.call(call)
        for call in calls[:1]:
            call()


class _Scheduler(BackgroundScheduler):  # type: ignore[misc]
    def _process_jobs(self) -> float | None:
        """Ignore a job that is missing after a shutdown: the shutdown removed it before this thread could."""
        try:
            return super()._process_jobs()  # type: ignore[no-any-return]
        except JobLookupError:
            if self.state != STATE_STOPPED:
                raise
            return None


class _DaemonThreads(BaseExecutor):  # type: ignore[misc]
    """A pool of threads that do not delay the exit of the interpreter.

    Python joins the threads of `concurrent.futures` before it calls the `atexit` handlers. With APScheduler's own pool,
    a Ctrl-C would wait for the longest run before that run could be asked to stop.
    """

    def __init__(self, threads: int) -> None:
        super().__init__()
        self._threads_left = threads
        self._idle = threading.Semaphore(0)
        self._queue: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._started = self._calls = 0
        self._serving: set[int] = set()
        self._is_shut_down = False
        self._called = threading.Condition()

    def _do_submit_job(self, job: Job, run_times: list[datetime]) -> None:
        self.call(partial(self._run, job, run_times))

    def _run(self, job: Job, run_times: list[datetime]) -> None:
        self._run_job_success(job.id, run_job(job, job._jobstore_alias, run_times, self._logger.name))

    def call(self, function: Callable[[], object]) -> None:
        with self._called:
            if self._is_shut_down:
                return
            self._calls += 1
            self._queue.put(function)
            if not self._idle.acquire(blocking=False) and self._threads_left:
                self._threads_left -= 1
                self._start()

    def _start(self) -> None:
        self._started += 1
        threading.Thread(target=self._serve, name=f"workers-{self._started}", daemon=True).start()

    def replace(self, thread: int) -> None:
        with self._called:
            if thread in self._serving and not self._is_shut_down:
                self._serving.discard(thread)
                self._start()

    def _serve(self) -> None:
        own = threading.get_ident()
        self._serving.add(own)
        while function := self._queue.get():
            try:
                function()
            except BaseException:  # a call logs its expected errors, and the thread must live on
                self._logger.exception("Unexpected error in %r", function)
            with self._called:
                self._calls -= 1
                self._called.notify_all()
            if own not in self._serving:  # it was replaced while it hung
                return
            self._idle.release()

    @property
    def is_awaited(self) -> bool:
        return not self._queue.empty()

    def wait(self, seconds: float) -> bool:
        with self._called:
            return self._called.wait_for(lambda: not self._calls, seconds)

    def shutdown(self, wait: bool = True) -> None:
        with self._called:
            self._is_shut_down = True
            for _ in range(self._started):
                self._queue.put(None)
