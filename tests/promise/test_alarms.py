"""Alarms that are started for real: each says what it should, on the page, in the terminal, by mail and by webhook.

    pytest -s tests/promise/test_alarms.py

prints the table of docs/operating.md.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from sqlalchemy import URL
from support.alert_receiver import SECRET, Receiver
from support.databases import administer, reload, text
from support.fleet import make_tables
from support.mail_server import MailServer
from support.processes import PATIENCE, Process, environment, eventually, flask, gunicorn, run, started
from support.servers import PostgreSQL

SHOP = """
import os
from datetime import timedelta
from pathlib import Path

from background import MessageWorker, PeriodicWorker
from mail import Mailer
from support.fleet import from_environment


class Baker(PeriodicWorker):
    period = timedelta(seconds=2)

    def do_work(self, context):
        if Path(os.environ["BROKEN"]).exists():
            raise ValueError("no flour")


class Delivery(MessageWorker):
    topic = "delivery"
    max_attempts = 1

    def handle(self, message, context):
        raise ValueError("no such street")


def create_app():
    app = from_environment(Baker, Delivery)
    mailer = Mailer(os.environ["MAIL_URL"], "shop@example.com", Path("/nowhere"))
    app.extensions["background_workers"].send_mail = mailer.send
    return app
"""

DEFAULTS = {"WORKERS_HEARTBEAT_SECONDS": 2, "WORKERS_LEASE_SECONDS": 10}


class Street:
    """A fleet of two processes, a web process, and the receivers of its alarms."""

    def __init__(self, url: URL, folder: Path, stack: ExitStack) -> None:
        self.database_url, self._stack, self.broken = text(url), stack, folder / "broken"
        make_tables(self.database_url)
        (folder / "street.py").write_text(SHOP)
        self.mail, self.webhook, self.pings = MailServer().start(), Receiver(), Receiver()
        for each in (self.mail, self.webhook, self.pings):
            stack.callback(each.close)
        more = {
            **DEFAULTS,
            "FLASK_APP": "street",
            "BROKEN": self.broken,
            "MAIL_URL": self.mail.url(),
            "ALERT_MAIL": "operator@example.com",
            "ALERT_WEBHOOK": self.webhook.url,
            "ALERT_WEBHOOK_SECRET": SECRET,
            "PING_URL": f"{self.pings.url}/{{worker}}",
        }
        self.environment = environment(self.database_url, **more)
        self.environment["PYTHONPATH"] = os.pathsep.join((str(folder), self.environment["PYTHONPATH"]))
        self.processes = [self.start(), self.start()]
        web = self.environment | {"WORKERS_ENABLED": "false"}
        server = stack.enter_context(started(gunicorn("--threads", "4", "street:create_app()"), web))
        self.url = server.wait_for(r"Listening at: (http://\S+)")[1]

    def start(self) -> Process:
        process = self._stack.enter_context(started(flask("workers", "run"), self.environment))
        process.wait_for("joined")
        return process

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urlopen(f"{self.url}{path}", timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    def page(self, *words: str) -> bool:
        return all(each in self.get("/workers/")[1] for each in words)

    def terminal(self, command: str, *words: str) -> bool:
        output = run(flask(*command.split()), self.environment)[1]
        return all(each in output for each in words)

    def probe(self, check: str) -> bool:
        status, answer = self.get("/health/workers")
        return status == 503 and f'"{check}":{{' in answer.replace(" ", "").replace("\n", "")

    def has_mail(self, title: str) -> bool:
        return any(title in each["Subject"] for each in self.mail.mails)

    def has_posted(self, title: str) -> bool:
        return any(each.is_signed and each.body["data"]["title"] == title for each in self.webhook.got)

    def has_pinged(self, path: str, since: float) -> bool:
        return any(each.path == path and each.at > since for each in self.pings.got)

    def has_stopped_pinging(self) -> bool:
        """Return whether two periods are over without a ping of a success."""
        return time.monotonic() - max(each.at for each in self.pings.got if each.path == "/baker") > 4


COLUMNS = ("page", "terminal", "probe", "mail", "webhook", "ping")
ENDS = "The worker baker is no longer failing"


def noticed(since: float, **looks: Callable[[], Any]) -> dict[str, float]:
    """Return after how many seconds each look became true. The looks run side by side."""
    found: dict[str, float] = {}

    def watch(name: str, look: Callable[[], Any]) -> None:
        if eventually(look, pause=0.2):
            found[name] = time.monotonic() - since

    threads = [threading.Thread(target=watch, args=each) for each in looks.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.keys() == looks.keys()
    return found


def fail(street: Street) -> dict[str, float]:
    began = time.monotonic()
    street.broken.touch()
    title = "The worker baker is failing"
    found = noticed(
        began,
        page=lambda: street.page(title, "ValueError: no flour"),
        terminal=lambda: street.terminal("workers alerts", title),
        mail=lambda: street.has_mail(title),
        webhook=lambda: street.has_posted(title),
        ping=lambda: street.has_pinged("/baker/fail", began),
    )
    street.broken.unlink()
    assert eventually(lambda: street.has_mail(ENDS) and street.has_posted(ENDS))
    return found


def die(street: Street) -> dict[str, float]:
    began, title = time.monotonic(), "Messages of the topic delivery died"
    code, output = run(flask("messages", "enqueue", "delivery", "5"), street.environment)
    assert code == 0, output
    return noticed(
        began,
        page=lambda: street.page(title, "ValueError: no such street"),
        terminal=lambda: street.terminal("workers alerts", title),
        mail=lambda: street.has_mail(title),
        webhook=lambda: street.has_posted(title),
    )


def kill(street: Street) -> tuple[dict[str, float], dict[str, float]]:
    """Kill all workers, wait for the alarms, and start a worker. Return what came before and after this start."""
    began, title = time.monotonic(), "No instance was alive"
    for process in street.processes:
        process.signal(signal.SIGKILL)
    found = noticed(
        began,
        page=lambda: street.page("No instance has been alive since"),
        terminal=lambda: street.terminal("workers check", "No instance has been alive since"),
        probe=lambda: street.probe("instances"),
        ping=street.has_stopped_pinging,
    )
    assert not street.has_mail(title)
    restarted = time.monotonic()
    street.processes = [street.start()]
    after = noticed(restarted, mail=lambda: street.has_mail(title), webhook=lambda: street.has_posted(title))
    assert eventually(lambda: not street.page("No instance has been alive since"))
    return found, after


def turn_read_only(street: Street, server: PostgreSQL) -> tuple[dict[str, float], dict[str, float]]:
    began, mails = time.monotonic(), len(street.mail.mails)
    turn(server, "SET default_transaction_read_only = on")
    try:
        found = noticed(
            began,
            page=lambda: street.page("No instance has been alive since"),
            terminal=lambda: street.terminal("workers check", "No instance has been alive since"),
            probe=lambda: street.probe("write"),
            ping=street.has_stopped_pinging,
        )
    finally:
        back = time.monotonic()
        turn(server, "RESET default_transaction_read_only")
    after = noticed(
        back,
        mail=lambda: any("No instance was alive" in each["Subject"] for each in street.mail.mails[mails:]),
        webhook=lambda: street.webhook.titles().count("No instance was alive") == 2,
    )
    return found, after


def turn(server: PostgreSQL, setting: str) -> None:
    administer(server.url, f"ALTER SYSTEM {setting}")
    reload(server.url)


def test_each_alarm_is_noticed_on_the_page_in_the_terminal_and_by_alert(tmp_path: Path) -> None:
    server = PostgreSQL(make_tables)
    with ExitStack() as stack:
        stack.callback(server.close)
        street = Street(server.database(), tmp_path, stack)
        assert eventually(lambda: "/baker" in street.pings.paths())
        rows = {"a worker fails three times": fail(street), "a message dies": die(street)}
        killed, after_kill = kill(street)
        read_only, after_read_only = turn_read_only(street, server)
    rows["all workers are killed"], rows["the database is read-only"] = killed, read_only
    later = {"all workers are killed": after_kill, "the database is read-only": after_read_only}
    print_table(rows, later)
    lease, look, period, busy = 10, 15, 2, 30
    assert max(rows["a worker fails three times"].values()) < 3 * period + look + busy
    assert max(rows["a message dies"].values()) < look + busy
    assert max(killed.values()) < lease + busy
    assert max(read_only.values()) < lease + busy
    assert max(after_kill.values()) < busy
    assert max(after_read_only.values()) < busy


def print_table(rows: dict[str, dict[str, float]], later: dict[str, dict[str, float]]) -> None:
    print("\n| problem |", " | ".join(COLUMNS), "|\n|" + "---|" * (len(COLUMNS) + 1))
    for name, found in rows.items():
        cells = {each: f"{seconds:.0f} s" for each, seconds in found.items()}
        cells |= {each: f"{seconds:.0f} s after the end" for each, seconds in later.get(name, {}).items()}
        print(f"| {name} |", " | ".join(cells.get(each, "-") for each in COLUMNS), "|")
