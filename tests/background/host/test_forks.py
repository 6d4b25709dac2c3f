"""Forked children: the locks that they inherit are free."""

import os
import signal
import threading
from typing import Any

import pytest
from sqlalchemy import create_engine

from background.database.connections import made_once
from background.database.dialects import sqlite_files
from background.database.dialects.open_transactions import OpenTransactions
from background.database.outages import Outages

LOCKS = {
    "of open transactions": OpenTransactions(create_engine("sqlite://"))._changing,
    "of outages": Outages()._counting,
    "of SQLite's files": sqlite_files._adding,
    "of what is made once": made_once._making,
}


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("lock", LOCKS.values(), ids=LOCKS)
def test_a_forked_child_takes_a_lock_that_another_thread_of_its_parent_holds(lock: Any) -> None:
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            forked.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(5)  # a child that waits for the lock ends by this signal
        with lock:
            os._exit(0)
    forked.set()
    holder.join()
    assert os.waitpid(child, 0)[1] == 0
