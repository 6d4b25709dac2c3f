"""Settings: their sources, and the sentences that refuse a wrong value."""

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import URL, create_engine, text
from sqlalchemy.pool import NullPool
from support.databases import administer, dispose
from support.processes import PATIENCE, ROOT
from support.shop import settings

from app import create_app
from background.errors import InvalidConfig
from config import KEYS, configure_logging, load_config
from models import db


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)


def load(folder: Path, given: Any = None) -> dict[str, Any]:
    app = Flask("config", instance_path=str(folder))
    load_config(app, given)
    return app.config


def test_without_settings_the_embedded_file_and_the_defaults_are_used(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config["SQLALCHEMY_DATABASE_URI"] == f"sqlite:///{tmp_path / 'bookstore.sqlite'}"
    assert config["DATABASE_IS_EMBEDDED"] is True
    assert config["WORKERS_ENABLED"] is True
    assert (config["WORKERS_HEARTBEAT_SECONDS"], config["WORKERS_LEASE_SECONDS"]) == (2, 10)
    assert (config["WORKERS_THREADS"], config["PASSIVE_AFTER_DAYS"], config["LOG_LEVEL"]) == (10, 30, "INFO")


def test_the_environment_overrides_the_default_and_the_argument_overrides_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PASSIVE_AFTER_DAYS", "60")
    monkeypatch.setenv("WORKERS_THREADS", "4")
    (tmp_path / "config.py").write_text("WORKERS_THREADS = 8\nTITLE = 'Mine'\n")
    config = load(tmp_path)
    assert (config["PASSIVE_AFTER_DAYS"], config["WORKERS_THREADS"], config["TITLE"]) == (60, 8, "Mine")


def test_a_given_mapping_or_object_takes_the_place_of_the_instance_file(tmp_path: Path) -> None:
    class Given:
        WORKERS_THREADS = 3

    (tmp_path / "config.py").write_text("WORKERS_THREADS = 8\nPASSIVE_AFTER_DAYS = 9\n")
    for given in ({"WORKERS_THREADS": 3}, Given, Given()):
        config = load(tmp_path, given)
        assert (config["WORKERS_THREADS"], config["PASSIVE_AFTER_DAYS"]) == (3, 30)


def test_an_empty_variable_counts_as_unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "")
    assert load(tmp_path)["DATABASE_IS_EMBEDDED"] is True


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_every_spelling_of_postgresql_gets_its_driver(tmp_path: Path, scheme: str) -> None:
    config = load(tmp_path, {"DATABASE_URL": f"{scheme}://shop:secret@db/shop"})
    assert config["SQLALCHEMY_DATABASE_URI"].startswith("postgresql+psycopg://shop:secret@db/shop")
    assert config["DATABASE_IS_EMBEDDED"] is False


def test_a_database_url_does_not_wait_for_a_server_without_end(tmp_path: Path) -> None:
    assert load(tmp_path, {"DATABASE_URL": "postgresql://db/shop"})["SQLALCHEMY_DATABASE_URI"].endswith("=10")
    own = load(tmp_path, {"DATABASE_URL": "postgresql://db/shop?connect_timeout=3"})
    assert own["SQLALCHEMY_DATABASE_URI"].endswith("?connect_timeout=3")


def test_the_pool_of_postgresql_keeps_ten_connections_unless_another_pool_is_given(tmp_path: Path) -> None:
    def pool(**options: Any) -> Any:
        given = {"DATABASE_URL": "postgresql://db/shop", "SQLALCHEMY_ENGINE_OPTIONS": options}
        config = load(tmp_path, given)
        return create_engine(config["SQLALCHEMY_DATABASE_URI"], **config["SQLALCHEMY_ENGINE_OPTIONS"]).pool

    assert pool().size() == 10
    assert pool(pool_size=3).size() == 3
    assert isinstance(pool(poolclass=NullPool), NullPool)


def test_an_explicit_sqlalchemy_uri_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://db/production")
    config = load(tmp_path, {"SQLALCHEMY_DATABASE_URI": "sqlite:///mine.sqlite"})
    assert config["SQLALCHEMY_DATABASE_URI"] == f"sqlite:///{tmp_path / 'mine.sqlite'}"
    assert config["DATABASE_IS_EMBEDDED"] is False


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", True), ("TRUE", True), ("yes", True), ("on", True), ("0", False), ("False", False), ("no", False)],
)
def test_a_boolean_is_written_in_many_ways(tmp_path: Path, text: str, value: bool) -> None:
    assert load(tmp_path, {"WORKERS_ENABLED": text})["WORKERS_ENABLED"] is value


NO_ADDRESSES = [
    "shop",
    "@example.com",
    "shop@",
    "a@b\nBcc: c@d",
    "Shop <a@b>",
    "a@b, c@d",
    "a@b..c",
    "ä@b",
    "a@ä",
    " ",
    5,
]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("WORKERS_ENABLED", "maybe", "true or false"),
        ("WORKERS_HEARTBEAT_SECONDS", "nan", "a number of seconds from 0.01"),
        ("WORKERS_HEARTBEAT_SECONDS", "1e-300", "a number of seconds from 0.01"),
        ("WORKERS_LEASE_SECONDS", "inf", "a number of seconds from 0.5"),
        ("WORKERS_LEASE_SECONDS", 0.4, "a number of seconds from 0.5"),
        ("WORKERS_SHUTDOWN_SECONDS", -1, "a number of seconds above 0"),
        ("WORKERS_HISTORY_DAYS", 0, "a number of days above 0"),
        ("PASSIVE_AFTER_DAYS", "a month", "a number of days above 0"),
        ("PASSIVE_AFTER_DAYS", 1e12, "at most 36500"),
        ("PASSIVE_AFTER_DAYS", True, "a number of days above 0"),
        ("PASSIVE_AFTER_DAYS", None, "a number of days above 0"),
        ("WORKERS_THREADS", 2.5, "a whole number from 1 to 1000"),
        ("LOG_LEVEL", "loud", "DEBUG, INFO"),
        *(("MAIL_FROM", value, "one e-mail address in ASCII") for value in NO_ADDRESSES),
    ],
)
def test_a_wrong_value_is_refused_with_key_value_expectation_and_remedy(
    tmp_path: Path, name: str, value: Any, expected: str
) -> None:
    with pytest.raises(InvalidConfig) as raised:
        load(tmp_path, {name: value})
    message = str(raised.value)
    assert message.startswith(f"{name} is {value!r}; expected ")
    assert expected in message
    assert "instance/config.py" in message


@pytest.mark.parametrize(
    "url", ["mysql://shop:hunter2@db/shop", "hunter2 is no URL", "postgresql+other://shop:hunter2@db/shop"]
)
def test_a_database_url_is_refused_without_showing_its_password(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidConfig, match=r"DATABASE_URL .*expected postgresql://") as raised:
        load(tmp_path, {"DATABASE_URL": url})
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("url", ["sqlite:///file::memory:", "sqlite:///file:x?uri=true"])
def test_a_sqlite_database_that_connections_cannot_share_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidConfig, match="expected the path of a plain file"):
        load(tmp_path, {"DATABASE_URL": url})


@pytest.mark.parametrize("url", ["sqlite://shop.sqlite", "sqlite://tmp/shop.sqlite"])
def test_a_sqlite_url_of_two_slashes_does_not_become_a_temporary_database(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidConfig, match="expected three slashes"):
        load(tmp_path, {"DATABASE_URL": url})


@pytest.mark.parametrize(
    "url",
    [
        "smtp://mail.example.com",
        "smtp://mail:2525/",
        "smtps://shop:hunter%402@mail.example.com",
        "smtp+starttls://shop:hunter2@[::1]:587",
        "SMTP://127.0.0.1",
    ],
)
def test_a_valid_mail_url_is_kept_as_it_is(tmp_path: Path, url: str) -> None:
    assert load(tmp_path, {"MAIL_URL": url, "MAIL_FROM": "the-shop+1@mail.example.com"})["MAIL_URL"] == url


@pytest.mark.parametrize(
    "url",
    [
        "hunter2",
        "mail.example.com:25",
        "http://shop:hunter2@mail",
        "smtp:/mail",
        "smtp://",
        "smtp://:25",
        "smtp://shop:hunter2@",
        "smtp://shop@mail",
        "smtp://:hunter2@mail",
        "smtp://shop:@mail",
        "smtp://@mail",
        "smtp://shop:hünter2@mail",
        "smtp://shop:h%C3%BCnter2@mail",
        "smtp://shop:hunter/2@mail",
        "smtp://shop:12/hunter@mail",
        "smtp://shop:12?hunter@mail",
        "smtp://shop:12#hunter@mail",
        "smtp://mail:0",
        "smtp://mail:70000",
        "smtp://mail:-1",
        "smtp://mail:x",
        "smtp://[::1",
        "smtp://my mail",
        "smtp://mail\n",
        "smtp://mail/path",
        b"smtp://mail",
        25,
    ],
)
def test_a_mail_url_is_refused_without_showing_its_password(tmp_path: Path, url: Any) -> None:
    with pytest.raises(InvalidConfig, match=r"MAIL_URL is a value that is not shown; expected smtp://host,") as raised:
        load(tmp_path, {"MAIL_URL": url})
    assert "nter" not in str(raised.value)


def test_an_empty_secret_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="SECRET_KEY is a value that is not shown; expected a text"):
        load(tmp_path, {"SECRET_KEY": " "})


@pytest.mark.parametrize("name", ["SECRET_KEY", "DATABASE_URL"])
def test_bytes_that_are_not_text_are_refused_without_being_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(os.environb, name.encode(), b"sqlite:///hunter2\xff\xfe")
    with pytest.raises(InvalidConfig, match=f"{name} is a value that is not shown; expected") as raised:
        load(tmp_path)
    assert "nter" not in str(raised.value)


@pytest.mark.parametrize("token", ["", " ", "hunter2 ", "hunter2\n", "hünter2", b"hunter2", 7])
def test_a_token_that_a_header_cannot_carry_is_refused_without_being_shown(tmp_path: Path, token: Any) -> None:
    with pytest.raises(InvalidConfig, match="METRICS_TOKEN is a value that is not shown; expected printable") as raised:
        load(tmp_path, {"METRICS_TOKEN": token})
    assert "nter" not in str(raised.value)


def test_a_misspelled_token_does_not_leave_the_metrics_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METRICS_TOKN", "hunter2")
    with pytest.raises(InvalidConfig, match=r"no setting METRICS_TOKN\. Did you mean METRICS_TOKEN\?"):
        load(tmp_path)


@pytest.mark.parametrize("lease", [4, 3.9])
def test_a_lease_must_outlast_a_late_heartbeat(tmp_path: Path, lease: float) -> None:
    with pytest.raises(InvalidConfig, match=r"more than twice WORKERS_HEARTBEAT_SECONDS \(2\)"):
        load(tmp_path, {"WORKERS_LEASE_SECONDS": lease, "WORKERS_HEARTBEAT_SECONDS": 2})


@pytest.mark.parametrize(("lease", "heartbeat"), [(10, 2), (8, 2), (2, 0.5), (60, 2)])
def test_the_heartbeat_follows_a_shorter_lease(tmp_path: Path, lease: float, heartbeat: float) -> None:
    assert load(tmp_path, {"WORKERS_LEASE_SECONDS": lease})["WORKERS_HEARTBEAT_SECONDS"] == heartbeat


def test_a_misspelled_setting_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidConfig, match="Did you mean WORKERS_THREADS"):
        load(tmp_path, {"WORKERS_THREAD": 3})
    monkeypatch.setenv("WORKERS_ENABLE", "0")
    with pytest.raises(InvalidConfig, match="Did you mean WORKERS_ENABLED"):
        load(tmp_path)


def test_the_secret_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    first = load(tmp_path)["SECRET_KEY"]
    assert len(first) >= 32
    assert load(tmp_path)["SECRET_KEY"] == first
    assert stat.S_IMODE(os.stat(tmp_path / "secret_key").st_mode) == 0o600
    assert os.listdir(tmp_path) == ["secret_key"]


@pytest.mark.promise
def test_processes_that_start_at_once_agree_on_the_secret_key(tmp_path: Path) -> None:
    program = (
        "import os; from multiprocessing import get_context; from flask import Flask; from config import load_config\n"
        f"app = Flask('config', instance_path={str(tmp_path)!r})\n"
        "context = get_context('fork'); barrier = context.Barrier(4)\n"
        "def load():\n"
        "    barrier.wait(); load_config(app, {}); os.write(1, (app.config['SECRET_KEY'] + '\\n').encode())\n"
        "processes = [context.Process(target=load) for _ in range(4)]\n"
        "for process in processes: process.start()\n"
        "for process in processes: process.join()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    keys = done.stdout.split()
    assert len(keys) == 4
    assert len(set(keys)) == 1


def test_an_empty_secret_key_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret_key").touch()
    with pytest.raises(InvalidConfig, match=r"SECRET_KEY is not set and .*secret_key cannot hold a key"):
        load(tmp_path)


def test_a_configured_log_is_left_alone(tmp_path: Path) -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    app = Flask("config", instance_path=str(tmp_path))
    load_config(app, {"LOG_LEVEL": "debug"})
    configure_logging(app)  # pytest has a handler there
    assert (root.level, root.handlers) == before
    assert logging.getLogger("apscheduler").level == logging.WARNING


def test_a_connection_from_before_a_restart_of_postgresql_is_not_given_to_a_request(
    postgresql_url: str, postgresql_server: URL
) -> None:
    app = create_app(settings(postgresql_url))
    with app.app_context():
        db.session.execute(text("SELECT 1"))
        db.session.remove()
        database = db.engine.url.database
        administer(
            postgresql_server, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
        )
        assert db.session.scalar(text("SELECT 2")) == 2
        db.session.remove()
        dispose()


def test_the_release_is_the_commit_that_is_checked_out_unless_it_is_named(tmp_path: Path) -> None:
    repository, commit = tmp_path / ".git", "3f2a91c04d5e6b7a8c9d0e1f2a3b4c5d6e7f8a9b"
    (repository / "refs" / "heads").mkdir(parents=True)
    app = Flask("config", root_path=str(tmp_path), instance_path=str(tmp_path))

    def release(given: dict[str, Any] | None = None) -> str | None:
        load_config(app, given)
        found: str | None = app.config["RELEASE"]
        return found

    assert release() is None
    (repository / "HEAD").write_text(f"{commit}\n")
    assert release() == commit[:12]
    (repository / "HEAD").write_text("ref: refs/heads/main\n")
    (repository / "packed-refs").write_text(f"# pack-refs with: peeled\n{commit} refs/heads/main\n")
    assert release() == commit[:12]
    (repository / "refs" / "heads" / "main").write_text(f"{commit[::-1]}\n")
    assert release() == commit[::-1][:12]
    assert release({"RELEASE": "2026.11"}) == "2026.11"
