"""`gunicorn` reads this file by itself; every line can be overruled on its command line."""

import os

wsgi_app = "app:create_app()"
workers = int(os.environ.get("WEB_CONCURRENCY", "2"))
# Longer than WORKERS_SHUTDOWN_SECONDS (20): a run that is told to stop may need that long.
graceful_timeout = 30


def post_worker_init(worker):
    """Start the background workers after the fork, in each serving process."""
    worker.wsgi.extensions["background_workers"].serve()


def worker_exit(server, worker):
    """Stop them, and hand back what does not end in time."""
    if worker.booted or getattr(worker, "wsgi", None):
        worker.wsgi.extensions["background_workers"].stop()
