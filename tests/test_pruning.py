"""History ends, marks do not."""

from datetime import UTC, datetime, timedelta

from flask import Flask
from sqlalchemy import insert, select

from background import PeriodicWorker
from background.models import executions, workers
from background.pruning import SLICE
from models import db

TICK = datetime(2026, 3, 1, tzinfo=UTC)


class DailyWorker(PeriodicWorker):
    period = timedelta(days=1)

    def do_work(self, context):
        pass


def record(app: Flask, count: int, finished_at: datetime | None) -> None:
    row = {"worker": "daily_worker", "tick": TICK, "trigger": "schedule", "state": "skipped"}
    with app.app_context():
        db.session.execute(insert(executions), [row | {"finished_at": finished_at}] * count)
        db.session.commit()


def left(app: Flask) -> list[datetime | None]:
    with app.app_context():
        of_daily = executions.c.worker == "daily_worker"
        return list(db.session.scalars(select(executions.c.finished_at).where(of_daily).order_by(executions.c.id)))


def test_executions_are_deleted_once_they_ended_longer_ago_than_the_history_days(app):
    limit = TICK - timedelta(days=14)
    record(app, SLICE + 1, limit - timedelta(seconds=1))
    record(app, 1, None)
    record(app, 1, limit - timedelta(seconds=1))
    record(app, 1, limit)
    assert app.extensions["background_workers"].tick("prune_history_worker", TICK).state == "succeeded"
    assert left(app) == [None, limit]


def test_pruning_the_history_admits_no_old_tick_again(app):
    manager = app.extensions["background_workers"]
    manager.add(DailyWorker)
    assert manager.tick("daily_worker", TICK - timedelta(days=30)).state == "succeeded"
    with app.app_context():
        db.session.execute(executions.update().values(finished_at=TICK - timedelta(days=30)))
        db.session.commit()
    manager.tick("prune_history_worker", TICK)
    assert left(app) == []
    assert manager.tick("daily_worker", TICK - timedelta(days=30)) is None
    with app.app_context():
        mark = db.session.scalar(select(workers.c.mark).where(workers.c.name == "daily_worker"))
    assert mark == TICK - timedelta(days=30)
