"""The manager: the engine's public face."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from flask import current_app
from werkzeug.local import LocalProxy

from .database.tables import LONGEST_USER
from .errors import InvalidSchedule, spelled_out
from .history.executions import History
from .history.instances import InstanceHistory
from .history.messages import MessageHistory
from .history.why import Answer, why
from .host.logs import logger_of
from .ledger.claim import WorkerState
from .ledger.locks import Lock
from .lifecycle import Lifecycle
from .messages.payloads import as_delay, draft, drafts
from .runs.execution import Execution
from .runs.fence import when_committed
from .schedule.parsing import make_schedule
from .tallies.charts import ChartHistory
from .worker import AnyWorker, MessageWorker, PeriodicWorker

log = logger_of(__name__)


class BackgroundWorkerManager(Lifecycle):
    """Runs the workers of one application, once per tick of the fleet that shares its database.

    `add` registers a worker. It opens and starts nothing. `start` joins the fleet and `stop` leaves it.
    """

    # -- registering ---------------------------------------------------------------------------

    @property
    def workers(self) -> dict[str, type[PeriodicWorker]]:
        """The registered periodic workers by name, sorted."""
        return dict(sorted(self._registry.workers.items()))

    @property
    def topics(self) -> dict[str, type[MessageWorker]]:
        """The registered message workers by topic, sorted."""
        return dict(sorted(self._registry.topics.items()))

    @property
    def names(self) -> set[str]:
        """The names of all registered workers, periodic workers and message workers."""
        return self._registry.names

    def topic_of(self, name: str) -> str | None:
        """Return the topic of the message worker `name`. None for any other name."""
        return self._registry.topic_of(name)

    def add(self, worker: AnyWorker) -> None:
        """Register a worker class. Raises InvalidWorker, InvalidSchedule or DuplicateWorker."""
        self._registry.add(worker)
        for callback in self._when_added:
            callback(worker)
        if self.supervisor is not None:
            self.supervisor.admit(worker)

    def when_added(self, callback: Callable[[AnyWorker], None]) -> None:
        """Call `callback` with each worker that is added from now on."""
        self._when_added.append(callback)

    def remove(self, name: str) -> None:
        """Unregister a worker in this process. Its rows stay, and other instances go on running it."""
        self._registry.remove(name)
        if self.supervisor is not None:
            self.supervisor.timers.disarm(name)

    # -- running and controlling ---------------------------------------------------------------

    def tick(self, name: str, at: datetime) -> Execution | None:
        """Run the latest tick of worker `name` up to `at` (aware), unless an instance has or does.

        Returns the execution. None if this call may not run the tick. Waits for the database's clock to reach the tick,
        at most one lease. Raises UnknownWorker and the database's errors. Raises CommitFirst amid a transaction of this
        thread that has written.

        The tick runs even if the worker is new to the database. At a start, a new worker begins with its next tick (see
        `run_on_first_start`).
        """
        worker = self._registry.known(name)
        if not isinstance(at, datetime) or at.tzinfo is None:
            raise InvalidSchedule(
                f"The tick of {name!r} was asked for at {at!r}; expected an aware datetime: write datetime.now(UTC)."
            )
        if not worker.enabled:
            log.debug("%s: not running a tick: it is disabled here (enabled = False)", name)
            return None
        with self._on_its_own(f"tick({name!r})", runs=True):
            self._reopen()
            at = at.astimezone(UTC)
            state = self.recovery.look(worker, asked=at)
            return self.ticks.run(worker, state.schedule.previous(at), state.schedule_text, state)

    def trigger(self, name: str) -> Execution | None:
        """Run worker `name` now, in this process, regardless of its schedule. None if it runs already.

        A manual run takes no tick away, and a pause does not delay it. Raises UnknownWorker. Raises CommitFirst amid a
        transaction of this thread that has written.
        """
        worker = self._registry.known(name)
        with self._on_its_own(f"trigger({name!r})", runs=True):
            self._reopen()
            return self.ticks.run_now(worker)

    def request(self, name: str) -> bool:
        """Have an instance run worker `name` now, or with its next heartbeat.

        A pause does not delay the run. False if the worker runs already, or will run next. Raises UnknownWorker and
        CommitFirst.
        """
        with self._controlled("request", name):
            requested = self.stores.ledger.request(name)
        self._refresh()
        return requested

    def pause(self, name: str) -> bool:
        """Run no tick of `name` in the fleet until `resume`. A run in progress goes on. False if paused already.

        For a message worker, pause its topic: no instance claims its messages. Commits on its own. Raises CommitFirst
        if it would wait for the caller's own transaction.
        """
        if topic := self.topic_of(name):
            return self.messages.pause(topic)
        with self._controlled("pause", name):
            return self.stores.controls.pause(name)

    def resume(self, name: str) -> bool:
        """Run the ticks of `name` again, from the next tick on. False if it was not paused. Raises as `pause` does.

        For a message worker, resume its topic.
        """
        if topic := self.topic_of(name):
            return self.messages.resume(topic)
        with self._controlled("resume", name):
            return self.stores.controls.resume(name)

    def cancel(self, name: str, by: str | None = None, token: int | None = None) -> bool:
        """Cancel the run of `name` that is in progress, in any process. `by` is the user who asks for it.

        With `token`, cancel only the run that has this token.

        The run gets a stop request within a heartbeat. After WORKERS_SHUTDOWN_SECONDS it can no longer commit. Its
        execution ends as "cancelled", and its tick does not run again. False if nothing runs. Raises as `pause` does.
        """
        by = spelled_out(by)[:LONGEST_USER] if by else None
        with self._controlled("cancel", name) as state:
            if (claim := state.running) is None or token not in (None, claim.token):
                return False
            if state.is_bare:
                self.stores.row_repair.restore(claim)
            if claim.id and claim.instance:
                self.stores.leases.cancel(claim.instance, claim.id, by)
            is_running = self.stores.controls.cancel(claim, by)
        if claim.id and is_running:
            self.runs.cancel({claim.id: by})
        return is_running

    def reschedule(
        self, name: str, period: timedelta | None = None, cron: str | None = None, timezone: str | None = None
    ) -> bool:
        """Give `name` another schedule in the whole fleet, across restarts.

        Without a schedule, restore the declared schedule. A release that declares another schedule does not replace
        this one. False if the worker has that schedule already.
        """
        self._registry.known(name)
        is_declared = period is None and cron is None and timezone is None
        schedule = None if is_declared else make_schedule(name, period, cron, timezone)
        with self._controlled("reschedule", name):
            changed = self.stores.controls.reschedule(name, schedule)
        self._refresh()
        return changed

    def repair(self) -> tuple[list[str], int]:
        """Resume the ticks and messages that the database's clock put off while it was ahead.

        Call this once the clock is right. The fleet does this by itself after a lease, if the history can prove that no
        tick runs twice. Returns the workers, and the number of messages.
        """
        with self._on_its_own("repair"):
            repaired = self.stores.clock_repair.all(self.stores.ledger.states().values())
        self._refresh()
        return repaired

    @contextmanager
    def _controlled(self, call: str, name: str) -> Iterator[WorkerState]:
        """Guard a call that changes the row of the worker. Make the row if it is missing. Raises UnknownWorker."""
        worker = self._registry.known(name)
        with self._on_its_own(f"{call}({name!r})"):
            yield self.recovery.look(worker)

    def _on_its_own(self, call: str, runs: bool = False) -> AbstractContextManager[None]:
        """Guard `call`, which commits by itself. Raises CommitFirst if the caller would wait for itself."""
        return self._open.refused(call, self.stores.connections.claims, runs)

    def _reopen(self) -> None:
        """Let runs begin again after a stop, because this call needs a run."""
        if not self.is_started:
            self.runs.open()

    def _refresh(self) -> None:
        """Follow the change now. The other instances follow the change with their next heartbeats."""
        if self.supervisor is not None:
            self.supervisor.refresh()

    # -- messages ------------------------------------------------------------------------------

    def enqueue(
        self, topic: str, payload: Any, key: str | None = None, delay: timedelta | float | None = None
    ) -> int | None:
        """Enqueue a message on the current app context's session. The session's commit makes it visible.

        `payload` is a value that JSON can carry, at most MESSAGES_MAX_BYTES long. `delay` is a timedelta or seconds.
        Returns the message's id. None if a message with this topic and `key` was enqueued within MESSAGES_KEY_DAYS.
        Raises UnknownTopic and InvalidMessage.
        """
        self._registry.refuse_unknown_topic(topic)
        drafted, delay = draft(payload, key, self.app.config["MESSAGES_MAX_BYTES"]), as_delay(delay)
        session = self.db.session()
        found = self.stores.queue.enqueue(session, topic, drafted, delay)
        if found is not None:
            when_committed(session, self._wake, (topic, delay))
        return found

    def enqueue_many(
        self,
        topic: str,
        payloads: Iterable[Any],
        keys: Iterable[str | None] | None = None,
        delay: timedelta | float | None = None,
    ) -> int:
        """Enqueue many messages in their order. `keys` has a key for each message. Returns the number of new messages.

        Checks all payloads and keys before it enqueues the first message.
        """
        self._registry.refuse_unknown_topic(topic)
        delay, drafted = as_delay(delay), drafts(payloads, keys, self.app.config["MESSAGES_MAX_BYTES"])
        session = self.db.session()
        count = self.stores.queue.enqueue_many(session, topic, drafted, delay)
        if count:
            when_committed(session, self._wake, (topic, delay))
        return count

    def _wake(self, committed: Collection[tuple[str, timedelta | None]]) -> None:
        """Wake the consumers of the topics and delays: in this process, and in the others if a message is due."""
        if (supervisor := self.supervisor) is not None:
            for topic, delay in committed:
                supervisor.consumers.wake_after(topic, delay)
        self.stores.notifier.notify({topic for topic, delay in committed if not delay})

    # -- locking -------------------------------------------------------------------------------

    def lock(self, name: str, timeout: float = 0) -> AbstractContextManager[Lock | None]:
        """Take a lock: `with workers.lock("invoice-42") as lock:`. None if it stays held for `timeout` seconds.

        One block in the whole fleet has the lock, until the block ends or its process stops or loses its lease. Not
        re-entrant: the thread that has the lock gets None immediately. Waiting callers take the lock in no order. A run
        that is asked to stop waits no longer. Raises InvalidLock. Raises LockNotAcquired if the database does not
        answer.
        """
        self.locks.check(name, timeout)
        return self.locks.hold(name, timeout)

    # -- reading -------------------------------------------------------------------------------

    @property
    def history(self) -> History:
        """The executions, for people to read."""
        return History(self.stores.ledger, self.instance_history)

    @property
    def instance_history(self) -> InstanceHistory:
        """The instances of the fleet, living and gone, for people to read."""
        return InstanceHistory(self.stores.leases)

    @property
    def charts(self) -> ChartHistory:
        """The counts of the runs and messages of the last days, for the charts."""
        return ChartHistory(self.stores.main, self.stores.roll_up)

    @property
    def messages(self) -> MessageHistory:
        """The messages, for people to read, to retry and to discard. Its `pause` and `resume` take a topic."""
        stores = self.stores
        return MessageHistory(
            stores.main,
            stores.dead_letters,
            stores.pauses,
            self.instance_history,
            self._registry.topics,
            self._on_its_own,
        )

    def why(self, name: str, at: datetime | None = None) -> Answer:
        """Say in one sentence whether the tick that `at` (aware, by default now) belongs to ran, and why.

        Answers for a worker that only the database knows, too. Raises UnknownWorker.
        """
        around, worker = self.history.around(name, at), self._registry.workers.get(name)
        if around.state is None:
            worker = self._registry.known(name)
        return why(around, worker, self.app.config["WORKERS_HISTORY_DAYS"])


def the_manager() -> BackgroundWorkerManager:
    """Return the manager of the current app, which outlives the app context. `current_workers` does not."""
    manager: BackgroundWorkerManager = current_app.extensions["background_workers"]
    return manager


current_workers: BackgroundWorkerManager = LocalProxy(the_manager)  # type: ignore[assignment]
