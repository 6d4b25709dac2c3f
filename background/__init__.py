"""Background workers that run once per tick, however many processes, machines and releases run them."""

from .context import WorkerContext
from .errors import (
    BackgroundError,
    ClaimLost,
    DatabaseNotReady,
    DuplicateWorker,
    InvalidConfig,
    InvalidLock,
    InvalidSchedule,
    InvalidWorker,
    LockNotAcquired,
    RunStopped,
    UnknownWorker,
)
from .locks import Lock
from .manager import BackgroundWorkerManager, current_workers
from .pruning import PruneHistoryWorker
from .worker import PeriodicWorker

__all__ = [
    "BackgroundError",
    "BackgroundWorkerManager",
    "ClaimLost",
    "DatabaseNotReady",
    "DuplicateWorker",
    "InvalidConfig",
    "InvalidLock",
    "InvalidSchedule",
    "InvalidWorker",
    "Lock",
    "LockNotAcquired",
    "PeriodicWorker",
    "PruneHistoryWorker",
    "RunStopped",
    "UnknownWorker",
    "WorkerContext",
    "current_workers",
]
