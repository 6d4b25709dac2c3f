"""The shop with workers whose pages the dashboard's tests read, also as FLASK_APP."""

import os
import time
from datetime import timedelta
from threading import Semaphore

from flask import Flask
from flask.typing import ResponseReturnValue
from support.fleet import Hourly
from support.shop import make_shop
from werkzeug.wrappers import Response

from background import PeriodicWorker, WorkerContext
from workers import MailWorker, PassiveUserCheckerWorker

steps = Semaphore(0)
STEPS = 4


class CatalogueImport(PeriodicWorker):
    """Take over the catalogues of the publishers."""

    cron = "15 4 * * *"
    catch_up = False

    def do_work(self, context: WorkerContext) -> None:
        for step in range(STEPS):
            context.progress(step * 1000, STEPS * 1000)
            context.commit()
            if not steps.acquire(timeout=30):
                raise TimeoutError("the test allowed no step")


class NewsletterPreview(PeriodicWorker):
    """Render the newsletter, whose length is unknown beforehand."""

    period = timedelta(seconds=1)

    def do_work(self, context: WorkerContext) -> None:
        context.logger.warning("Rendering %s", context.tick)
        second = int(context.tick.timestamp())
        time.sleep(second * 7 % 11 / 100)
        if second % 9 == 0:
            raise ConnectionError("the server of <pictures> did not answer")


class PriceCheck(Hourly):
    """Compare our prices with the prices that the publishers recommend."""

    cron = "30 2 * * *"
    period = None
    timezone = "Europe/Berlin"


class StockCount(Hourly):
    """Count the books on the shelves."""

    period = timedelta(minutes=30)

    def do_work(self, context: WorkerContext) -> None:
        context.logger.warning("Counted")


WORKERS = (CatalogueImport, NewsletterPreview, PriceCheck, StockCount, PassiveUserCheckerWorker)


def create_app(database_url: str | None = None) -> Flask:
    """Return the shop, which only serves until its manager is started."""
    config = {"WTF_CSRF_ENABLED": True, "WORKERS_ENABLED": False, "RATELIMIT_ENABLED": False}
    patient = {"WORKERS_LEASE_SECONDS": 60}  # beside a browser, a heartbeat may be late
    app = make_shop(database_url or os.environ["DATABASE_URL"], *WORKERS, MailWorker, **config, **patient)
    app.after_request(_strict)
    return app


def _strict(response: Response) -> ResponseReturnValue:
    response.headers.setdefault("Content-Security-Policy", "default-src 'self'; img-src 'self' data:")
    return response
