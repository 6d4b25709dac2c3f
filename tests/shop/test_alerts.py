"""The shop sends the engine's alerts by its own mailer."""

from collections.abc import Iterator
from datetime import timedelta

import pytest
from support.databases import close
from support.fleet import wait_until
from support.mail_server import MailServer
from support.shop import make_shop

from background import BackgroundWorkerManager
from background.alarms import delivery
from background.alarms.alert import trial


@pytest.fixture
def server() -> Iterator[MailServer]:
    server = MailServer().start()
    yield server
    server.close()


@pytest.fixture
def manager(
    database_url: str, server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[BackgroundWorkerManager]:
    monkeypatch.setattr(delivery.AlertMailWorker, "backoff", timedelta(seconds=0.05))
    config = {"MAIL_URL": server.url(), "MAIL_FROM": "shop@example.com", "ALERT_MAIL": "operator@example.com"}
    app = make_shop(database_url, **config)
    manager: BackgroundWorkerManager = app.extensions["background_workers"]
    manager.add(delivery.AlertMailWorker)  # `make_shop` removed it
    with app.app_context():
        delivery.enqueue(manager, trial(app))
        manager.db.session.commit()
    yield manager
    manager.stop()
    close(app)


def state(manager: BackgroundWorkerManager) -> str:
    """Return the state of the first alert. If it dies, an alert about that follows."""
    return manager.messages.letters("alert_mail")[-1].state


def test_an_alert_reaches_the_mail_server_once_it_takes_mails(
    manager: BackgroundWorkerManager, server: MailServer
) -> None:
    server.trouble = ["451 later", "text 451 later"]
    manager.start()
    wait_until(lambda: state(manager) == "done")
    [mail] = server.mails
    assert server.recipients == [["operator@example.com"]]
    assert mail["Subject"] == "[Bookstore] A test of the alerts"
    assert mail["Message-ID"].startswith("<alert_mail.")
    assert "Nothing is wrong." in mail.get_content()


def test_an_alert_that_the_server_refuses_for_good_is_buried(
    manager: BackgroundWorkerManager, server: MailServer
) -> None:
    server.trouble = ["550 no such user"]
    manager.start()
    wait_until(lambda: state(manager) == "dead")
    assert "[Bookstore] A test of the alerts" not in [mail["Subject"] for mail in server.mails]


def test_the_command_sends_a_test_mail(manager: BackgroundWorkerManager, server: MailServer) -> None:
    done = manager.app.test_cli_runner().invoke(args=["workers", "alerts", "--test"])
    assert done.output == "operator@example.com got the test alert.\n"
    assert len(server.mails) == 1
