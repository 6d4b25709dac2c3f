"""Notifications of committed messages, from the process that committed them."""

import os
import select
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, insert
from sqlalchemy import text as sql
from support.databases import on_postgresql, on_sqlite
from support.fleet import PATIENCE, Fleet, Note, db, make_app, start_and_look, statements, states, wait_until
from support.processes import environment

from background import BackgroundWorkerManager, Message, MessageWorker, WorkerContext, current_workers
from background.database import notifications
from background.database.notifications import CHANNEL, Notifier


class Orders(MessageWorker):
    """Has a topic."""

    topic = "orders"

    def handle(self, message: Message, context: WorkerContext) -> Any:
        """Do nothing."""


class Last(Orders):
    """Has the topic of the last message of a test."""

    topic = "last"


@pytest.fixture
def manager(fleet: Fleet) -> Iterator[BackgroundWorkerManager]:
    """Give a manager that has not started, in its app context: a process that only enqueues."""
    manager = fleet.manager(Orders, Last)
    with manager.app.app_context():
        yield manager


@pytest.fixture
def heard(fleet: Fleet) -> Iterator[Callable[[], list[str]]]:
    """Give a function that commits a message of the topic "last", and returns the topics of all notifications."""
    app = fleet.app(Last)
    with app.extensions["background_workers"].stores.connections.listening() as connection:
        connection.execute(f"LISTEN {CHANNEL}")

        def until_the_last() -> list[str]:
            current_workers.enqueue("last", 0)
            db.session.commit()
            heard: list[str] = []
            while "last" not in heard:
                pgconn = connection.pgconn  # as the listener reads it
                assert select.select([pgconn.socket], [], [], PATIENCE)[0], f"heard only {heard}"
                pgconn.consume_input()
                while notification := pgconn.notifies():
                    heard.append(notification.extra.decode())
            heard.remove("last")
            return heard

        yield until_the_last


@on_postgresql
def test_a_transaction_that_enqueues_does_not_notify_but_its_commit_does(
    manager: BackgroundWorkerManager, heard: Callable[[], list[str]]
) -> None:
    """PostgreSQL lets transactions that notify commit one by one."""
    with statements(Engine) as sent:
        manager.enqueue("orders", 1)
        manager.enqueue_many("orders", [2, 3])
        db.session.commit()
    assert not [each for each in sent if "notify" in each]
    manager.stores.notifier.wait()
    assert heard() == ["orders"]


@on_postgresql
def test_a_rollback_a_closed_session_and_a_savepoint_notify_no_process(
    manager: BackgroundWorkerManager, heard: Callable[[], list[str]]
) -> None:
    manager.enqueue("orders", "rolled back")
    db.session.rollback()
    manager.enqueue("orders", "rolled back")
    db.session.close()
    with db.session.begin_nested():
        manager.enqueue("orders", "released, and rolled back")
    db.session.rollback()
    assert heard() == []
    with db.session.begin_nested():
        manager.enqueue("orders", "kept")
    db.session.commit()
    manager.stores.notifier.wait()
    assert heard() == ["orders"]


@on_postgresql
def test_commits_during_a_notification_share_the_next_one(
    manager: BackgroundWorkerManager, heard: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sending, go_on, sent = threading.Event(), threading.Event(), list[list[str]]()
    finish = Notifier._finish

    def slowly(self: Notifier, topics: set[str], sent_at: float | None) -> float:
        sent.append(sorted(topics))
        sending.set()
        assert go_on.wait(PATIENCE)
        return finish(self, topics, sent_at)

    monkeypatch.setattr(Notifier, "_finish", slowly)
    for topic in ("orders", *("last", "orders") * 10):
        manager.enqueue(topic, 1)
        db.session.commit()
        assert sending.wait(PATIENCE)
    go_on.set()
    manager.stores.notifier.wait()
    assert sent == [["orders"], ["last", "orders"]]
    assert set(heard()) - {"last"} == {"orders"}


@on_postgresql
def test_a_process_with_a_connection_notifies_before_its_thread_starts(
    manager: BackgroundWorkerManager, heard: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert heard() == []
    manager.stores.notifier.wait()
    with monkeypatch.context() as busy:
        busy.setattr(threading.Thread, "start", lambda thread: fail_to_start())
        manager.enqueue("orders", "it's")
        db.session.commit()
    assert heard() == ["orders"]


@on_postgresql
def test_a_process_notifies_although_the_server_has_closed_its_connection(
    fleet: Fleet, manager: BackgroundWorkerManager, heard: Callable[[], list[str]]
) -> None:
    assert heard() == []
    manager.stores.notifier.wait()
    its_own = "datname = current_database() AND query LIKE 'BEGIN; SET LOCAL%'"
    with fleet.engine.connect() as connection:
        assert connection.scalars(sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {its_own}")).all()
    manager.enqueue("orders", 1)
    db.session.commit()
    manager.stores.notifier.wait()
    assert heard() == ["orders"]


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("of the application's creator")], ids=repr)
@on_postgresql
def test_a_commit_succeeds_although_no_process_can_be_notified(
    fleet: Fleet,
    manager: BackgroundWorkerManager,
    heard: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail() -> None:
        raise error

    with monkeypatch.context() as away:
        away.setattr(manager.stores.connections, "open_separately", fail)
        manager.enqueue("orders", 1)
        db.session.commit()
        manager.stores.notifier.wait()
        away.setattr(threading.Thread, "start", lambda thread: fail_to_start())
        manager.enqueue("orders", 2)
        db.session.commit()
    assert states(fleet) == ["waiting", "waiting"]
    assert set(heard()) <= {"orders"}


@on_postgresql
def test_a_process_that_cannot_notify_does_not_try_again_for_each_commit(
    manager: BackgroundWorkerManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each try costs the server a process, and the server may have no connection left."""
    tries = []

    def fail() -> None:
        tries.append(manager.stores.notifier)
        raise OSError("sorry, too many clients already")

    monkeypatch.setattr(manager.stores.connections, "open_separately", fail)
    for number in range(50):
        manager.enqueue("orders", number)
        db.session.commit()
    manager.stores.notifier.wait()
    assert 0 < len(tries) <= 20


@on_postgresql
def test_a_process_notifies_on_a_new_connection_after_an_outage(
    manager: BackgroundWorkerManager, heard: Callable[[], list[str]]
) -> None:
    """After a fail-over, the server of the old connection would take the notification, and no process hears it."""
    from psycopg.errors import AdminShutdown

    assert heard() == []
    manager.stores.notifier.wait()
    old = manager.stores.notifier._connection
    manager.stores.outages.notice(AdminShutdown())
    manager.enqueue("orders", 1)
    db.session.commit()
    assert heard() == ["orders"]
    manager.stores.notifier.wait()
    assert old.closed
    assert manager.stores.notifier._connection is not old


def fail_to_start() -> None:
    raise RuntimeError("can't create new thread at interpreter shutdown")


@pytest.mark.promise
def test_a_message_of_a_process_that_ended_before_it_notified_is_found_by_a_heartbeat(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = fleet.manager(Orders, WORKERS_HEARTBEAT_SECONDS=0.5, WORKERS_LEASE_SECONDS=60)
    running.start()
    wait_until(lambda: running.presence.instance is not None, "the start")
    ended = fleet.manager(Orders)
    monkeypatch.setattr(ended.stores.notifier, "notify", lambda topics: None)
    fleet.enqueue("orders", 1)
    wait_until(lambda: states(fleet) == ["done"], "the message")


@pytest.mark.promise
@on_postgresql
def test_a_process_that_ends_right_after_its_commit_notifies_first(
    fleet: Fleet, manager: BackgroundWorkerManager, heard: Callable[[], list[str]]
) -> None:
    program = "from test_notifications import enqueue_and_end; enqueue_and_end()"
    here = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    variables = environment(fleet.database_url) | {"PYTHONPATH": here}
    subprocess.run([sys.executable, "-c", program], env=variables, check=True, timeout=PATIENCE)
    assert heard() == ["orders"]


def enqueue_and_end() -> None:
    with make_app(os.environ["DATABASE_URL"], Orders).app_context():
        current_workers.enqueue("orders", 1)
        db.session.commit()


@pytest.mark.promise
@on_postgresql
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_notifies_on_a_connection_of_its_own(
    manager: BackgroundWorkerManager, heard: Callable[[], list[str]]
) -> None:
    def send(number: int) -> None:
        current_workers.enqueue("orders", number)
        db.session.commit()
        manager.stores.notifier.wait()

    assert heard() == []
    send(1)  # opens the parent's connection
    child = os.fork()
    if not child:
        try:
            send(2)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    send(3)
    assert heard() == ["orders"] * 3


# -- SQLite ----------------------------------------------------------------------------------------


@pytest.fixture
def listening(fleet: Fleet) -> BackgroundWorkerManager:
    """Give a started manager whose heartbeats find nothing during the test."""
    return start_to_listen(fleet)


def start_to_listen(fleet: Fleet) -> BackgroundWorkerManager:
    """Start a manager whose heartbeats find nothing during the test, and have it handle the first message."""
    manager = fleet.manager(Orders, Last, WORKERS_HEARTBEAT_SECONDS=60, WORKERS_LEASE_SECONDS=300)
    start_and_look(manager)
    fleet.app(Orders, Last)  # the process that enqueues
    fleet.enqueue("orders", 0)
    wait_until(lambda: states(fleet) == ["done"], "the first message")
    return manager


@on_sqlite
def test_a_commit_of_another_process_costs_an_idle_process_one_read_for_each_topic_and_no_write(
    fleet: Fleet, listening: BackgroundWorkerManager
) -> None:
    with statements(listening.stores.connections.claims) as sent:
        with fleet.engine.begin() as connection:
            connection.execute(insert(Note).values(text="the application's", number=1))
        wait_until(lambda: len(sent) >= 2, "a read for each topic")
        fleet.enqueue("orders", "the next commit")
        wait_until(lambda: states(fleet) == ["done"] * 2, "the message")
    assert not [each for each in sent[:2] if not each.startswith("SELECT background_messages.id")]


@on_sqlite
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports touches")
def test_a_process_hears_of_messages_of_another_process_between_its_looks(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifications, "_LOOK_SECONDS", 10 * PATIENCE)
    start_to_listen(fleet)
    enqueue_one_by_one(fleet)


@on_sqlite
def test_a_process_hears_of_messages_although_the_system_reports_no_touch(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifications, "touches", lambda _path: nullcontext())
    monkeypatch.setattr(notifications, "_LOOK_SECONDS", 10 * PATIENCE)
    start_to_listen(fleet)
    enqueue_one_by_one(fleet)


def enqueue_one_by_one(fleet: Fleet) -> None:
    """Enqueue three messages. A look that was in progress may find the first of them."""
    for number in (1, 2, 3):
        fleet.enqueue("orders", number)
        wait_until(lambda number=number: states(fleet) == ["done"] * (1 + number), "the message")


@on_sqlite
def test_a_process_without_a_commit_reads_no_table(
    listening: BackgroundWorkerManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifications, "_LOOK_SECONDS", 0.01)
    glances, listener = [], listening.supervisor.listener
    with statements(listening.stores.connections.claims) as sent:
        is_idle, listener._idle = listener._idle, lambda: glances.append(len(sent)) or is_idle()
        wait_until(lambda: len(glances) > 20 and glances[-1] == glances[-10], "ten glances without a read")


@on_sqlite
def test_the_glances_go_on_in_the_file_that_replaces_the_database(
    fleet: Fleet, listening: BackgroundWorkerManager, tmp_path: Path
) -> None:
    path, copy = fleet.engine.url.database, str(tmp_path / "copy.sqlite")
    with closing(sqlite3.connect(path)) as old, closing(sqlite3.connect(copy)) as new:
        old.backup(new)
    os.replace(copy, path)
    fleet.enqueue("orders", "in the new file")
    wait_until(lambda: states(fleet) == ["done"] * 2, "the message")


@on_sqlite
def test_the_glances_go_on_after_an_error(
    fleet: Fleet, listening: BackgroundWorkerManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def fail(_topics: object) -> list[str]:
        failed.set()
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as broken:
        broken.setattr(listening.supervisor.listener, "_due", fail)
        fleet.enqueue("orders", 1)
        assert failed.wait(PATIENCE)
    wait_until(lambda: states(fleet) == ["done"] * 2, "the message")
