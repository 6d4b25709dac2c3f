"""Background workers that run once per tick, however many processes, machines and releases run them."""

from .host import dependencies  # noqa: F401 - refuses a missing package with one sentence

# isort: split
from .alarms.attach import attach
from .cli import messages_cli, workers_cli
from .context import WorkerContext
from .database.clock import UtcDateTime
from .database.migrations import include_object, migrate_to, render_item
from .errors import (
    BackgroundError,
    Bury,
    ClaimLost,
    CommitFirst,
    DatabaseNotReady,
    DryRunCommits,
    DuplicateWorker,
    InvalidConfig,
    InvalidCursor,
    InvalidLock,
    InvalidMessage,
    InvalidMigration,
    InvalidProgress,
    InvalidSchedule,
    InvalidWorker,
    LockNotAcquired,
    MissingDependency,
    NotFenced,
    RunStopped,
    UnknownMessage,
    UnknownTopic,
    UnknownWorker,
    WrongState,
)
from .ledger.locks import Lock
from .manager import BackgroundWorkerManager, current_workers
from .messages.later import Later
from .messages.message import Message
from .pruning import PruneHistoryWorker
from .runs.fence import RunFields
from .worker import MessageWorker, PeriodicWorker

__all__ = [
    "BackgroundError",
    "BackgroundWorkerManager",
    "Bury",
    "ClaimLost",
    "CommitFirst",
    "DatabaseNotReady",
    "DryRunCommits",
    "DuplicateWorker",
    "InvalidConfig",
    "InvalidCursor",
    "InvalidLock",
    "InvalidMessage",
    "InvalidMigration",
    "InvalidProgress",
    "InvalidSchedule",
    "InvalidWorker",
    "Later",
    "Lock",
    "LockNotAcquired",
    "Message",
    "MessageWorker",
    "MissingDependency",
    "NotFenced",
    "PeriodicWorker",
    "PruneHistoryWorker",
    "RunFields",
    "RunStopped",
    "UnknownMessage",
    "UnknownTopic",
    "UnknownWorker",
    "UtcDateTime",
    "WorkerContext",
    "WrongState",
    "current_workers",
    "include_object",
    "migrate_to",
    "render_item",
]

BackgroundWorkerManager.commands = (workers_cli, messages_cli)
BackgroundWorkerManager.parts = (attach,)
