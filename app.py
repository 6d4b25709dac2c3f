"""Application factory: a table of contents of the application."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import svcs
from flask import Flask
from flask_migrate import Migrate

import audit
import books
import demo
import hosts
import production
import routes
import security_log
from background import BackgroundWorkerManager, PruneHistoryWorker
from background.monitoring.health import health
from background.monitoring.metrics import metrics
from config import StrictJSON, configure_logging, hide_refused_rows, load_config
from mail import Mailer, send_alert
from migrations import schema
from models import UserRepository, db
from workers import MailWorker, PassiveUserCheckerWorker, PruneAuditWorker, SystemHealthWorker


def create_app(config: Mapping[str, Any] | object | None = None) -> Flask:
    """Make the application. `config` is a mapping, an object, or None (environment and instance/config.py)."""
    app = Flask(__name__, instance_relative_config=True)
    app.json_provider_class = StrictJSON  # Flask-Security makes a provider from the class
    app.json = StrictJSON(app)
    load_config(app, config)
    configure_logging(app)
    hosts.trust_proxies(app)
    hosts.guard(app)

    db.init_app(app)
    hide_refused_rows(app, db)
    Migrate(app, db, directory=str(Path(app.root_path) / "migrations"))

    svcs.flask.init_app(app)
    outbox = Path(app.instance_path) / "outbox"
    mail = app.config["MAIL_URL"], app.config["MAIL_FROM"], outbox, app.config["APP_NAME"]
    svcs.flask.register_factory(app, UserRepository, lambda: UserRepository(db.session))
    svcs.flask.register_factory(app, Mailer, lambda: Mailer(*mail))

    workers = BackgroundWorkerManager(app, db)
    workers.send_mail = send_alert
    production.insist(app, workers)
    workers.before_start(demo.ensure_ready, check=schema.check)
    workers.before_start(production.refuse_data)
    workers.add(PassiveUserCheckerWorker)
    workers.add(MailWorker)
    workers.add(SystemHealthWorker)
    workers.add(PruneHistoryWorker)
    workers.add(PruneAuditWorker)

    routes.register(app)
    books.register(app, workers)
    app.register_blueprint(health())
    app.register_blueprint(metrics(security_log.figures))
    demo.register_commands(app)
    security_log.register(app)
    audit.register(app, {routes.admins_only, routes.viewers_too})

    workers.start_under_flask_run()
    return app
