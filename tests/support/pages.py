"""Pages of the dashboard in a test: their text, and message workers to show."""

import re
from html import unescape

from flask.testing import FlaskClient

from background import Message, MessageWorker, WorkerContext


class Counting(MessageWorker):
    topic = "orders"

    def handle(self, message: Message, context: WorkerContext) -> None:
        pass


class Mailing(Counting):
    topic = "mail"


def page(client: FlaskClient, path: str, status: int = 200) -> str:
    response = client.get(path)
    assert response.status_code == status, path
    return response.text


def said(text: str) -> str:
    """Return the text of the page without its markup."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", text))).strip()
