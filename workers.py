"""The application's background workers: this is the file to edit."""

import shutil
import time
from datetime import timedelta
from pathlib import Path

from flask import current_app
from sqlalchemy import ScalarSelect, delete, func, select

from background import Bury, Message, MessageWorker, PeriodicWorker, WorkerContext, current_workers
from background.database.tables import is_in
from mail import CAN_WAIT, MAILS, SENT_ONCE, HourlyLimit, Mail, Mailer, MailNotSent, MailRefused
from models import AuditEntry, HealthSample, UserRepository


class PassiveUserCheckerWorker(PeriodicWorker):
    """Set users who have not logged in for 30 days (PASSIVE_AFTER_DAYS) to passive."""

    period = timedelta(minutes=10)
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        context.logger.info("Starting: Setting status of inactive users...")
        users = context.services.get(UserRepository)
        cutoff = context.tick - timedelta(days=current_app.config["PASSIVE_AFTER_DAYS"])

        def after_slice(done: int, total: int, last_id: int) -> None:
            context.cursor = last_id  # the next attempt at this tick goes on from here
            context.progress(done, total)
            context.commit()
            context.raise_if_stopping()

        count = users.update_inactive_user_statuses(cutoff, after_slice, after_id=context.cursor or 0)
        context.logger.info("Set %s users to passive.", f"{count:,}")
        context.logger.info("Completed: Setting status of inactive users...")


class MailWorker(MessageWorker):
    """Send the mails that payloads name: at least once, and always under the same Message-ID.

    The text is made when the mail is sent, so no secret waits in a message. It quotes nothing that a user typed, not
    even the name. Otherwise a visitor could register with a stranger's e-mail, and have the shop send any text.
    """

    topic = "mail"
    batch_size = 1  # a rollback does not undo a mail
    backoff = timedelta(seconds=30)
    max_attempts = 40  # the pauses grow to an hour, so a mail server may be away for a day

    def handle(self, message: Message, context: WorkerContext) -> None:
        payload = message.payload
        kind = next(kind for kind in MAILS if kind in payload)
        if kind in SENT_ONCE and message.key is None:
            current_workers.enqueue(self.topic, payload, key=f"{kind}:{payload[kind]}")
            return
        mail = MAILS[kind](payload[kind], payload, context)
        if mail is None:
            context.logger.warning("%s %s no longer exists: no mail is sent.", kind.capitalize(), payload[kind])
            return
        # "no account" has an e-mail instead of an id, and the log must not contain e-mails.
        about = f"{kind} {payload[kind]}" if isinstance(payload[kind], int) else kind
        limit = HourlyLimit(kind, mail.to)
        if limit.count():
            self._send(mail, limit, about, message, context)
        elif kind in CAN_WAIT:
            current_workers.enqueue(self.topic, payload, delay=limit.remaining)
            context.logger.info("The mail about %s waits: %s", about, _TOO_MANY % limit.most)
        else:
            context.logger.warning("The mail about %s is dropped: %s", about, _TOO_MANY % limit.most)

    def _send(self, mail: Mail, limit: HourlyLimit, about: str, message: Message, context: WorkerContext) -> None:
        mailer = context.services.get(Mailer)
        try:
            place = mailer.send(mail.to, mail.subject, mail.text, key=message.idempotency_key, at=message.enqueued_at)
        except MailRefused as error:
            raise Bury(error) from None
        except (MailNotSent, OSError):  # an OSError of the outbox
            limit.give_back()
            raise
        is_shown = mail.link and not (mailer.has_server or current_app.config["PRODUCTION"])
        link = f" Its link: {mail.link}" if is_shown else ""
        context.logger.info("The mail about %s is at %s.%s", about, place, link)


_TOO_MANY = "its reader got %d of these mails within an hour."


class SystemHealthWorker(PeriodicWorker):
    """Record the database's round trip, the free disk space and the length of the queue every minute."""

    period = timedelta(minutes=1)
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        waiting, dead = context.session.execute(select(_number_of("waiting"), _number_of("dead"))).one()
        began = time.perf_counter()
        context.session.execute(select(1))
        database_ms = (time.perf_counter() - began) * 1000
        disk = shutil.disk_usage(_existing(Path(current_app.instance_path)))
        if disk.free < disk.total * 0.05:
            context.logger.warning("The disk is nearly full: %s MB are free.", f"{disk.free // 10**6:,}")
        sample = HealthSample(
            taken_at=context.tick,
            database_ms=database_ms,
            disk_free_bytes=disk.free,
            messages_waiting=waiting,
            messages_dead=dead,
        )
        context.session.add(sample)
        kept = timedelta(days=current_app.config["WORKERS_HISTORY_DAYS"])
        context.session.execute(delete(HealthSample).where(HealthSample.taken_at < context.tick - kept))


class PruneAuditWorker(PeriodicWorker):
    """Delete the entries of the audit that are older than AUDIT_DAYS."""

    period = timedelta(days=1)
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        kept = timedelta(days=current_app.config["AUDIT_DAYS"])
        context.session.execute(delete(AuditEntry).where(AuditEntry.at < context.tick - kept))


def _number_of(state: str) -> ScalarSelect[int]:
    """Count the messages of that state."""
    return select(func.count()).where(is_in(state)).scalar_subquery()


def _existing(path: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(place for place in (path, *path.parents) if place.exists())
