"""Each command of docs/deploying.md is executed, here or in test_restoring.py."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import create_engine
from sqlalchemy import text as sql
from sqlalchemy.pool import NullPool
from support.fleet import wait_until
from support.image import Image, needs_namespaces
from support.processes import ROOT, environment

from models import db
from production import COMPLAINTS

PAGE = (ROOT / "docs" / "deploying.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", PAGE, re.MULTILINE))
BLOCKS = {title: re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for title, text in SECTIONS.items()}
HOST = "shop.example.org"


def admins(database_url: str) -> int:
    engine = create_engine(database_url, poolclass=NullPool)
    with engine.connect() as connection:
        return int(connection.scalar(sql("SELECT count(*) FROM users WHERE is_admin")) or 0)


def test_each_command_of_the_page_belongs_to_a_test() -> None:
    assert {title: len(blocks) for title, blocks in BLOCKS.items() if blocks} == {
        "Production in three commands": 1,
        "One machine with systemd and nginx": 2,
        "Back up": 3,
        "Restore": 2,
        "Migrations without downtime": 1,
    }


def with_tools(script: str, database_url: str) -> None:
    """Execute the script with the project's commands. gunicorn only checks itself. Other tests start gunicorn."""
    script = re.sub(r"postgresql://\S+", database_url, script).replace("&& gunicorn", "&& gunicorn --check-config")
    env = environment(
        database_url, FLASK_APP="app:create_app", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    done = subprocess.run(["sh", "-ec", script], env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_commands_of_production_and_of_migrations_work(empty_postgresql_url: str) -> None:
    with_tools(BLOCKS["Migrations without downtime"][0], empty_postgresql_url)
    with_tools(BLOCKS["Production in three commands"][0], empty_postgresql_url)
    assert admins(empty_postgresql_url) == 1


def test_a_release_stays_ready_on_the_schema_of_a_newer_release(app: Flask, client: FlaskClient) -> None:
    with app.app_context():
        db.session.execute(sql("UPDATE alembic_version SET version_num = '9999'"))
        db.session.commit()
    app.extensions["background_workers"].start()
    wait_until(lambda: client.get("/health/ready").status_code == 200)


@pytest.fixture
def machine() -> Iterator[Image]:
    """Give a machine that has the project in /opt/bookstore, and a certificate."""
    needs_namespaces()
    if missing := [each for each in ("systemctl", "systemd-analyze", "useradd") if not shutil.which(each)]:
        pytest.skip(f"needs {', '.join(missing)}, of Debian's packages systemd and passwd")
    with tempfile.TemporaryDirectory(prefix="bookstore-machine-", dir="/dev/shm") as folder:
        image = Image(Path(folder) / "machine")
        image.file("/opt").mkdir()
        image.file("/opt/bookstore").symlink_to(ROOT)
        live = image.file(f"/etc/letsencrypt/live/{HOST}")
        live.mkdir(parents=True)
        certificate = trustme.CA().issue_cert(HOST)
        certificate.private_key_pem.write_to_path(live / "privkey.pem")
        certificate.cert_chain_pems[0].write_to_path(live / "fullchain.pem")
        yield image


def test_the_commands_for_one_machine_work(machine: Image, empty_postgresql_url: str) -> None:
    first, second = BLOCKS["One machine with systemd and nginx"]
    first, second = (f"set -e\ncd /opt/bookstore\n{block}" for block in (first, second))
    # Offline, systemctl reads each command, enables the units, and starts none.
    machine.run(re.sub(r"postgresql://\S+", empty_postgresql_url, first), SYSTEMD_OFFLINE="1")
    assert admins(empty_postgresql_url) == 1
    assert machine.file("/etc/bookstore.env").stat().st_mode & 0o777 == 0o600
    enabled = machine.file("/etc/systemd/system/multi-user.target.wants").iterdir()
    assert {unit.name for unit in enabled} == {"bookstore-web.service", "bookstore-workers.service"}
    said = machine.run("systemd-analyze verify --man=no bookstore-web.service bookstore-workers.service 2>&1")
    assert "bookstore" not in said
    if not Path("/usr/sbin/nginx").exists():
        pytest.skip("needs nginx, of Debian's package nginx-light")
    machine.run(second, own_network=True, SYSTEMD_OFFLINE="1")


def test_the_page_names_each_alert() -> None:
    files = [(ROOT / folder / "alerts.yml").read_text(encoding="utf-8") for folder in ("background", "deploy")]
    alerts = re.findall(r"- alert: (\w+)", "".join(files))
    assert re.findall(r"^\| ([A-Z]\w+[A-Z]\w+) \|", SECTIONS["Alerts"], re.MULTILINE) == alerts


def test_the_page_names_each_setting_that_production_complains_about() -> None:
    said = " ".join(each.sentence for each in COMPLAINTS)
    named = set(re.findall(r"\b[A-Z]+_[A-Z_]+\b", said))
    assert {"SECRET_KEY", "PUBLIC_URL", "METRICS_TOKEN", "MAIL_URL"} < named
    assert named <= set(re.findall(r"\b[A-Z_]+\b", SECTIONS["What production insists on"]))


def test_the_page_names_each_file_of_the_folder() -> None:
    linked = {(ROOT / "docs" / path).resolve() for path in re.findall(r"^\[\d\]: (.*)$", PAGE, re.MULTILINE)}
    assert linked == {*(ROOT / "deploy").iterdir(), ROOT / ".github" / "workflows" / "ci.yml"}
