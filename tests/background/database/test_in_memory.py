"""SQLite in memory has a single connection, so the engine refuses it."""

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from background import BackgroundWorkerManager, InvalidConfig


def test_the_engine_refuses_a_single_connection_that_runs_and_heartbeats_would_share() -> None:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    single = SQLAlchemy(app)
    with pytest.raises(InvalidConfig, match="in the memory of one connection; expected one that several"):
        BackgroundWorkerManager(app, single)
