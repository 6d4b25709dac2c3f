"""A dry run shows the rows that a run would change, and changes none."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from flask import Flask, current_app
from sqlalchemy import bindparam, delete, insert, inspect, select, text, update
from support.fleet import Hourly, Note, db, effect, effects

from background import MessageWorker, WorkerContext, current_workers
from background.errors import DryRunCommits


class ChangingWorker(Hourly):
    """Changes rows by the ORM, by statements, and by a message."""

    def do_work(self, context: WorkerContext) -> None:
        session = context.session
        session.add(Note(text="new", number=1))
        [first] = session.scalars(select(Note).where(Note.text == "note 0"))
        first.number = 7
        session.execute(update(Note).where(Note.number == 2).values(number=Note.number + 40))
        session.execute(delete(Note).where(Note.number >= 100))
        effect(context)
        current_workers.enqueue("notes", {"book": 1})


class SlicingWorker(Hourly):
    def do_work(self, context: WorkerContext) -> None:
        effect(context)
        context.commit()


class EngineWorker(Hourly):
    def do_work(self, context: WorkerContext) -> None:
        with db.engine.begin() as connection:
            connection.execute(insert(effects).values(key="engine", note=""))


class ConnectionWorker(Hourly):
    def do_work(self, context: WorkerContext) -> None:
        effect(context)
        context.session.connection().commit()


class ThreadedWorker(Hourly):
    def do_work(self, context: WorkerContext) -> None:
        def write() -> None:
            with app.app_context():
                db.session.execute(insert(effects).values(key="thread", note=""))
                db.session.commit()

        app = current_app._get_current_object()  # type: ignore[attr-defined]
        with ThreadPoolExecutor(1) as pool, suppress(DryRunCommits):
            pool.submit(write).result()


class CatchingWorker(Hourly):
    def do_work(self, context: WorkerContext) -> None:
        effect(context)
        with suppress(DryRunCommits):
            context.commit()


class TextualWorker(Hourly):
    def do_work(self, context: WorkerContext) -> None:
        context.session.execute(text("UPDATE notes SET number = 5 WHERE number < 100"))
        context.session.connection().exec_driver_sql("DELETE FROM notes WHERE number >= 100")


class BulkWorker(Hourly):
    """Changes rows in each way that SQLAlchemy offers for many rows."""

    def do_work(self, context: WorkerContext) -> None:
        session = context.session
        session.execute(insert(Note), [{"text": "many", "number": 1}] * 3)
        session.execute(insert(Note).values([{"text": "values"}] * 2))
        session.execute(
            insert(Note).from_select(["text", "number"], select(Note.text, Note.number).order_by(Note.id).limit(4))
        )
        session.execute(update(Note), [{"id": 1, "number": 9}, {"id": 2, "number": 9}])
        session.execute(update(Note).where(Note.number == bindparam("old")).values(number=3), {"old": 2})
        session.scalars(delete(Note).where(Note.number >= 100).returning(Note.id)).all()


class AutocommitWorker(Hourly):
    def do_work(self, context: WorkerContext) -> None:
        with db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(insert(effects).values(key="autocommit", note=""))


class CteWorker(Hourly):
    def do_work(self, context: WorkerContext) -> None:
        with db.engine.begin() as connection:
            connection.execute(text("WITH a AS (SELECT 1) INSERT INTO effects (key, note) SELECT 'cte', '' FROM a"))


class TableWorker(Hourly):
    def do_work(self, context: WorkerContext) -> None:
        with db.engine.begin() as connection:
            connection.execute(text("CREATE TABLE made (id INTEGER)"))


class ReadingWorker(Hourly):
    """Commits what changes no row, holds a lock, and uses a savepoint."""

    def do_work(self, context: WorkerContext) -> None:
        with db.engine.begin() as connection:
            connection.execute(text("-- a comment\nSELECT 1"))
        with context.session.begin_nested(), current_workers.lock("books") as lock:
            assert lock
            effect(context)


class ForkingWorker(Hourly):
    """Forks, and the child writes, commits and returns."""

    def do_work(self, context: WorkerContext) -> None:
        effect(context)
        if child := os.fork():
            os.waitpid(child, 0)
            return
        logging.getLogger("background.host.forks").addHandler(logging.StreamHandler(os.fdopen(os.dup(2), "w")))
        with suppress(DryRunCommits):
            db.session.execute(insert(effects).values(key="child", note=""))
            db.session.commit()


class FailingWorker(Hourly):
    def do_work(self, context: WorkerContext) -> None:
        effect(context)
        raise LookupError("no such book")


class AsyncWorker(Hourly):
    async def do_work(self, context: WorkerContext) -> None:  # type: ignore[override]
        effect(context)


class NoteWorker(MessageWorker):
    topic = "notes"

    def handle(self, message, context):  # type: ignore[no-untyped-def]
        raise NotImplementedError


COMMITTING = (
    *(SlicingWorker, EngineWorker, ConnectionWorker, ThreadedWorker, CatchingWorker),
    *(AutocommitWorker, CteWorker, TableWorker),
)
OTHERS = (TextualWorker, BulkWorker, ReadingWorker, ForkingWorker, FailingWorker, AsyncWorker, NoteWorker)


@pytest.fixture
def host(app: Flask) -> Flask:
    manager = app.extensions["background_workers"]
    for worker in (ChangingWorker, *COMMITTING, *OTHERS):
        manager.add(worker)
    with app.app_context():
        db.session.add_all([Note(text=f"note {number}", number=number) for number in (0, 1, 2, 2, *range(100, 115))])
        db.session.commit()
    return app


def dry_run(app: Flask, name: str) -> tuple[int, str]:
    result = app.test_cli_runner().invoke(args=["workers", "trigger", name, "--dry-run"])
    return result.exit_code, result.output


def rows(app: Flask) -> list[tuple[str, int]]:
    with app.app_context():
        return [(row.text, row.number) for row in db.session.execute(select(Note.text, Note.number).order_by(Note.id))]


def test_it_shows_each_table_with_the_number_of_rows_and_examples(host: Flask) -> None:
    before = rows(host)
    code, said = dry_run(host, "changing_worker")
    assert code == 0, said
    lines = said.splitlines()
    assert lines[0] == "changing_worker would change these rows. The run was rolled back."
    assert "notes: 1 inserted" in lines
    assert "  text='new', number=1" in lines
    assert "notes: 3 updated" in lines
    assert any(line.endswith("number=0 -> 7") for line in lines)
    assert sum("text='note 2', number=2" in line for line in lines) == 2
    assert "notes: 15 deleted" in lines
    assert "  and 5 more" in lines
    assert "effects: 1 inserted" in lines
    assert "background_messages: 1 inserted" in lines
    assert rows(host) == before


def test_nothing_of_it_stays(host: Flask) -> None:
    manager = host.extensions["background_workers"]
    dry_run(host, "changing_worker")
    assert manager.history.executions("changing_worker") == []
    assert manager.messages.letters() == []
    with host.app_context():
        assert db.session.execute(select(effects)).all() == []


@pytest.mark.parametrize("worker", COMMITTING)
def test_a_worker_that_commits_by_any_connection_is_refused_with_the_reason(host: Flask, worker: type[Hourly]) -> None:
    dry_run(host, worker.name)
    code, said = dry_run(host, worker.name)  # the first dry run left no transaction open
    assert code == 1
    assert f"{worker.name!r} commits during its run, so a dry run cannot roll it back; expected" in said
    with host.app_context():
        assert db.session.execute(select(effects)).all() == []
        assert not inspect(db.engine).has_table("made")


def test_a_savepoint_a_lock_and_a_commit_of_reads_are_allowed(host: Flask) -> None:
    code, said = dry_run(host, "reading_worker")
    assert (code, "effects: 1 inserted" in said) == (0, True), said


def test_a_forked_child_neither_commits_nor_goes_on_with_the_command(
    host: Flask, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said = dry_run(host, "forking_worker")
    assert (code, "effects: 1 inserted" in said) == (0, True), said
    assert "The dry run of ForkingWorker forked, and the child process" in capfd.readouterr().err
    with host.app_context():
        assert db.session.execute(select(effects)).all() == []


def test_it_counts_the_rows_of_textual_statements(host: Flask) -> None:
    code, said = dry_run(host, "textual_worker")
    assert (code, said.splitlines()[1:3]) == (0, ["notes: 4 updated", "notes: 15 deleted"])


def test_it_counts_the_rows_of_statements_for_many_rows(host: Flask) -> None:
    code, said = dry_run(host, "bulk_worker")
    assert code == 0, said
    counts = [line for line in said.splitlines() if line.startswith("notes: ")]
    assert counts[0] == "notes: 9 inserted"
    assert "  id=1, text='note 0', number=0 -> 9" in said.splitlines()
    assert counts[1] == "notes: 6 updated"
    assert counts[2] == "notes: 15 deleted"


def test_an_error_of_the_worker_is_the_answer(host: Flask) -> None:
    result = host.test_cli_runner().invoke(args=["workers", "trigger", "failing_worker", "--dry-run"])
    assert isinstance(result.exception, LookupError)
    with host.app_context():
        assert db.session.execute(select(effects)).all() == []


def test_an_async_worker_is_awaited(host: Flask) -> None:
    code, said = dry_run(host, "async_worker")
    assert (code, "effects: 1 inserted" in said) == (0, True), said


class PositionWorker(Hourly):
    def do_work(self, context: WorkerContext) -> None:
        context.cursor = {"after": (context.cursor or {}).get("after", 0) + 7}


def test_it_shows_the_cursor_that_the_run_assigned(host: Flask) -> None:
    host.extensions["background_workers"].add(PositionWorker)
    code, said = dry_run(host, "position_worker")
    assert (code, said.splitlines()[1:]) == (0, ["context.cursor: 1 assigned", '  {"after":7}'])


def test_a_real_run_follows_as_if_there_had_been_none(host: Flask) -> None:
    dry_run(host, "changing_worker")
    result = host.test_cli_runner().invoke(args=["workers", "trigger", "changing_worker"])
    assert result.exit_code == 0, result.output
    assert ("note 0", 7) in rows(host)
