"""Wakes the consumers of a topic: after an enqueue, when a retry delay ends, or when a heartbeat finds messages due."""

import logging
import math
import random
import threading
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.exc import SQLAlchemyError

from ..database.clock import steady
from ..errors import first_line
from ..host.logs import logger_of
from ..ledger.leases import Instance, Pulse
from ..messages.message import Batch, Freed
from ..runs.batch import BatchRun, signal_buried
from ..runs.running import Runs
from ..stores import Stores
from ..worker import MessageWorker
from .presence import Presence
from .scheduler import Scheduler

log = logger_of(__name__)

_STRANDED = "the reply to its claim got lost"
_SLOT_SECONDS = 0.02
_LONGEST_REST_SECONDS = 0.02
_YIELDED_SECONDS = (0.02, 0.04)
_LONGEST_WAIT_SECONDS = 1.0  # for the timer of that, which may be hours away by a clock that was set back


class Consumers:
    """Handles the messages of `workers` (by topic) as long as there are any, on the scheduler's threads."""

    def __init__(
        self,
        app: Flask,
        db: SQLAlchemy,
        stores: Stores,
        presence: Presence,
        runs: Runs,
        scheduler: Scheduler,
        workers: Mapping[str, type[MessageWorker]],
    ) -> None:
        self._app, self._db, self._scheduler, self._workers = app, db, scheduler, workers
        self._stores, self._presence, self._runs = stores, presence, runs
        self._active: Counter[str] = Counter()
        self._again: set[str] = set()
        self._yielding: set[str] = set()
        self._awaited: dict[str, float] = {}
        self._batches: set[str] = set()
        self._freeing: set[str] = set()
        self._excused: Counter[int] = Counter()
        self._changed = threading.Lock()
        self.outage: tuple[datetime, datetime] | None = None
        """The last outage of the database: from the last heartbeat before it until the first one after it."""

    def wake(self, topic: str) -> None:
        """Have another consumer of `topic` look for messages; if all are busy, the first that is done looks again."""
        worker = self._workers.get(topic)
        if worker is None or self._runs.stopping.is_set():
            return
        with self._changed:
            if self._active[topic] >= worker.concurrency:
                self._again.add(topic)
                return
            self._active[topic] += 1
        self._scheduler.soon(self._consume, worker)

    def hear(self, topic: str) -> None:
        """Wake up for what others enqueued: at once, if this process found any of its topic when it last looked.

        Else those who did go first, and this one looks a little later, once for all that is heard until then: if every
        process came at the same instant, all but one would ask in vain, and hold that one up.
        """
        if topic not in self._yielding:
            self.wake(topic)
        elif steady() >= self._awaited.get(topic, 0.0):
            self._awaited[topic] = steady() + _LONGEST_WAIT_SECONDS
            seconds = random.uniform(*_YIELDED_SECONDS)  # noqa: S311 - no secret
            self._scheduler.after(seconds, f"heard:{topic}", self._wake_late, topic)

    def _wake_late(self, topic: str) -> None:
        self._awaited.pop(topic, None)  # first: this look may be too early for what is heard from now on
        self.wake(topic)

    def wake_after(self, topic: str, pause: timedelta | None) -> None:
        """Wake up for `topic` when the `pause` is over; one that outlasts a heartbeat is left to the heartbeats.

        (They see the first message that waits; a timer for each would fill the memory with what is due next month.)
        """
        seconds = pause.total_seconds() if pause else 0.0
        if not seconds:
            self.wake(topic)
        elif seconds <= self._app.config["WORKERS_HEARTBEAT_SECONDS"] and not self._runs.stopping.is_set():
            slot = math.ceil((steady() + seconds) / _SLOT_SECONDS)  # shared by all that are due in it, woken at its end
            self._scheduler.after(slot * _SLOT_SECONDS - steady(), f"messages:{topic}:{slot}", self.wake, topic)

    def follow(self, pulse: Pulse, within: float) -> None:
        """Wake up for what a heartbeat found due, or due `within` that many seconds."""
        for topic, due_at in pulse.due.items():
            pause = due_at - pulse.clock
            if pause.total_seconds() <= 0:
                self.wake(topic)
            elif pause.total_seconds() <= within:
                self.wake_after(topic, pause)

    # -- handling ------------------------------------------------------------------------------

    def _consume(self, worker: type[MessageWorker]) -> None:
        """Handle batch after batch, until none is due. Between two batches, let others that wait for a thread in."""
        is_over = False
        self._yielding.add(worker.topic)  # until it finds one
        try:
            while not is_over:
                is_over = not self._next(worker) and self._ends(worker.topic)
                if not is_over and self._scheduler.is_awaited:
                    self._scheduler.soon(self._consume, worker)
                    is_over = True
        except SQLAlchemyError as error:  # the next heartbeat tries again
            log.warning("%s: cannot claim messages: %s", worker.name, first_line(error))
        finally:
            if not is_over:
                with self._changed:
                    self._active[worker.topic] -= 1

    def _ends(self, topic: str) -> bool:
        """Return whether this consumer ends now. It goes on if it was woken while it looked."""
        with self._changed:
            if topic in self._again:
                self._again.discard(topic)
                return False
            self._active[topic] -= 1
            return True

    def _next(self, worker: type[MessageWorker]) -> bool:
        instance, topic = self._presence.instance, worker.topic
        if instance is None or not instance.is_alive or self._runs.stopping.is_set():
            return False
        if self._workers.get(topic) is not worker:  # it was removed
            return False
        # Where there is no second attempt, a neighbour's death would bury the whole batch.
        size = worker.batch_size if worker.max_attempts > 1 else 1
        batch = self._stores.queue.claim(worker.name, topic, size, (instance.id, instance.name))
        if batch is None:
            return False
        self._yielding.discard(topic)
        if len(batch.messages) == size:
            self.wake(topic)  # there may be more than one can handle
        self._handle(worker, batch, instance)
        return True

    def _handle(self, worker: type[MessageWorker], batch: Batch, instance: Instance) -> None:
        began = steady()
        self._batches.add(batch.id)
        try:
            way = self._stores.queue, self._runs, instance, self._app, self._db, self._excused
            pause = BatchRun(worker, batch, *way).run()
        finally:
            self._batches.discard(batch.id)
        if pause is not None:
            self.wake_after(worker.topic, pause)
        if self._stores.main.has_one_writer:
            # Who waits for its write lock asks now and again, and would hardly find it free between two batches.
            self._runs.stopping.wait(min((steady() - began) / 4, _LONGEST_REST_SECONDS))

    # -- those who are gone --------------------------------------------------------------------

    def look(self) -> None:
        """Have messages freed that no instance handles. Writes nothing itself."""
        instance = self._presence.instance
        if instance is None or not instance.is_alive or not self._workers:
            return
        holders = self._stores.queue.holders(list(self._workers))
        others = holders - {instance.id}
        gone = self._stores.leases.gone(others) if others else {}
        if news := (gone.keys() | {instance.id} & holders) - self._freeing:
            self._freeing |= news
            self._scheduler.soon(self._free, instance, {each: gone[each] for each in gone.keys() & news})

    def _free(self, instance: Instance, gone: Mapping[str, bool]) -> None:
        messages, most = self._stores.queue, {topic: worker.max_attempts for topic, worker in self._workers.items()}
        try:
            excused = self._excused_holders(gone)
            for holder, signed_off in gone.items():
                error = None
                if not (signed_off or holder in excused):
                    error = f"its instance {self._stores.leases.ending(holder)}"
                freed = messages.take_back(holder, most, error)
                if freed:
                    level = logging.INFO if signed_off else logging.WARNING
                    log.log(level, "Took back %d messages of an instance that is gone", len(freed))
                if error is not None:
                    self._bury(freed, error)
            # Asked for first, and named: while a write waits for its lock, another may be claimed and grow old.
            if stranded := messages.batches(instance.id, instance.lease) - self._batches:
                self._bury(messages.take_back_stranded(stranded, most, _STRANDED), _STRANDED)
        except SQLAlchemyError as error:  # the next heartbeat tries again
            log.warning("Cannot take messages back: %s", first_line(error))
        finally:
            self._freeing.difference_update(gone, [instance.id])
        self.wake_all()

    def _excused_holders(self, gone: Collection[str]) -> Collection[str]:
        """Return the holders whose leases ran out during an outage, when no instance could renew its lease."""
        return self._stores.leases.expired(gone, *self.outage) if gone and self.outage else ()

    def _bury(self, freed: Sequence[Freed], error: str) -> None:
        if dead := [each for each in freed if each.state == "dead"]:
            log.error("Buried %d of them: that was their last attempt", len(dead))
            signal_buried(self._app, dead, error)

    def wake_all(self) -> None:
        """Have a consumer of each topic look."""
        for topic in list(self._workers):
            self.wake(topic)
