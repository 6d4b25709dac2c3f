"""The health worker records its measurements each minute, and deletes old ones."""

import logging
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flask import Flask
from sqlalchemy import Engine, insert, select, text
from support.databases import on_sqlite

from background.database.tables import messages
from background.testing import TickNotRun, run_worker
from models import HealthSample, db
from workers import SystemHealthWorker, _number_of

MINUTE = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(hours=1)


def samples(app: Flask) -> list[HealthSample]:
    with app.app_context():
        return list(db.session.scalars(select(HealthSample).order_by(HealthSample.taken_at)))


def check_health(app: Flask, at: datetime = MINUTE) -> None:
    assert run_worker(app, SystemHealthWorker, at).state == "succeeded"


def test_a_sample_describes_the_database_the_disk_and_the_queue(app: Flask, engine: Engine) -> None:
    states = {"waiting": 3, "running": 1, "done": 4, "dead": 2}
    with engine.begin() as connection:
        for state, number in states.items():
            row = {"topic": "mail", "payload": "{}", "state": state, "enqueued_at": MINUTE, "due_at": MINUTE}
            connection.execute(insert(messages).values([row] * number))
    check_health(app, MINUTE + timedelta(seconds=7))
    [sample] = samples(app)
    assert sample.taken_at == MINUTE
    assert 0 < sample.database_ms < 5_000
    assert 0 < sample.disk_free_bytes <= shutil.disk_usage(app.root_path).total
    assert (sample.messages_waiting, sample.messages_dead) == (3, 2)


def test_a_minute_has_one_sample_and_old_samples_are_deleted(app: Flask) -> None:
    app.config["WORKERS_HISTORY_DAYS"] = 2
    for at in (MINUTE - timedelta(days=3), MINUTE - timedelta(days=1), MINUTE):
        check_health(app, at)
    with pytest.raises(TickNotRun, match="succeeded"):
        run_worker(app, SystemHealthWorker, MINUTE)
    assert [sample.taken_at for sample in samples(app)] == [MINUTE - timedelta(days=1), MINUTE]


def test_a_disk_that_is_nearly_full_is_warned_about(
    app: Flask,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk = shutil.disk_usage(app.root_path)
    for minutes, free, warns in [(0, 0.06, False), (1, 0.04, True)]:
        usage = disk._replace(total=10**9, free=int(10**9 * free))
        monkeypatch.setattr(shutil, "disk_usage", lambda _path, usage=usage: usage)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check_health(app, MINUTE + timedelta(minutes=minutes))
        assert ("The disk is nearly full: 40 MB are free." in caplog.text) is warns


def test_a_missing_instance_folder_causes_no_error(app: Flask, tmp_path: Path) -> None:
    app.instance_path = str(tmp_path / "not" / "there")
    check_health(app)
    assert samples(app)[0].disk_free_bytes > 0


@on_sqlite
def test_counting_the_queue_does_not_read_handled_messages(engine: Engine) -> None:
    for state, index in (("waiting", "due"), ("dead", "dead")):
        with engine.connect() as connection:
            plan = connection.execute(text(f"EXPLAIN QUERY PLAN {select(_number_of(state)).compile(engine)}")).all()
        assert f"INDEX ix_background_messages_{index}" in str(plan)
