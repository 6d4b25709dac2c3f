"""The application's name is in one place, and its owner may change it."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from support.databases import close, on_sqlite
from support.processes import ROOT
from support.shop import settings

from app import create_app
from background.testing import worker_context
from config import APP_NAME
from mail import welcome
from models import User, db

PRODUCT = (".py", ".html", ".txt", ".css", ".js", ".mako", ".ini", ".toml", ".yml")
APART = re.compile(r"(tests|benchmarks|docs|deploy)/")


def files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split() if name.endswith(PRODUCT) and not APART.match(name)]


def test_the_name_is_in_one_place() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in files()
        if path.exists()
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(re.escape(APP_NAME), line, re.IGNORECASE)
    ]
    assert len(files()) > 100
    assert found == [f'config.py: APP_NAME = "{APP_NAME}"']


@on_sqlite
def test_a_setting_renames_the_pages_and_the_mails(database_url: str, make_user: Callable[..., User]) -> None:
    app = create_app(settings(database_url, APP_NAME="Tea & Co"))
    assert "Tea &amp; Co</a>" in app.test_client().get("/").text
    user = make_user()
    with app.app_context():
        mail = welcome(user.id, {}, worker_context())
        assert mail is not None
        assert mail.subject == "Welcome to the Tea & Co"
        assert mail.text.endswith("Your Tea & Co")
        db.session.remove()
    close(app)
