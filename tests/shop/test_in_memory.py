"""`sqlite://`, as tests often use it: applications share nothing with each other, and leave nothing behind."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from flask import Flask
from sqlalchemy import func, make_url, select
from support.databases import dispose
from support.fleet import Hourly, effects, last_hour, wait_until

from app import create_app
from background import BackgroundWorkerManager
from background.database import tables
from models import User, db


@pytest.fixture(
    params=[
        {"DATABASE_URL": "sqlite://"},
        {"DATABASE_URL": "sqlite:///:memory:"},
        {"SQLALCHEMY_DATABASE_URI": "sqlite://"},
        {"SQLALCHEMY_DATABASE_URI": "sqlite:///:memory:"},
    ],
    ids=lambda config: "=".join(*config.items()),
)
def memory(request: pytest.FixtureRequest) -> Iterator[Flask]:
    app = create_app({"TESTING": True, "SECRET_KEY": "test", "WORKERS_HEARTBEAT_SECONDS": 0.1, **request.param})
    manager: BackgroundWorkerManager = app.extensions["background_workers"]
    manager.add(Hourly)
    with app.app_context():
        db.create_all()
        effects.create(db.engine)
        yield app
        manager.stop()
        db.session.remove()
        dispose()
    gc.collect()


def test_a_tick_and_a_manual_run_work_in_memory(memory: Flask) -> None:
    manager = memory.extensions["background_workers"]
    assert manager.tick("hourly", last_hour()).state == "succeeded"
    assert manager.tick("hourly", last_hour()) is None
    assert manager.trigger("hourly").state == "succeeded"
    assert db.session.scalar(select(func.count()).select_from(effects)) == 2


def test_the_workers_start_and_stop_in_memory_beside_a_session_in_use(memory: Flask) -> None:
    manager = memory.extensions["background_workers"]
    db.session.add(User(email="a@example.com", name="A"))
    manager.start()
    db.session.commit()
    ran = select(tables.executions.c.worker).where(tables.executions.c.state == "succeeded")
    wait_until(lambda: set(db.session.scalars(ran)) == set(manager.workers), "a run of each worker")
    manager.stop()
    assert db.session.scalar(select(func.count()).select_from(effects)) == 1
    assert db.session.scalar(select(func.count()).select_from(User)) == 1


def test_two_applications_in_memory_share_nothing_and_leave_nothing() -> None:
    first, second = (create_app({"DATABASE_URL": "sqlite://", "TESTING": True, "SECRET_KEY": "x"}) for _ in range(2))
    places = [make_url(app.config["SQLALCHEMY_DATABASE_URI"]).database for app in (first, second)]
    assert places[0] != places[1]
    folders = [Path(place or "").parent for place in places]
    assert all(folder.is_dir() and not list(folder.iterdir()) for folder in folders)
    del first, second
    gc.collect()
    assert not any(folder.exists() for folder in folders)


def test_a_served_prototype_in_memory_has_the_demo_shop() -> None:
    app = create_app({"DATABASE_URL": "sqlite://", "TESTING": True, "SECRET_KEY": "test"})
    with app.app_context():
        app.extensions["background_workers"].prepare()
        assert db.session.scalar(select(func.count()).select_from(User)) > 0
        db.session.remove()
        dispose()
