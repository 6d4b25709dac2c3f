"""The Dockerfile's instructions, executed one by one in a root file system of their own."""

import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.image import Image, build
from support.processes import ROOT, WITHOUT_WARNINGS, copy_project, eventually

PRIVATE = (".env", "instance/secret_key", "instance/bookstore.sqlite", "shop.sqlite-wal", "tests/x.pyc")


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """Give the files of a clone, and files that must not get into an image."""
    copy_project(tmp_path)
    for name in PRIVATE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("private")
    return tmp_path


def test_the_dockerfile_makes_an_image_that_serves_without_root_and_without_writable_files(
    context: Path, empty_postgresql_url: str
) -> None:
    settings = WITHOUT_WARNINGS | {"DATABASE_URL": empty_postgresql_url}
    with contextmanager(build)(context / "deploy" / "Dockerfile", context, RELEASE="abc123") as image:
        assert_it_holds_what_the_shop_needs_and_no_more(image)
        prepared = image.run("flask db upgrade && flask init-db --admin you@example.org", **settings)
        assert "The admin is you@example.org" in prepared
        assert image.run("id -u && touch /app/x || echo refused").split() == ["10001", "refused"]
        assert_it_serves_and_stops(image, settings)
        assert_without_settings_it_writes_to_its_instance_folder(image)


def assert_it_holds_what_the_shop_needs_and_no_more(image: Image) -> None:
    application = {path.name for path in image.file("/app").iterdir()} - {"__pycache__", ".dockerignore"}
    modules = {path.name for path in ROOT.glob("*.py")}
    folders = {"background", "migrations", "static", "templates", "instance"}
    assert application == modules | folders | {"requirements.txt", "requirements.lock", "LICENSE"}
    assert not list(image.file("/app/instance").iterdir())
    packages = {path.name for path in image.file("/venv").glob("lib/python*/site-packages/*")}
    assert {"flask", "gunicorn", "psycopg"} < packages
    assert not {"pytest", "_pytest"} & packages


def assert_it_serves_and_stops(image: Image, settings: dict[str, str]) -> None:
    with image.started(**settings) as shop:
        shop.wait_for("joined with", times=2)
        assert eventually(lambda: image.beside(shop, *image.check) == 0), shop.output
        assert image.beside(shop, "touch", "/tmp/x") == 1  # this file system is read-only
        assert "ERROR" not in shop.output
        assert "WARNING" not in shop.output
        shop.signal(signal.SIGTERM)
        assert shop.wait() == 0, shop.output
        assert shop.output.count(" left") == 2, shop.output
    code = subprocess.run(["unshare", "--net", *image.check], env=image.env, capture_output=True).returncode
    assert code == 1, "the health check passes where no shop answers"


def assert_without_settings_it_writes_to_its_instance_folder(image: Image) -> None:
    volume = 'mount -t tmpfs -o uid=10001,gid=10001,mode=700 tmpfs "$ROOT/app/instance"\n'
    with image.started(volume) as shop:
        shop.wait_for("joined with", times=2)
        written = {path.name for path in Path(f"/proc/{shop.pid}/root/app/instance").iterdir()}
        assert {"bookstore.sqlite", "bookstore.sqlite-wal", "bookstore.sqlite-instances", "secret_key"} < written
