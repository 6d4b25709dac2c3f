"""Wakes the consumers of a topic: after an enqueue, when a retry delay ends, or when a heartbeat finds messages due."""

import math
import random
import threading
from collections import Counter
from collections.abc import Collection
from datetime import timedelta

from sqlalchemy.exc import SQLAlchemyError

from ..database.clock import steady
from ..errors import first_line
from ..host.logs import logger_of
from ..host.scheduler import Scheduler
from ..ledger.leases import Instance, Pulse
from ..messages.floors import Beat, Floors
from ..messages.message import Batch
from ..runs.batch import BatchRun
from ..runs.running import Runs
from ..stores import Stores
from ..worker import MessageWorker
from .presence import Presence

log = logger_of(__name__)

_SLOT_SECONDS = 0.02
_REST = 1 / 50  # of the batches' time, for writers that do not show that they wait
_SHORTEST_REST_SECONDS = 0.002  # a shorter rest takes several times as long as requested
_LONGEST_REST_SECONDS = 0.02
_YIELDED_SECONDS = (0.02, 0.04)
_LONGEST_WAIT_SECONDS = 1.0  # for a timer, which a clock that was set back may delay for hours


class Consumers:
    """Handles the messages of `workers` (by topic) on the scheduler's threads, until no message is due."""

    def __init__(
        self,
        stores: Stores,
        presence: Presence,
        runs: Runs,
        scheduler: Scheduler,
        workers: dict[str, type[MessageWorker]],
        apart: Collection[str] = (),
    ) -> None:
        """Handle the topics `apart` on threads of their own, even if hung runs use all threads of the scheduler."""
        self._scheduler, self._workers, self._apart = scheduler, workers, apart
        self._stores, self._presence, self._runs = stores, presence, runs
        self._active: Counter[str] = Counter()
        self._again: set[str] = set()
        self._yielding: set[str] = set()
        self._full: set[str] = set()
        """The topics whose last claim found a full batch."""
        self._awaited: dict[str, float] = {}
        self.batches: set[str] = set()
        """The batches that this process handles now."""
        self.floors = Floors(stores.app.config["WORKERS_HEARTBEAT_SECONDS"], may_help=stores.main.keeps_old_entries)
        self._excused: Counter[int] = Counter()
        self._owed = 0.0
        """The rest that this process must still take for other writers of SQLite, in seconds."""
        self._changed = threading.Lock()

    def wake(self, topic: str) -> None:
        """Start another consumer of `topic`. If all are busy, the first that ends looks for messages again."""
        worker = self._workers.get(topic)
        if worker is None or self._runs.stopping.is_set():
            return
        with self._changed:
            if self._active[topic] >= worker.concurrency:
                self._again.add(topic)
                return
            self._active[topic] += 1
        if topic in self._apart:
            threading.Thread(target=self._consume, args=(worker,), name=f"workers-{topic}", daemon=True).start()
        else:
            self._scheduler.soon(self._consume, worker)

    def wake_all(self) -> None:
        """Start a consumer of each topic, which finds every message."""
        self.floors.forget()
        for topic in list(self._workers):
            self.wake(topic)

    def idle(self) -> list[str]:
        """Return the topics for which another consumer may start."""
        if self._runs.stopping.is_set():
            return []
        return [topic for topic, worker in self._workers.copy().items() if self._active[topic] < worker.concurrency]

    def hear(self, topic: str) -> None:
        """Wake up for messages that another process enqueued.

        Do this immediately if this process found messages at its last look. Otherwise wait 20 to 40 ms and look once.
        Processes that found messages last time go first. If all queried at the same instant, all but one would find
        nothing and slow the successful one down.
        """
        if topic not in self._yielding:
            self.wake(topic)
        elif steady() >= self._awaited.get(topic, 0.0):
            self._awaited[topic] = steady() + _LONGEST_WAIT_SECONDS
            seconds = random.uniform(*_YIELDED_SECONDS)  # noqa: S311 - no secret
            self._scheduler.after(seconds, f"heard:{topic}", self._wake_later, topic)

    def _wake_later(self, topic: str) -> None:
        self._awaited.pop(topic, None)  # before the look, which may miss a message that is enqueued meanwhile
        self.wake(topic)

    def wake_after(self, topic: str, pause: timedelta | None) -> None:
        """Wake up for `topic` when the `pause` is over.

        After a pause longer than a heartbeat, a heartbeat does this: it sees the first message that waits. A timer for
        each message would fill the memory.
        """
        seconds = pause.total_seconds() if pause else 0.0
        if not seconds:
            self.wake(topic)
        elif seconds <= self._stores.app.config["WORKERS_HEARTBEAT_SECONDS"] and not self._runs.stopping.is_set():
            slot = math.ceil((steady() + seconds) / _SLOT_SECONDS)  # one timer for all messages of a slot, at its end
            self._scheduler.after(slot * _SLOT_SECONDS - steady(), f"messages:{topic}:{slot}", self.wake, topic)

    def follow(self, pulse: Pulse, within: float, beat: Beat) -> None:
        """Wake up for the messages that a heartbeat found due, or due `within` that many seconds."""
        if pulse.was_set:
            self.floors.forget()
        if not pulse.is_blind:
            asked = pulse.clock - timedelta(seconds=pulse.took)
            self.floors.after_heartbeat(beat, pulse.due, asked, pulse.took)
        for topic, due_at in pulse.due.items():
            pause = due_at - pulse.clock
            if pause.total_seconds() <= 0:
                self.wake(topic)
            elif pause.total_seconds() <= within:
                self.wake_after(topic, pause)

    # -- handling ------------------------------------------------------------------------------

    def _consume(self, worker: type[MessageWorker]) -> None:
        """Handle batch after batch, until no message is due. Between two batches, waiting calls may use the thread."""
        is_over = False
        self._yielding.add(worker.topic)  # until a look finds messages
        try:
            while not is_over:
                is_over = not self._handle_next(worker) and self._ends(worker.topic)
                if not is_over and self._scheduler.is_awaited and worker.topic not in self._apart:
                    self._scheduler.soon(self._consume, worker)
                    is_over = True
        except SQLAlchemyError as error:  # the next heartbeat tries again
            self.floors.forget()
            log.warning("%s: cannot claim messages: %s", worker.name, first_line(error))
        finally:
            if not is_over:
                with self._changed:
                    self._active[worker.topic] -= 1

    def _ends(self, topic: str) -> bool:
        """Return whether this consumer ends now. It continues if it was woken while it looked."""
        with self._changed:
            if topic in self._again:
                self._again.discard(topic)
                return False
            self._active[topic] -= 1
            return True

    def _handle_next(self, worker: type[MessageWorker]) -> bool:
        instance, topic = self._presence.instance, worker.topic
        if instance is None or not instance.is_alive or self._runs.stopping.is_set():
            return False
        if self._workers.get(topic) is not worker:  # the worker was removed
            return False
        # Without a second attempt, a message that kills its process would bury the whole batch.
        size = worker.batch_size if worker.max_attempts > 1 else 1
        floor, asked = self.floors.of(topic), instance.database_time()
        is_likely = topic in self._full
        self._full.discard(topic)
        batch = self._stores.queue.claim(worker.name, topic, size, (instance.id, instance.name), floor.at, is_likely)
        if batch is None:
            return False
        self.floors.lift(topic, floor, batch.messages[0].due_at, asked)
        self._yielding.discard(topic)
        if len(batch.messages) == size:  # there may be more messages
            if size > 1:  # a single message says little about the next
                self._full.add(topic)
            self.wake(topic)
        self._handle(worker, batch, instance)
        return True

    def _handle(self, worker: type[MessageWorker], batch: Batch, instance: Instance) -> None:
        began = steady()
        self.batches.add(batch.id)
        try:
            pause = BatchRun(worker, batch, self._stores.queue, self._runs, instance, self._excused).run()
        finally:
            self.batches.discard(batch.id)
            self.floors.lower(worker.topic, batch.messages[0].due_at)  # a message may wait again
        if pause is not None:
            self.wake_after(worker.topic, pause)
        if self._stores.main.has_one_writer:
            self._let_others_write(steady() - began)

    def _let_others_write(self, took: float) -> None:
        """Rest after batches. While a connection waits for the write lock, rest as long as this batch `took`."""
        self._owed += took * _REST
        rest = min(self._owed, _LONGEST_REST_SECONDS)
        if rest < _SHORTEST_REST_SECONDS:
            rest = 0.0
        else:
            self._owed = 0.0
        self._stores.connections.let_others_write(self._runs.stopping.wait, rest, longest=took)
