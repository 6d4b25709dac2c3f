"""The message workers that send alerts. Each topic has a thread of its own, so hung runs cannot hold an alert back."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from flask import Flask

from ..context import WorkerContext
from ..errors import InvalidConfig
from ..manager import BackgroundWorkerManager, the_manager
from ..messages.message import Message
from ..worker import MessageWorker
from .alert import subject_line, text
from .webhook import post


class AlertMailWorker(MessageWorker):
    """Sends alerts to ALERT_MAIL. Alerts that wait at the same time for one reader become one mail."""

    topic = "alert_mail"
    backoff = timedelta(seconds=10)
    max_attempts = 30  # for about a day

    def handle_many(self, messages: Sequence[Message], context: WorkerContext) -> None:
        """Send one mail to each reader, and commit each one by itself. So one bad address repeats no other mail."""
        errors: list[Exception] = []
        for to in dict.fromkeys(message.payload["to"] for message in messages):
            ours = [message for message in messages if message.payload["to"] == to]
            alerts = [message.payload["alert"] for message in ours]
            try:
                send_mail(the_manager(), to, alerts, ours[0].idempotency_key, ours[0].enqueued_at)
            except Exception as error:
                errors.append(error)
                context.session.rollback()
            else:
                context.handled(*ours)  # type: ignore[attr-defined]  # the context of a message worker has it
                context.commit()
        if errors:
            raise errors[0]


class AlertWebhookWorker(MessageWorker):
    """Sends alerts to ALERT_WEBHOOK."""

    topic = "alert_webhook"
    batch_size = 1
    backoff = timedelta(seconds=10)
    max_attempts = 30

    def handle(self, message: Message, context: WorkerContext) -> None:
        send_webhook(the_manager(), message.payload["alert"])


TOPICS = frozenset({AlertMailWorker.topic, AlertWebhookWorker.topic})
"""Only the engine knows the payloads of these topics."""


def channels(app: Flask) -> list[type[MessageWorker]]:
    """Return the workers of the channels that the settings name."""
    named = {"ALERT_MAIL": AlertMailWorker, "ALERT_WEBHOOK": AlertWebhookWorker}
    return [worker for setting, worker in named.items() if app.config[setting]]


def enqueue(manager: BackgroundWorkerManager, alert: Mapping[str, Any]) -> None:
    """Enqueue the alert for each channel and reader, on the session of the current app context."""
    for to in manager.app.config["ALERT_MAIL"] or ():
        manager.enqueue(AlertMailWorker.topic, {"to": to, "alert": alert})
    if manager.app.config["ALERT_WEBHOOK"]:
        manager.enqueue(AlertWebhookWorker.topic, {"alert": alert})


def send_webhook(manager: BackgroundWorkerManager, alert: Mapping[str, Any]) -> None:
    """Send the alert to ALERT_WEBHOOK. Raises AlertNotSent, and InvalidConfig if the settings have no webhook."""
    config = manager.app.config
    if not config["ALERT_WEBHOOK"]:
        raise InvalidConfig("ALERT_WEBHOOK is no longer set, and an alert waits; expected an address: set it.")
    post(config["ALERT_WEBHOOK"], config["ALERT_WEBHOOK_SECRET"], alert)


def send_mail(
    manager: BackgroundWorkerManager, to: str, alerts: Sequence[Mapping[str, Any]], key: str, at: datetime
) -> None:
    """Send the alerts in one mail by the application's function. Raises its errors, and InvalidConfig without one."""
    refuse_missing_mailer(manager)
    assert manager.send_mail is not None  # noqa: S101 - for the type checker
    manager.send_mail(to, subject_line(alerts), text(alerts), key, at)


def refuse_missing_mailer(manager: BackgroundWorkerManager) -> None:
    """Raise InvalidConfig if alerts go by mail, and the application has no function that sends one."""
    if manager.app.config["ALERT_MAIL"] and manager.send_mail is None:
        raise InvalidConfig(
            "ALERT_MAIL is set, and the application has no function that sends mails; expected one. Write "
            "`workers.send_mail = send_mail` in create_app, with send_mail(to, subject, text, key, at)."
        )
