"""The shop with workers that leave traces, started by the tests as an operator starts the shop (FLASK_APP)."""

import asyncio
import atexit
import ctypes
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from flask import Flask, appcontext_tearing_down, current_app
from sqlalchemy import Connection, Engine, event, update
from sqlalchemy.pool import Pool
from support.run_traces import leave, leave_each
from werkzeug.serving import make_server

import app as shop
from accounts import SETTINGS
from background import ClaimLost, Message, MessageWorker, PeriodicWorker, WorkerContext, current_workers
from background.database import notifications as listener
from background.database.clock import now
from background.ledger.ledger import Ledger
from background.manager import the_manager
from models import User, UserRepository

# Quick, as in shop.py.
SETTINGS["PASSWORD_HASH_PASSLIB_OPTIONS"] = {"argon2__memory_cost": 8, "argon2__rounds": 1, "argon2__parallelism": 1}
_SECONDS = float(os.environ.get("PROBE_SECONDS", "60"))
_TAKES = float(os.environ.get("PROBE_TAKES", "0"))
_connections: list[int] = []
RARELY = timedelta(days=366)  # one tick is due when a test begins, and no other tick during the test
listener._RETRY_SECONDS = float(os.environ.get("PROBE_RETRY", listener._RETRY_SECONDS))


def create_app() -> Flask:
    if "PROBE_SAYS" in os.environ:
        print(os.environ["PROBE_SAYS"], flush=True)
    app = shop.create_app({"WTF_CSRF_ENABLED": False, "RATELIMIT_ENABLED": False, "PRODUCTION": False})
    workers = app.extensions["background_workers"]
    own = (*workers.workers.values(), *workers.topics.values())
    for worker in own:
        workers.remove(worker.name)
    others = (worker for kind in (PeriodicWorker, MessageWorker) for worker in kind.__subclasses__())
    known = {worker.name: worker for worker in (*own, *others)}
    for name in filter(None, os.environ.get("PROBE_WORKERS", "ticker").split(",")):
        workers.add(known[name])
    app.cli.command("count")(count)
    return app


@click.argument("path", type=Path)
@click.argument("times", type=int)
def count(path: Path, times: int) -> None:
    """Add `times` lines to a file, each with the number of lines before. Without a lock the numbers repeat."""
    for _ in range(times):
        with current_workers.lock("count", timeout=60) as lock:
            assert lock is not None
            lines = path.read_text().splitlines()
            time.sleep(0.002)
            path.write_text("\n".join([*lines, f"{len(lines)} {lock.token}"]))


def bridged(kind: str) -> Any:
    """Serve behind a bridge from ASGI, which calls the application in threads."""
    if kind == "a2wsgi":
        from a2wsgi import WSGIMiddleware

        return WSGIMiddleware(create_app())
    from asgiref.wsgi import WsgiToAsgi

    return WsgiToAsgi(create_app())


def by_a2wsgi() -> Any:
    return bridged("a2wsgi")


def by_asgiref() -> Any:
    return bridged("asgiref")


def by_app_run() -> None:
    create_app().run(port=0)


def by_app_run_in_debug_mode() -> None:
    create_app().run(port=0, debug=True)


def with_a_loop() -> None:
    """Serve like servers whose asyncio loop handles the signals, after the application is made."""
    server = make_server("127.0.0.1", 0, create_app(), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"Running on http://127.0.0.1:{server.port}", flush=True)

    async def serve() -> None:
        told = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
        await told.wait()
        print("The loop was told", flush=True)

    asyncio.run(serve())
    server.shutdown()


def made_in_a_thread() -> None:
    """Serve like servers that load the application late, in a thread."""
    made: list[Flask] = []
    making = threading.Thread(target=lambda: made.append(create_app()), name="loader")
    making.start()
    making.join()
    made[0].run(port=0)


def wrapped() -> Any:
    """Return the application behind a middleware, where a server's hooks cannot see it."""
    app = create_app()
    return lambda environ, start_response: app(environ, start_response)


class Ticker(PeriodicWorker):
    name = "ticker"
    period = timedelta(seconds=float(os.environ.get("PROBE_PERIOD", "0.5")))
    jitter = timedelta(seconds=float(os.environ.get("PROBE_JITTER", "0")))
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        reach("claimed")
        threading.Event().wait(_TAKES)
        leave(context, os.getpid())
        reach("effect")
        event.listen(context.session, "after_commit", _committed)


class Quick(PeriodicWorker):
    name = "quick"
    period = timedelta(seconds=1)

    def do_work(self, context: WorkerContext) -> None:
        leave(context, os.getpid())


class Listener(PeriodicWorker):
    """Runs until it gets a stop request."""

    name = "listener"
    period = RARELY
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        leave(context, os.getpid(), "began")
        context.commit()
        context.logger.info("The listener began")
        if context.stopping.wait(_SECONDS):
            context.logger.info("The listener was told")
            context.raise_if_stopping()
        leave(context, os.getpid())


def wait_until_told() -> None:
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until and not os.path.exists(os.environ.get("PROBE_UNTIL", "")):
        threading.Event().wait(0.02)


class Deaf(PeriodicWorker):
    """Runs for PROBE_SECONDS, or until the file PROBE_UNTIL exists, and ignores a stop request."""

    name = "deaf"
    period = RARELY
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        context.logger.info("The deaf one began")
        wait_until_told()
        leave(context, os.getpid())
        try:
            context.commit()
        except ClaimLost:
            context.logger.info("The deaf one was refused")
            raise
        finally:
            _deaf_is_done.set()


class Holder(PeriodicWorker):
    """Writes, and holds the locks of this write, as long as `Deaf` runs. Ignores a stop request."""

    name = "holder"
    period = RARELY
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        leave(context, os.getpid())
        context.logger.info("The holder holds")
        wait_until_told()


class Sweeper(PeriodicWorker):
    """Makes users stale and sweeps them, in small slices."""

    name = "sweeper"
    period = timedelta(seconds=0.3)

    def do_work(self, context: WorkerContext) -> None:
        leave(context, os.getpid())
        context.session.execute(update(User).where(User.id % 2 == 0).values(last_login_at=now(timedelta(days=-40))))
        context.commit()
        users = context.services.get(UserRepository)
        users.slice_size = 20
        users.update_inactive_user_statuses(context.tick - timedelta(days=30), lambda *_: context.commit())


class Slicer(PeriodicWorker):
    """Leaves an effect for each of 40 slices. Ignores a stop request."""

    name = "slicer"
    period = RARELY
    run_on_first_start = True
    max_attempts = 100

    def do_work(self, context: WorkerContext) -> None:
        for number in range(context.cursor or 0, 40):
            threading.Event().wait(_TAKES)
            context.cursor = number + 1
            if number == 5:
                reach("slice")
            leave(context, os.getpid(), f"slice {number}")
            context.commit()


class Locker(PeriodicWorker):
    """Holds a lock until it gets a stop request."""

    name = "locker"
    period = RARELY
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        with current_workers.lock("invoice-42") as lock:
            assert lock is not None
            context.logger.info("The locker has the token %s", lock.token)
            context.stopping.wait(_SECONDS)
            context.logger.info("The locker is told, and still has it: %s", lock.still_held())
        context.logger.info("The locker released it")


class Forker(PeriodicWorker):
    """Forks while it holds a lock. The child also leaves the block, and ends as a process does.

    It forks between two ticks of the ticker. A lock that another thread holds within SQLite's library at that moment
    would stay locked in the child for ever.
    """

    name = "forker"
    period = RARELY
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        manager = the_manager()
        with manager.lock("of-the-parent") as lock:
            assert lock is not None
            threading.Event().wait(0.75 - time.time() % 0.5)
            if child := os.fork():
                os.waitpid(child, 0)
                context.logger.info("The parent holds its lock: %s", lock.still_held())
            else:
                with manager.lock("of-the-child") as own:
                    context.logger.info("The child holds its own and its parent's: %s", [bool(own), lock.still_held()])
        if not child:
            manager.stop()
            os._exit(0)


class Forking(PeriodicWorker):
    """Forks in the middle of its transaction. Its child acts as PROBE_CHILD says."""

    name = "forking"
    period = RARELY
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        fork_amid(context)


class AsyncForking(PeriodicWorker):
    """Forks in the middle of its transaction, in an event loop."""

    name = "async_forking"
    period = RARELY
    run_on_first_start = True

    async def do_work(self, context: WorkerContext) -> None:
        if not fork_amid(context):
            return
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, time.sleep, 0.01)  # a child might close the loop's own file handles


def fork_amid(context: WorkerContext) -> bool:
    """Fork as the forker does, between two ticks of the ticker. Return whether this is the parent."""
    leave(context, os.getpid())
    context.session.flush()
    threading.Event().wait(0.75 - time.time() % 0.5)
    while child := os.fork():
        if (code := _ended_with(child)) is not None:
            context.logger.info("The child %d ended with %d", child, code)
            leave(context, os.getpid(), "after the child")
            return True
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    _CHILDREN[os.environ["PROBE_CHILD"]](context)
    return False


def _ended_with(child: int) -> int | None:
    """Return the exit code of a child. None if it hangs, as another thread was within SQLite's library at the fork."""
    handle = os.pidfd_open(child)
    try:
        if not select.select([handle], [], [], 5)[0]:
            return None
    finally:
        os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class ForkingAtTheEnd(PeriodicWorker):
    """Has its application fork when the context of the run ends, after the commit."""

    name = "forking_at_the_end"
    period = RARELY
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        leave(context, os.getpid())
        leave(context, os.getpid(), "after the child")
        appcontext_tearing_down.connect(_fork_at_the_end, current_app._get_current_object())


def _fork_at_the_end(app: Flask, **_more: object) -> None:
    appcontext_tearing_down.disconnect(_fork_at_the_end, app)
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        app.logger.info("The child %d ended with %d", child, os.waitstatus_to_exitcode(status))


def _commit_in_a_child(context: WorkerContext) -> None:
    leave(context, os.getpid(), "of the child")
    context.commit()


def _roll_back_in_a_child(context: WorkerContext) -> None:
    context.session.rollback()
    context.session.close()
    raise SystemExit(4)


def _raise_in_a_child(_context: WorkerContext) -> None:
    raise ValueError("the child's own")


_CHILDREN: dict[str, Callable[[WorkerContext], object]] = {
    "returns": lambda context: None,
    "raises": _raise_in_a_child,
    "exits": lambda context: sys.exit(3),
    "commits": _commit_in_a_child,
    "rolls back": _roll_back_in_a_child,
}


class Pooled(PeriodicWorker):
    """Has forked processes of a pool compute something while its transaction is open."""

    name = "pooled"
    period = RARELY
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        leave(context, os.getpid())
        context.session.flush()
        with multiprocessing.get_context("fork").Pool(2) as pool:
            context.logger.info("The pool says %s", pool.map(abs, [-1, -2, -3]))
        leave(context, os.getpid(), "after the pool")


class Terminator(PeriodicWorker):
    """Forks children that would sleep for long, and ends each child immediately."""

    name = "terminator"
    period = RARELY
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        endings = [_ended_by(number) for number in (signal.SIGTERM, signal.SIGINT) for _ in range(20)]
        context.logger.info("The children ended with %s", sorted(set(endings)))


def _ended_by(number: int) -> int:
    parent = os.getpid()
    try:
        if child := os.fork():
            os.kill(child, number)
            handle = os.pidfd_open(child)
            if not select.select([handle], [], [], 10)[0]:
                os.kill(child, number)  # Python dropped the first signal, between two hooks of the fork
            os.close(handle)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(_SECONDS)
    except KeyboardInterrupt:  # the signal came when the child was past the fork
        if os.getpid() == parent:
            raise
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    os._exit(0)


class Killer(PeriodicWorker):
    """Kills its process."""

    name = "killer"
    period = RARELY
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        leave(context, os.getpid())
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(_SECONDS)


class Hog(PeriodicWorker):
    """Holds the interpreter for PROBE_HOLDS in one call, as a library's long computation does."""

    name = "hog"
    period = RARELY
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        context.logger.info("The hog began")
        if context.attempt == 1:
            ctypes.PyDLL(None).usleep(int(float(os.environ.get("PROBE_HOLDS", "0")) * 1_000_000))
        leave(context, os.getpid())


class Hanging(PeriodicWorker):
    """Hangs at every second tick."""

    name = "hanging"
    period = timedelta(seconds=0.5)
    timeout = timedelta(seconds=0.2)

    def do_work(self, context: WorkerContext) -> None:
        if context.tick.microsecond:
            threading.Event().wait()
        leave(context, os.getpid())


class Letters:
    """Settings of the message workers, from the environment."""

    batch_size = int(os.environ.get("PROBE_BATCH", "100"))
    max_attempts = int(os.environ.get("PROBE_ATTEMPTS", "5"))
    concurrency = int(os.environ.get("PROBE_CONCURRENCY", "1"))
    backoff = timedelta(seconds=0.05)


class Notes(Letters, MessageWorker):
    """Acts as the message says, and leaves its effect. With any other message it is quick."""

    name = topic = "notes"

    def handle(self, message: Message, context: WorkerContext) -> None:
        context.logger.info("Handling %s, attempt %d", message.idempotency_key, message.attempt)
        reach("handling")
        take_time(context)
        if message.payload == "kill":
            leave(context, os.getpid())
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(_SECONDS)
        if message.payload == "fork":
            fork_amid(context)
            return
        if message.payload == "wait" and message.attempt == 1:
            context.logger.info("The note waits")
            context.stopping.wait(_SECONDS)
        if message.payload == "deaf":
            context.logger.info("The note is deaf")
            time.sleep(_SECONDS)
        leave(context, os.getpid())
        reach("effect")
        event.listen(context.session, "after_commit", _committed)


class Bulk(Letters, MessageWorker):
    """Leaves the effects of a batch in one statement."""

    name = topic = "bulk"

    def handle_many(self, messages: Sequence[Message], context: WorkerContext) -> None:
        take_time(context)
        leave_each(context, messages, os.getpid())


class Relays(Letters, MessageWorker):
    """Leaves its effect, and enqueues a note."""

    name = topic = "relays"

    def handle(self, message: Message, context: WorkerContext) -> None:
        reach("handling")
        leave(context, os.getpid())
        current_workers.enqueue("notes", message.id)
        reach("effect")


class Sender(PeriodicWorker):
    """Leaves its effect, and enqueues a note."""

    name = "sender"
    period = RARELY
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        reach("handling")
        leave(context, os.getpid())
        current_workers.enqueue("notes", context.tick.isoformat())
        reach("effect")


def take_time(context: WorkerContext) -> None:
    """Freeze before the first write of a batch: after it, SQLite would let no other process write."""
    if not context.session.in_transaction():
        threading.Event().wait(_TAKES)


def _committed(_session: object) -> None:
    reach("committed")


def reach(point: str) -> None:
    """Freeze this process when it first reaches the point PROBE_FREEZES_AT."""
    if os.environ.get("PROBE_FREEZES_AT") == point:
        del os.environ["PROBE_FREEZES_AT"]
        with _alone:
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.1)  # another thread may receive the signal, a moment later


class Alone:
    """Freezes only while no other thread of this process uses a database, as such a thread could hold SQLite's lock."""

    def __init__(self) -> None:
        self._asking: list[int] = []  # the threads
        self._changed, self._thread = threading.Condition(), 0

    def __enter__(self) -> None:
        with self._changed:
            self._thread = threading.get_ident()
            # The wait is in vain if another thread waits for a lock that this thread has.
            self._changed.wait_for(lambda: set(self._asking) <= {self._thread}, timeout=0.5)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._thread = 0
            self._changed.notify_all()

    def came(self, _connection: Any, record: Any, _proxy: Any) -> None:
        with self._changed:
            thread = record.info["thread"] = threading.get_ident()
            self._changed.wait_for(lambda: self._thread in (0, thread))
            self._asking.append(thread)

    def left(self, _connection: Any, record: Any) -> None:
        with self._changed:
            if thread := record.info.pop("thread", 0):
                self._asking.remove(thread)
                self._changed.notify_all()


def _claiming(self: Ledger, *what: Any) -> Any:
    reach("claiming")
    return _claim(self, *what)


def _executing(connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
    is_claim = "UPDATE background_workers SET mark" in statement and "INSERT INTO background_executions" in statement
    if is_claim or "EXECUTE background_claim_tick_" in statement:
        reach("claim")  # the request commits itself
    is_claim_of_messages = "UPDATE background_messages SET" in statement and "claimed_at=" in statement
    if is_claim_of_messages or statement.startswith("INSERT INTO background_executions"):
        connection.info["ends_with"] = "claim"
    elif statement.startswith("INSERT INTO effects"):
        connection.info["ends_with"] = "commit"


def _committing(connection: Connection) -> None:
    reach(connection.info.pop("ends_with", ""))


def _connected(_connection: Any, _record: Any) -> None:
    _connections.append(os.getpid())


def _report() -> None:
    """Print the threads and connections. Registered first, so it runs after the workers have stopped."""
    if "PROBE_LINGERS" in os.environ:
        _deaf_is_done.wait(30)
    threads = sorted(thread.name for thread in threading.enumerate())
    own = _connections.count(os.getpid())
    print(f"Process {os.getpid()} ends with threads {threads} and {own} connections made", flush=True)


_deaf_is_done, _alone = threading.Event(), Alone()
_claim, Ledger.claim = Ledger.claim, _claiming  # type: ignore[method-assign]
event.listen(Pool, "connect", _connected)
event.listen(Pool, "checkout", _alone.came)
event.listen(Pool, "checkin", _alone.left)
event.listen(Engine, "before_cursor_execute", _executing)
event.listen(Engine, "commit", _committing)
atexit.register(_report)
