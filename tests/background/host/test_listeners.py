"""Each listener comes to each target, also to one that has the id of a target that is gone."""

import subprocess
import sys

import pytest
from support.processes import environment

from background.host.listeners import is_new

MANY = """
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from background import BackgroundWorkerManager
from background.runs.fence import _before_commit

fenced = 0
for number in range(300):
    app, db = Flask("host"), SQLAlchemy()
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:///{path}"
    db.init_app(app)
    BackgroundWorkerManager(app, db)
    with app.app_context():
        fenced += _before_commit in list(db.session().dispatch.before_commit)
        db.session.remove()
    del app, db
print(fenced)
"""


@pytest.mark.promise
def test_the_sessions_of_each_of_many_applications_are_fenced(tmp_path: object) -> None:
    program = MANY.replace("{path}", f"{tmp_path}/host.sqlite")
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.stdout.split() == ["300"], done.stdout + done.stderr


class Target:
    def heard(self) -> None:
        pass


def test_a_listener_is_new_to_a_target_once() -> None:
    one, other = Target(), Target()
    assert is_new(one, one.heard)
    assert not is_new(one, one.heard)
    assert is_new(one, other.heard)
    assert is_new(other, one.heard)
