"""The application's background workers: this is the file to edit."""

from datetime import timedelta

from flask import current_app

from background import PeriodicWorker, WorkerContext
from models import UserRepository


class PassiveUserCheckerWorker(PeriodicWorker):
    """Set users who have not logged in for 30 days (PASSIVE_AFTER_DAYS) to passive."""

    period = timedelta(minutes=10)

    def do_work(self, context: WorkerContext) -> None:
        context.logger.info("Starting: Setting status of inactive users...")
        users = context.services.get(UserRepository)
        cutoff = context.tick - timedelta(days=current_app.config["PASSIVE_AFTER_DAYS"])

        def after_slice(done: int, total: int) -> None:
            context.progress(done, total)
            context.commit()
            context.raise_if_stopping()

        count = users.update_inactive_user_statuses(cutoff, after_slice)
        context.logger.info("Set %s users to passive.", f"{count:,}")
        context.logger.info("Completed: Setting status of inactive users...")
