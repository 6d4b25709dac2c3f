"""The start of the application in a new process, beside a bare application with the same libraries."""

import os
import subprocess
import sys
from collections.abc import Iterator

from ..harness.figures import Figure, Setup, check, in_turns

BARE = """
import apscheduler.schedulers.background, argon2, cronsim, email_validator, prometheus_client, qrcode, svcs, zxcvbn
import cryptography, flask_limiter.util, psycopg
from flask import Flask
from flask_bootstrap import Bootstrap5
from flask_limiter import Limiter
from flask_migrate import Migrate
from flask_security import Security, SQLAlchemyUserDatastore
from flask_security.models import fsqla_v3
from flask_sqlalchemy import SQLAlchemy
from flask_wtf import CSRFProtect

def create_app():
    app = Flask("bare")
    app.config.update(SECRET_KEY="x" * 40, SECURITY_PASSWORD_SALT="x" * 40, SQLALCHEMY_DATABASE_URI="sqlite://")
    db = SQLAlchemy(app)
    fsqla_v3.FsModels.set_db_info(db)
    class Role(db.Model, fsqla_v3.FsRoleMixin): pass
    class User(db.Model, fsqla_v3.FsUserMixin): pass
    Migrate(app, db), CSRFProtect(app), Bootstrap5(app)
    Limiter(lambda: "all", app=app, storage_uri="memory://")
    Security(app, SQLAlchemyUserDatastore(db, User, Role))
    svcs.flask.init_app(app)
    return app
"""
OURS = """
import app
def create_app():
    return app.create_app({"DATABASE_URL": "sqlite:///benchmark.sqlite", "SECRET_KEY": "x" * 40})
"""
MEASURED = """
import time
began = time.perf_counter(), time.process_time()
{}
made = create_app()
print(time.perf_counter() - began[0], time.process_time() - began[1], len(made.blueprints))
"""


def run(setup: Setup) -> Iterator[Figure]:
    if setup.engine != "sqlite":  # no process connects to a database
        return
    for name, part in (("create_app, and its imports", 0), ("create_app, its processor time", 1)):
        ways = {"ours": lambda part=part: milliseconds(OURS, part), "bare": lambda part=part: milliseconds(BARE, part)}
        took = in_turns(setup, name, ways)
        yield Figure(name, "ms", took["ours"], "a bare application", took["bare"], "<= 1.3")


def milliseconds(program: str, part: int) -> float:
    """Execute the program in a new process. Return its wall time or its processor time."""
    environment = {**os.environ, "LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-W", "ignore", "-c", MEASURED.format(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    check(done.returncode == 0, f"the application was not made: {done.stderr}")
    *seconds, blueprints = done.stdout.split()
    check(int(blueprints) >= 2, "the application has too few blueprints")
    return 1000 * float(seconds[part])
