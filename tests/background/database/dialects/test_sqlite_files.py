"""The files of a SQLite database: replaced under a running fleet, locked by another process, and private."""

import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest
from flask import Flask
from sqlalchemy import create_engine, make_url, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool
from support.fleet import Fleet, Hourly, Note, db, effect, last_hour, wait_until

from background import PeriodicWorker, WorkerContext
from background.database.dialects.sqlite import prepare
from background.database.tables import executions
from background.errors import InvalidConfig


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    return sqlite_url


@pytest.fixture
def path(database_url: str) -> Path:
    return Path(str(make_url(database_url).database))


class Often(PeriodicWorker):
    period = timedelta(seconds=0.2)

    def do_work(self, context: WorkerContext) -> None:
        effect(context)


def backup(path: Path) -> Path:
    """Copy the database as it is now, into one file."""
    copy = path.with_name("backup.sqlite")
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    return copy


def replace(path: Path) -> None:
    os.replace(backup(path), path)


def move_away_and_copy(path: Path) -> None:
    copy = backup(path)
    path.rename(path.with_name("moved.sqlite"))
    shutil.copyfile(copy, path)


def remove_all_and_copy(path: Path) -> None:
    copy = backup(path)
    for each in (path, *path.parent.glob(f"{path.name}-*")):
        each.unlink()
    shutil.copyfile(copy, path)


def modes(path: Path) -> dict[str, str]:
    return {each.name: f"{stat.S_IMODE(each.stat().st_mode):o}" for each in path.parent.glob(f"{path.name}*")}


WAYS = [replace, move_away_and_copy, remove_all_and_copy]


@pytest.mark.parametrize("way", WAYS)
def test_a_fleet_whose_file_is_replaced_goes_on_in_the_new_file_and_logs_it_once(
    fleet: Fleet, path: Path, way: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    manager = fleet.manager(Often)
    manager.start()
    wait_until(lambda: len(fleet.effects()) >= 2, "two runs")
    with closing(sqlite3.connect(path)) as old:
        old.execute("SELECT 1 FROM effects").fetchall()  # this connection stays with the old file
        way(path)
        wait_until(lambda: f"The database file {path} " in caplog.text, "the warning")
        kept = old.execute("SELECT count(*) FROM background_executions").fetchall()
        with closing(sqlite3.connect(path)) as new:
            count = "SELECT count(*) FROM effects"
            before = new.execute(count).fetchone()[0]
            wait_until(lambda: new.execute(count).fetchone()[0] >= before + 2, "two runs in the new file")
            assert old.execute("SELECT count(*) FROM background_executions").fetchall() == kept
            assert new.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            keys = new.execute("SELECT key, count(*) FROM effects GROUP BY key HAVING count(*) > 1").fetchall()
            assert keys == []
    assert len(re.findall(rf"{path} was (replaced|deleted) while this process had it open", caplog.text)) == 1


def test_a_fleet_whose_write_ahead_log_is_deleted_logs_it_and_commits_nothing_more(
    fleet: Fleet, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = fleet.manager(Often)
    manager.start()
    wait_until(lambda: len(fleet.effects()) >= 2, "two runs")
    with closing(sqlite3.connect(path)) as old:
        old.execute("SELECT 1 FROM effects").fetchall()
        Path(f"{path}-wal").unlink()
        wait_until(lambda: f"The database file {path} lost its write-ahead log" in caplog.text, "the warning")
        kept = old.execute("SELECT count(*) FROM background_executions").fetchall()
        wait_until(lambda: "cannot claim the tick" in caplog.text, "a tick that cannot be claimed")
        assert old.execute("SELECT count(*) FROM background_executions").fetchall() == kept


@pytest.mark.parametrize("way", WAYS)
def test_a_run_whose_file_is_replaced_commits_nothing_into_the_old_file(
    fleet: Fleet, path: Path, way: Callable[[Path], None]
) -> None:
    class Once(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            effect(context)
            way(path)

    manager = fleet.manager(Once)
    with closing(sqlite3.connect(path)) as old:
        old.execute("SELECT 1 FROM effects").fetchall()
        manager.tick("once", last_hour())
        assert old.execute("SELECT count(*) FROM effects").fetchone() == (0,)
    with closing(sqlite3.connect(path)) as new:
        assert new.execute("SELECT count(*) FROM effects").fetchone() == (0,)


@pytest.mark.parametrize("way", WAYS)
def test_a_request_commits_nothing_into_a_file_that_was_replaced_and_the_next_one_writes_into_the_new_file(
    app: Flask, path: Path, way: Callable[[Path], None]
) -> None:
    with app.app_context():
        db.session.add(Note(text="written"))
        db.session.flush()
        way(path)
        with pytest.raises(OperationalError, match=r"(was replaced|lost its write-ahead log) after this transaction"):
            db.session.commit()
        db.session.rollback()
        assert db.session.scalars(select(Note.text)).all() == []
        db.session.add(Note(text="written"))
        db.session.commit()
    with closing(sqlite3.connect(path)) as new:
        assert new.execute("SELECT text FROM notes").fetchall() == [("written",)]


def test_a_fleet_waits_for_a_deleted_file_and_makes_no_empty_file(
    fleet: Fleet, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = fleet.manager(Often)
    manager.start()
    wait_until(lambda: len(fleet.effects()) >= 2, "two runs")
    copy = backup(path)
    for each in (path, *path.parent.glob(f"{path.name}-*")):
        each.unlink()
    wait_until(lambda: "No heartbeat" in caplog.text and "was deleted; expected it at that path" in caplog.text)
    assert not path.exists()
    copy.rename(path)
    before = len(fleet.effects())
    wait_until(lambda: len(fleet.effects()) >= before + 2, "two runs in the file that was restored")


def test_a_disposed_engine_may_make_a_new_file(path: Path) -> None:
    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)
    prepare(engine)
    with engine.connect():
        path.unlink()
    with pytest.raises(OperationalError, match="was deleted"):
        engine.connect()
    engine.dispose()
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar() == 0


def test_a_file_system_that_refuses_a_write_ahead_log_is_refused_with_a_sentence(tmp_path: Path) -> None:
    """SQLite's unix-dotfile has no shared memory, like many a network file system."""
    path = tmp_path / "on_a_share.sqlite"
    engine = create_engine(f"sqlite:///file:{path}?vfs=unix-dotfile&uri=true", poolclass=NullPool)
    prepare(engine)
    with pytest.raises(InvalidConfig, match=rf"{path} refuses SQLite's write-ahead log .*'delete'.* a local disk"):
        engine.connect()


@pytest.mark.usefixtures("open_umask")
@pytest.mark.parametrize(("mode", "expected"), [(0o600, "600"), (0o640, "640"), (0o660, "660")])
def test_the_files_beside_the_database_are_as_private_as_the_database(
    fleet: Fleet, path: Path, mode: int, expected: str
) -> None:
    path.chmod(mode)
    manager = fleet.manager(Hourly)
    manager.tick("hourly", last_hour())
    with manager.lock("invoice-42"):
        found = modes(path)
    companions = {f"{path.name}{suffix}" for suffix in ("", "-wal", "-shm")}
    companions |= {f"{path.name}-instances{suffix}" for suffix in ("", "-wal", "-shm")}
    assert found == dict.fromkeys(companions, expected)


def test_files_beside_the_database_that_were_made_with_wider_modes_are_made_private(fleet: Fleet, path: Path) -> None:
    path.chmod(0o600)
    beside = Path(f"{path}-instances")
    with closing(sqlite3.connect(beside)) as earlier:
        earlier.execute("PRAGMA journal_mode = WAL")
        earlier.execute("CREATE TABLE of_an_earlier_release (id)")
        for each in beside.parent.glob(f"{beside.name}*"):
            each.chmod(0o666)
        fleet.manager(Hourly).tick("hourly", last_hour())
        assert set(modes(beside).values()) == {"600"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file to another user")
def test_files_that_root_makes_beside_the_database_belong_to_its_owner(fleet: Fleet, path: Path) -> None:
    os.chown(path, 65534, 65534)
    fleet.manager(Hourly).tick("hourly", last_hour())
    owner = Path(f"{path}-instances").stat()
    assert (owner.st_uid, owner.st_gid) == (65534, 65534)


def test_a_file_that_another_process_keeps_locked_is_reported_after_seconds(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("background.database.dialects.sqlite.OPEN_SECONDS", 0.2)
    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)
    prepare(engine)
    holder = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "c.execute('PRAGMA locking_mode = EXCLUSIVE'); c.execute('BEGIN EXCLUSIVE'); print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", holder, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(OperationalError, match=f"another process has kept {path} locked for 0.2 s.*fuser"):
            engine.connect()
        process.communicate(b"\n")
    with engine.connect() as connection:
        assert connection.execute(select(executions.c.id)).all() == []
