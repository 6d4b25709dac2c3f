"""`flask workers ...`."""

from flask.cli import AppGroup

workers_cli = AppGroup("workers", help="See and steer the background workers.")
