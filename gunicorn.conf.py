"""Settings that `gunicorn` reads by itself. Its command line overrules each of them."""

import gc
import os
import signal
import sys
from contextlib import contextmanager

from click import ClickException
from flask.cli import load_dotenv
from flask.helpers import get_load_dotenv
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import BadRequest

# Read `.env` before the first setting that needs it. A restart reads a changed `.env`, but a HUP does not.
if get_load_dotenv():
    load_dotenv()

wsgi_app = "app:create_app()"
workers = int(os.environ.get("WEB_CONCURRENCY", "2"))
# Longer than WORKERS_SHUTDOWN_SECONDS (20): a run may need that long to stop.
graceful_timeout = 30
# Longer than a request may wait for SQLite's write lock (30): killing a worker would also kill its runs.
timeout = 60
# PROXIES names the trusted proxies. By itself gunicorn also trusts every client on this machine or on a socket. A proxy
# there forwards a visitor's own headers SCRIPT_NAME, which goes before every address of a page, and PATH_INFO.
forwarder_headers = ""
secure_scheme_headers = {}
# One line for each request, to standard output. The application hides the tokens of links.
accesslog = "-"


class JsonLogger(Logger):
    """Formats gunicorn's own lines as the application's, for LOG_FORMAT=json."""

    def setup(self, cfg):
        from config import json_formatter

        super().setup(cfg)
        for handler in (*self.error_log.handlers, *self.access_log.handlers):
            handler.setFormatter(json_formatter())


logger_class = JsonLogger if os.environ.get("LOG_FORMAT", "").strip().lower() == "json" else Logger


def report_refusal(kind, error, traceback):
    """Print an error of the engine as one sentence. With --preload the master makes the app before any hook."""
    if isinstance(error, ClickException):
        error.show()
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = report_refusal


def on_starting(server):
    """Report wrong settings once and end, before every gunicorn worker reports them. Warn once of the others.

    A child process checks the settings. A HUP does not reload the modules that the master itself imports.
    """
    checking = os.fork()
    if checking == 0:
        os._exit(check_settings(server))
    if os.waitstatus_to_exitcode(os.waitpid(checking, 0)[1]) == Arbiter.WORKER_BOOT_ERROR:
        sys.exit(Arbiter.WORKER_BOOT_ERROR)


def check_settings(server):
    from flask import Flask

    try:
        from config import load_config
        from production import check

        app = Flask("app", instance_relative_config=True)
        load_config(app)
        for sentence in check(app):
            server.log.warning("%s", sentence)
    except ClickException as error:
        server.log.error("%s", error)
        return Arbiter.WORKER_BOOT_ERROR
    return 0


def post_fork(server, worker):
    """End with one sentence if the engine refuses the application, for example for a worker without a period."""
    make = worker.app.wsgi

    def make_or_end():
        with ending_on_refusal(worker):
            return make()

    worker.app.wsgi = make_or_end


def post_worker_init(worker):
    """Start the background workers after the fork, in each serving process."""
    if manager := background_workers(worker):
        refuse_broken_bodies(worker.wsgi)
        ignore_one_interrupt()
        with ending_on_refusal(worker):
            if beginning := worker.wsgi.extensions.get("production"):
                beginning.begin()
            manager.serve()
    gc.freeze()  # otherwise a full collection walks all imports: no other thread runs for 0.1 s


@contextmanager
def ending_on_refusal(worker):
    """Log an error of the engine as one sentence, and end gunicorn, which would only try again."""
    try:
        yield
    except ClickException as error:
        worker.log.error("%s", error)
        sys.exit(Arbiter.WORKER_BOOT_ERROR)


def worker_abort(worker):
    """Hand back the runs and end, after a request took longer than `timeout`.

    gunicorn calls this within the handler of SIGABRT. A second later the master would kill the process, and its runs
    would count as lost. The kill comes sooner if another process ends meanwhile. `notify` prevents that.
    """
    from background.host.stop_signals import give_up

    worker.notify()
    give_up(f"A request took longer than gunicorn's timeout of {worker.cfg.timeout} s, so this process ends", 0.9)
    os._exit(1)  # gunicorn treats SystemExit as an error of the request, and waits for the client


def worker_exit(server, worker):
    """Stop the background workers, and hand back the runs that do not end in time."""
    if manager := background_workers(worker):
        manager.stop()


def background_workers(worker):
    """Return the manager of the app.

    None in the master, and behind a middleware that hides the app. There the workers start with the first request.
    """
    return getattr(getattr(worker, "wsgi", None), "extensions", {}).get("background_workers")


def refuse_broken_bodies(app):
    """Answer a broken body with 400. gunicorn reads a chunked body, and finds its faults, when the app reads it."""
    app.register_error_handler(ParseException, lambda error: app.handle_http_exception(BadRequest()))


def ignore_one_interrupt():
    """Ignore the first SIGINT after the start.

    A Ctrl-C arrives twice: from the terminal, and from the master as QUIT. The second would cut the stop short.
    """
    quit = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda number, frame: signal.signal(signal.SIGINT, quit))
