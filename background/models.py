"""The engine's tables. `BackgroundWorkerManager.init_app` copies them into the application's metadata."""

from sqlalchemy import BigInteger, Column, Float, Index, Integer, MetaData, String, Table, Text

from .clock import UtcDateTime

metadata = MetaData()

_Id = BigInteger().with_variant(Integer, "sqlite")

workers = Table(
    "background_workers",
    metadata,
    Column("name", String(200), primary_key=True),
    # The high-water mark: no tick at or below it is ever claimed (again). Never pruned.
    Column("mark", UtcDateTime),
    # What the mark was before the last claim: the ticks between the two were missed.
    Column("previous_mark", UtcDateTime),
    # Grows by one at every claim. `running` is the token of the claim in force, or NULL.
    Column("token", BigInteger, nullable=False, server_default="0"),
    Column("running", BigInteger),
    # A tick that was lost or handed back and is to be claimed again, before any newer one.
    Column("pending_tick", UtcDateTime),
    Column("pending_attempt", Integer),
    Column("pending_trigger", String(10)),
    # The schedule in force, as text; `declared` is what a release brought, before any `reschedule`, and
    # `declared_by` the instance that wrote it: of two releases at once, the one that stays has the last word.
    Column("schedule", String(200), nullable=False),
    Column("declared", String(200), nullable=False),
    Column("declared_by", String(32)),
    Column("scheduled_at", UtcDateTime, nullable=False),
    Column("paused_at", UtcDateTime),
)

executions = Table(
    "background_executions",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("worker", String(200), nullable=False),
    Column("tick", UtcDateTime, nullable=False),
    # The last tick that a skipped or missed row stands for; `tick` is the first.
    Column("through", UtcDateTime),
    Column("trigger", String(10), nullable=False),
    Column("state", String(12), nullable=False),
    Column("attempt", Integer),
    Column("token", BigInteger),
    Column("instance", String(32)),
    Column("instance_name", String(255)),
    Column("started_at", UtcDateTime),
    Column("finished_at", UtcDateTime),
    Column("progress_done", Float),
    Column("progress_total", Float),
    Column("reason", Text),
    Index("ix_background_executions_worker_tick", "worker", "tick"),
    Index("ix_background_executions_token", "worker", "token", unique=True),
)

instances = Table(
    "background_instances",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("host", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    Column("heartbeat_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Column("signed_off_at", UtcDateTime),
    Column("clock_offset", Float),
)
