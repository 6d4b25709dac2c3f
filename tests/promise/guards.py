"""The guards of the promise, each with the edits that remove it and the tests that notice. See mutations.py."""

from collections.abc import Sequence
from typing import NamedTuple


class Edit(NamedTuple):
    file: str
    before: str
    after: str
    times: int = 1


class Mutation(NamedTuple):
    guard: str
    edits: Sequence[Edit]
    tests: Sequence[str]


MUTATIONS = (
    Mutation(
        "a tick is claimed above the mark only",
        [
            Edit(
                "background/ledger/statements.py",
                "_is_open = or_(workers.c.mark.is_(None), workers.c.mark < _tick)",
                "_is_open = true()",
            )
        ],
        ["tests/background/ledger/test_ledger.py", "-k", "mark or claim_that_comes_after"],
    ),
    Mutation(
        "a run with a request to cancel it does not succeed",
        [
            Edit(
                "background/ledger/ledger.py",
                'case((is_cancelled, "cancelled"), else_=outcome["state"])',
                'outcome["state"]',
            )
        ],
        ["tests/background/runs/test_cancelling.py", "-k", "comes_before_its_last_commit"],
    ),
    Mutation(
        "a cancelled tick does not become pending",
        [Edit("background/ledger/ledger.py", ' and state != "cancelled":', ":")],
        ["tests/background/runs/test_cancelling.py", "-k", "gone_instance"],
    ),
    Mutation(
        "a cancelled run that returns has not succeeded",
        [
            Edit(
                "background/runs/execution.py",
                "        if self.is_cancelled:  # the run may",
                "        if False:  # the",
            ),
            Edit(
                "background/ledger/ledger.py",
                '        if state == "cancelled":\n            raise',
                "        if False:\n            raise",
            ),
        ],
        ["tests/background/runs/test_cancelling.py", "-k", "asked_to_stop_and_its_tick and Returning"],
    ),
    Mutation(
        "a cancelled run that does not end can no longer commit",
        [
            Edit(
                "background/runs/execution.py",
                '        context.lose(f"it was cancelled, and',
                '        str(f"it was cancelled, and',
            )
        ],
        ["tests/background/runs/test_cancelling.py", "-k", "told_apart"],
    ),
    Mutation(
        "a request to cancel names one claim",
        [Edit("background/ledger/controls.py", "            self._ledger.check(claim, connection)\n", "")],
        ["tests/background/runs/test_cancelling.py", "-k", "handed_over or too_late"],
    ),
    Mutation(
        "a request to cancel does not wait for SQLite's write lock",
        [
            Edit(
                "background/manager.py",
                "                self.stores.leases.cancel(claim.instance, claim.id, by)",
                "                pass",
            )
        ],
        ["tests/background/runs/test_cancelling.py", "-k", "holds_the_write_lock"],
    ),
    Mutation(
        "a failed tick is not tried again before its backoff",
        [
            Edit(
                "background/database/tables.py",
                "and_(workers.c.pending_after <= now(), workers.c.pending_until > now())",
                "workers.c.pending_until > now()",
            )
        ],
        ["tests/background/runs/test_retries.py", "-k", "after_the_backoff"],
    ),
    Mutation(
        "a failed tick is not tried again once the next tick is due",
        [
            Edit(
                "background/database/tables.py",
                "and_(workers.c.pending_after <= now(), workers.c.pending_until > now())",
                "workers.c.pending_after <= now()",
            )
        ],
        ["tests/background/runs/test_retries.py", "-k", "at_the_next_tick"],
    ),
    Mutation(
        "a failed tick does not delay the next tick",
        [
            Edit(
                "background/ledger/statements.py",
                "or_(workers.c.pending_tick.is_(None), and_(is_retry, workers.c.pending_until <= now()))",
                "workers.c.pending_tick.is_(None)",
            )
        ],
        ["tests/background/runs/test_retries.py", "-k", "at_the_next_tick"],
    ),
    Mutation(
        "a lost tick is never dropped for the next tick",
        [
            Edit(
                "background/database/tables.py",
                "_is_until_later = workers.c.pending_until > workers.c.pending_tick",
                "_is_until_later = workers.c.pending_until.is_not(None)",
            )
        ],
        ["tests/background/runs/test_retries.py", "-k", "older_release_left"],
    ),
    Mutation(
        "a run that an older release requested is never dropped for the next tick",
        [
            Edit(
                "background/database/tables.py",
                'and_(_is_until_later, func.coalesce(workers.c.pending_trigger, "schedule") != "manual")',
                "_is_until_later",
            )
        ],
        ["tests/background/runs/test_retries.py", "-k", "requested_by_an_older_release"],
    ),
    Mutation(
        "a cursor is stored by the commit of its own session only",
        [
            Edit(
                "background/runs/execution.py",
                "cursor = self.new_cursor if session is self.session else {}",
                "cursor = self.new_cursor",
            )
        ],
        ["tests/background/runs/test_cursor.py", "-k", "own_session"],
    ),
    Mutation(
        "a rollback takes a cursor back",
        [Edit("background/runs/fence.py", "        run.rolled_back(session)", "        pass")],
        ["tests/background/runs/test_cursor.py", "-k", "takes_the_cursor_back"],
    ),
    Mutation(
        "a cursor outlives an attempt that committed none",
        [Edit("background/ledger/ledger.py", ".where(*same, executions.c.cursor.is_not(None))", ".where(*same)")],
        ["tests/background/runs/test_cursor.py", "-k", "outlives"],
    ),
    Mutation(
        "the cursor of a tick that will run again is not pruned",
        [Edit("background/pruning.py", ", or_(~_has_cursor, ~_goes_on))", ")")],
        ["tests/background/runs/test_cursor.py", "-k", "pruning_spares"],
    ),
    Mutation(
        "nothing is committed into a SQLite file that was replaced",
        [
            Edit(
                "background/database/dialects/sqlite_files.py",
                '    event.listen(engine, "commit", _refuse_commit)\n',
                "",
            )
        ],
        ["tests/background/database/dialects/test_sqlite_files.py", "-k", "commits_nothing"],
    ),
    Mutation(
        "no connection to a SQLite file that was replaced is used again",
        [
            Edit(
                "background/database/dialects/sqlite_files.py",
                '    event.listen(engine, "checkout", _renew)\n',
                "",
            )
        ],
        ["tests/background/database/dialects/test_sqlite_files.py", "-k", "goes_on_in_the_new_file"],
    ),
    Mutation(
        "a commit checks the claim",
        [Edit("background/ledger/ledger.py", "held = in_force(claim)", "held = workers.c.name == claim.worker")],
        ["tests/background/runs/test_execution.py", "-k", "token_moved_on"],
    ),
    Mutation(
        "succeeding checks the claim",
        [Edit("background/ledger/ledger.py", ".where(in_force(_ANY))", ".where(workers.c.name == _ANY.worker)")],
        ["tests/background/runs/test_execution.py", "-k", "token_moved_on"],
    ),
    Mutation(
        "a lease is renewed though another table is locked",
        [
            Edit(
                "background/ledger/leases.py",
                'limit("lock_timeout", self._patience)',
                'limit("lock_timeout", 0.0)',
            )
        ],
        ["tests/background/ledger/test_leases.py", "-k", "waits_for_no_other_table"],
    ),
    Mutation(
        "a look at the busy workers finds a tick that must run again",
        [Edit("background/ledger/claim.py", "        workers.c.pending_tick.is_not(None),\n", "")],
        ["tests/background/ledger/test_ledger.py", "-k", "busy_states"],
    ),
    Mutation(
        "an open tick does not count as decided",
        [
            Edit(
                "background/ledger/ledger.py",
                'workers.c.mark >= bindparam("at", type_=UtcDateTime())',
                "workers.c.mark.is_not(None)",
            )
        ],
        ["tests/background/process/test_supervisor.py", "-k", "finds_open"],
    ),
    Mutation(
        "a look for work does not delay the heartbeat",
        [
            Edit(
                "background/process/supervisor.py",
                "self._looking.want(Look.REARM if is_moved else Look.ALL)",
                "self.refresh(Look.ALL)",
            ),
            Edit("background/process/supervisor.py", "self._looking.want(Look.BUSY)", "self.refresh(Look.BUSY)"),
        ],
        ["tests/background/ledger/test_leases.py", "-k", "locked_right_after_a_heartbeat"],
    ),
    Mutation(
        "no message of a paused topic is claimed",
        [
            Edit(
                "background/messages/queue.py",
                "messages.c.due_at <= clock, not_(is_paused(topic))",
                "messages.c.due_at <= clock",
            )
        ],
        ["tests/background/messages/test_queue.py", "-k", "paused_topic_waits"],
    ),
    Mutation(
        "the consumers of a paused topic do not wake at each heartbeat",
        [
            Edit(
                "background/database/tables.py",
                "messages.c.topic == topic, not_(is_paused(topic))",
                "messages.c.topic == topic",
            )
        ],
        ["tests/background/messages/test_queue.py", "-m", "promise", "-k", "one_statement_per_heartbeat"],
    ),
    Mutation(
        "a paused topic keeps its floor",
        [
            Edit(
                "background/database/tables.py",
                "case((not_(is_paused(topic)), literal(NEVER, UtcDateTime())))",
                "literal(NEVER, UtcDateTime())",
            )
        ],
        ["tests/background/messages/test_floors.py", "-k", "paused_topic_keeps"],
    ),
    Mutation(
        "a backlog lets a connection write that waits for SQLite's write lock",
        [Edit("background/database/connections.py", "if not write_lock.is_awaited(self._folder):", "if True:")],
        ["tests/background/runs/test_batch.py", "-k", "frees_the_write_lock"],
    ),
    Mutation(
        "pruning lets a connection write that waits for SQLite's write lock",
        [Edit("background/pruning.py", "stores.connections.let_others_write(context.stopping.wait)", "pass")],
        ["tests/background/test_pruning.py", "-k", "goes_first"],
    ),
    Mutation(
        "heartbeats look below the floors, too",
        [Edit("background/messages/floors.py", "is_full=not self._spared", "is_full=False")],
        ["tests/background/messages/test_floors.py", "-k", "committed_late"],
    ),
    Mutation(
        "a message that waits again lowers the floor",
        [
            Edit(
                "background/process/consumers.py",
                "self.floors.lower(worker.topic, batch.messages[0].due_at)",
                "pass",
            )
        ],
        ["tests/background/messages/test_floors.py", "-k", "without_a_backoff"],
    ),
    Mutation(
        "a look lifts no floor that another thread changed meanwhile",
        [Edit("background/messages/floors.py", "floor is began or", "True or")],
        ["tests/background/messages/test_floors.py", "-k", "in_progress or other_thread"],
    ),
    Mutation(
        "news of messages that wait again ends the floors",
        [
            Edit(
                "background/process/consumers.py",
                'which finds every message."""\n        self.floors.forget()',
                'which finds every message."""',
            )
        ],
        ["tests/background/messages/test_floors.py", "-k", "handed_back"],
    ),
    Mutation(
        "a heartbeat from the floors notices that an instance is gone",
        [Edit("background/ledger/leases.py", "else_=_any_gone)", "else_=false())")],
        ["tests/background/messages/test_floors.py", "-k", "instance_has_gone"],
    ),
    Mutation(
        "an acknowledgement does not slow down with the messages done beside an open transaction",
        [
            Edit(
                "background/messages/queue.py",
                'messages.c.batch == bindparam("by"), _is_held)',
                'messages.c.batch == bindparam("by"), is_running)',
            )
        ],
        ["tests/background/messages/test_floors.py", "-k", "found_by_their_ids"],
    ),
    Mutation(
        "a message that its handler postpones is still of its batch",
        [Edit("background/messages/queue.py", "which = self._held(batch, ids)", "which = messages.c.id.in_(ids)")],
        ["tests/background/runs/test_batch.py", "-k", "not_postponed"],
    ),
    Mutation(
        "a postponed message counts no attempt",
        [
            Edit(
                "background/messages/queue.py",
                "attempt=messages.c.attempt - 1, due_at=now(pause), **counted",
                "due_at=now(pause), **counted",
            )
        ],
        ["tests/background/runs/test_batch.py", "-k", "no_attempt_counts"],
    ),
    Mutation(
        "a claim is known by more than a token",
        [Edit("background/ledger/ledger.py", "(*same, workers.c.claim.is_not_distinct_from(claim.id))", "(*same)")],
        ["tests/background/repair/test_edited_rows.py", "-k", "token_repeats"],
    ),
    Mutation(
        "an ending touches its own execution only",
        [Edit("background/ledger/ledger.py", "(*same, executions.c.claim.is_not_distinct_from(claim.id))", "(*same)")],
        ["tests/background/repair/test_edited_rows.py", "-k", "another_claims_execution"],
    ),
    Mutation(
        "a token goes on above the history",
        [
            Edit(
                "background/ledger/statements.py",
                "func.coalesce(_greatest, workers.c.token) + 1",
                "workers.c.token + 1",
            )
        ],
        ["tests/background/repair/test_edited_rows.py", "-k", "lowered"],
    ),
    Mutation(
        "a claim without an execution gets one",
        [Edit("background/ledger/claim.py", "return self.running is not None and self.running.execution is None", "")],
        ["tests/promise/test_healing.py", "-k", "process_is_killed"],
    ),
    Mutation(
        "a worker's new row keeps the claim",
        [
            Edit(
                "background/ledger/controls.py",
                "_adopt(connection, name, schedule.previous(clock), name in known)",
                "pass",
            )
        ],
        ["tests/background/repair/test_edited_rows.py", "-k", "row_is_deleted"],
    ),
    Mutation(
        "a worker whose rows are all deleted begins with its next tick",
        [Edit("background/ledger/controls.py", "begin = clock if name in known else wanted", "begin = wanted")],
        ["tests/background/repair/test_edited_rows.py", "-k", "all_of_whose_rows"],
    ),
    Mutation(
        "a stray execution runs again only without a later claim",
        [Edit("background/repair/edited_rows.py", "workers.c.token <= claim.token, IS_FREE)", "IS_FREE)")],
        ["tests/background/repair/test_edited_rows.py", "-k", "after_a_later_claim"],
    ),
    Mutation(
        "a lock is taken only from the holder that the caller saw",
        [
            Edit(
                "background/ledger/locks.py",
                '    locks.c.holder.is_not_distinct_from(bindparam("seen_by", type_=String())),\n',
                "",
            )
        ],
        ["tests/background/ledger/test_locks.py", "-k", "token_repeats"],
    ),
    Mutation(
        "a new worker runs no tick from before its registration",
        [Edit("background/ledger/controls.py", "schedule.previous(min(begin, clock)) if begin else None", "None")],
        ["tests/background/process/test_supervisor.py", "-k", "from_before_its_registration"],
    ),
    Mutation(
        "ticks are aligned to the epoch",
        [
            Edit(
                "background/schedule/periods.py",
                "EPOCH = datetime(1970, 1, 1, tzinfo=UTC)",
                "EPOCH = datetime.now(UTC)",
            )
        ],
        ["tests/background/schedule/test_periods.py", "-k", "epoch"],
    ),
    Mutation(
        "the database's clock decides what is due",
        [
            Edit("background/ledger/statements.py", "and_(_tick <= now(), ", "and_("),
            Edit(
                "background/ledger/statements.py",
                "case((_left.between(0.0, _MOST_EARLY_SECONDS), _left), else_=0.0)",
                "0.0",
            ),
            Edit("background/ledger/claim.py", "clock=row.clock,", "clock=__import__('datetime').datetime.now(UTC),"),
            Edit("background/ledger/claim.py", "from datetime import datetime", "from datetime import UTC, datetime"),
        ],
        ["tests/background/ledger/test_ledger.py", "tests/promise/test_clocks.py", "-k", "future_tick or 7s"],
    ),
    Mutation(
        "pruning leaves the mark alone",
        [
            Edit(
                "background/pruning.py",
                "    after, deleted = 0, 1\n",
                "    after, deleted = 0, 1\n"
                "    from .database.tables import workers\n"
                "    context.session.execute(workers.update().values(mark=None))\n",
            ),
        ],
        ["tests/background/test_pruning.py"],
    ),
    Mutation(
        "one of several callers that saw a lock free takes it",
        [Edit("background/ledger/locks.py", ".where(_of_name, _at_seen)", ".where(_of_name)")],
        ["tests/background/ledger/test_locks.py", "tests/promise/test_locks.py", "-k", "dead_holder or correctly"],
    ),
    Mutation(
        "a lock is released by its holder only",
        [
            Edit(
                "background/ledger/locks.py",
                "_RELEASED = update(locks).where(_of_name, _by_holder)",
                "_RELEASED = update(locks).where(_of_name)",
            )
        ],
        ["tests/promise/test_locks.py", "-k", "wakes_after_its_lease"],
    ),
    Mutation(
        "a lock is held as long as its holder's lease",
        [Edit("background/ledger/locks.py", "return not gone", "return False")],
        ["tests/background/ledger/test_locks.py", "-k", "held_elsewhere"],
    ),
    Mutation(
        "the counts for the charts are written by one instance only",
        [Edit("background/tallies/rollup.py", ", chores.c.until == until)", ")")],
        ["tests/background/tallies/test_rollup.py", "-k", "before_another_one_wrote"],
    ),
    Mutation(
        "the token of a pruned lock never goes back",
        [
            Edit(
                "background/ledger/locks.py",
                "nullif(locks.c.token, 0), _FLOOR_TOKEN, 0)",
                "nullif(locks.c.token, 0), 0)",
            )
        ],
        ["tests/background/ledger/test_locks.py", "-k", "above_its_last_token"],
    ),
    Mutation(
        "past the monotonic deadline nothing is committed",
        [Edit("background/ledger/leases.py", "return steady() < self.deadline", "return True")],
        ["tests/background/runs/test_execution.py", "-k", "deadline"],
    ),
    Mutation(
        "a forked child waits for no lock that its parent held",
        [Edit("background/host/forks.py", "        self._lock = self._kind()", "        pass")],
        ["tests/background/host/test_forks.py"],
    ),
    Mutation(
        "a forked child of a run ends where it returns",
        [Edit("background/host/forks.py", "        os._exit(code & 0xFF)", "        pass")],
        ["tests/promise/test_forks.py", "-k", "sqlite and do_work and not async and returns"],
    ),
    Mutation(
        "a forked child of a run commits nothing",
        [Edit("background/context.py", "if os.getpid() != self._process:", "if False:")],
        ["tests/promise/test_forks.py", "-k", "postgresql and do_work and not async and commits"],
    ),
    Mutation(
        "an acknowledgement checks that the batch is still its own",
        [Edit("background/messages/queue.py", 'messages.c.batch == bindparam("by"), _is_held', "True")],
        ["tests/background/runs/test_batch.py", "-k", "lost_a_message"],
    ),
    Mutation(
        "a message that was tried before is claimed alone",
        [
            Edit(
                "background/messages/queue.py",
                "case((first.c.attempt > 0, due.c.id == first.c.id), else_=due.c.attempt == 0)",
                "True",
            )
        ],
        ["tests/promise/test_message_faults.py", "-k", "kills_its_process_is_buried"],
    ),
    Mutation(
        "the fence asks the database itself, not a replica",
        [
            Edit(
                "background/database/sessions.py",
                'session.connection(bind_arguments={"bind": home(session, engine)})',
                "session.connection()",
            )
        ],
        ["tests/background/database/test_connections.py", "-k", "engine_works_in_sessions"],
    ),
    Mutation(
        "a run's write by another engine is refused",
        [Edit("background/database/sessions.py", "if place(url) == place(self.engine.url):", "if False:")],
        ["tests/background/database/test_connections.py", "-k", "by_another_engine"],
    ),
    Mutation(
        "AUTOCOMMIT is refused",
        [Edit("background/database/sessions.py", "        refuse_autocommit(connection)\n", "        pass\n")],
        ["tests/background/database/test_connections.py", "-k", "keeps_nothing"],
    ),
    Mutation(
        "a handler's rollback undoes nothing of its neighbours",
        [Edit("background/runs/batch.py", "if self._transaction is not None and", "if False and")],
        ["tests/background/messages/test_queue.py", "-k", "whatever"],
    ),
    Mutation(
        "a changed row does not wait for the end of its batch",
        [Edit("background/runs/unsent.py", "not self._may_wait or is_changed or", "not self._may_wait or")],
        ["tests/background/runs/test_unsent.py", "-k", "beside_a_row"],
    ),
    Mutation(
        "a new row is sent before the statements of later messages",
        [Edit("background/runs/unsent.py", "lambda *_: self.send()", "lambda *_: None")],
        ["tests/background/runs/test_unsent.py", "-k", "by_a_table"],
    ),
    Mutation(
        "a row that the application keeps is sent at the end of its message",
        [Edit("background/runs/unsent.py", "if _are_kept(new):", "if False:")],
        ["tests/background/runs/test_unsent.py", "-k", "application_keeps"],
    ),
    Mutation(
        "no prepared statement stays behind a pooler",
        [Edit("background/database/dialects/one_request.py", "process == driver.info.backend_pid", "True")],
        ["tests/promise/test_pooler.py", "-k", "works_behind"],
    ),
    Mutation(
        "a claim of messages does not keep the plan of a small table",
        [Edit("background/database/dialects/one_request.py", '"force_custom_plan"', '"auto"')],
        ["tests/background/messages/test_queue.py", "-m", "promise or not promise", "-k", "table_was_small"],
    ),
    Mutation(
        "no connection older than an outage is used again",
        [Edit("background/database/outages.py", "if record.info.get(_STAMP, 0) != self._number:", "if False:")],
        ["tests/promise/test_outages.py", "-k", "emptied_by_an_error"],
    ),
    Mutation(
        "an outage does not count as an attempt",
        [Edit("background/runs/batch.py", "times >= _MOST_EXCUSED or not is_cut_off(error)", "True")],
        ["tests/promise/test_outages.py", "-k", "connection_was_ended"],
    ),
    Mutation(
        "a tick that ran while the clock was ahead does not run again",
        [
            Edit(
                "background/ledger/statements.py",
                "workers.c.paused_at.is_(None), IS_FREE, not_(_has_run))",
                "workers.c.paused_at.is_(None), IS_FREE)",
            )
        ],
        ["tests/promise/test_healing.py", "-k", "mark_was_lowered"],
    ),
    Mutation(
        "a mark goes back only as far as the history can prove",
        [
            Edit(
                "background/process/recovery.py",
                "if not self._stores.clock_repair.is_proven(states.values()):",
                "if False:",
            )
        ],
        ["tests/promise/test_healing.py", "-k", "ahead_of_all_history"],
    ),
    Mutation(
        "an order is settled once",
        [Edit("models.py", ".where(Order.id == order_id, Order.status == status)", ".where(Order.id == order_id)")],
        ["tests/books/test_orders.py", "-k", "many_instances_settle"],
    ),
    Mutation(
        "no book is sold above its stock",
        [Edit("models.py", ".where(Book.id == book_id, Book.stock >= quantity)\n", ".where(Book.id == book_id)\n")],
        ["tests/books/test_orders.py", "-k", "two_instances"],
    ),
    Mutation(
        "books are held in one order",
        [Edit("models.py", "books.with_for_update(key_share=True)", "books")],
        ["tests/books/test_orders.py", "-k", "holds_no_book"],
    ),
    Mutation(
        "a book that is being settled can be ordered",
        [Edit("models.py", "books.with_for_update(key_share=True)", "books.with_for_update()")],
        ["tests/books/test_orders.py", "-k", "placing_an_order"],
    ),
    Mutation(
        "two instances that find the same problem open one incident",
        [Edit("background/alarms/incidents.py", "row.on_conflict_do_nothing().returning", "row.returning")],
        ["tests/background/alarms/test_watch.py", "-k", "two_instances_at_once"],
    ),
    Mutation(
        "an incident that opened during a look stays open",
        [
            Edit(
                "background/alarms/watch.py",
                "        for incident in known:\n",
                "        known = self.incidents.known()\n        for incident in known:\n",
            )
        ],
        ["tests/background/alarms/test_watch.py", "-k", "looked_before"],
    ),
    Mutation(
        "an incident does not open again at once",
        [
            Edit("background/alarms/incidents.py", "not_(calm.exists()) if until is None else true()", "true()"),
            Edit("background/alarms/incidents.py", "or_(_is_open, incidents.c.ended_at > now(-CALM))", "_is_open"),
        ],
        ["tests/background/alarms/test_watch.py", "-k", "in_turn_alerts_once"],
    ),
    Mutation(
        "one instance looks for incidents in each interval",
        [Edit("background/alarms/incidents.py", "where=is_due)", "where=true())")],
        ["tests/background/alarms/test_watch.py", "-k", "looks_in_each_interval"],
    ),
    Mutation(
        "an incident and its alert commit together",
        [
            Edit(
                "background/alarms/watch.py",
                "            delivery.enqueue(manager,",
                "            session.commit()\n            delivery.enqueue(manager,",
            )
        ],
        ["tests/background/alarms/test_watch.py", "-k", "cannot_be_enqueued"],
    ),
    Mutation(
        "alerts go out while hung runs use all threads",
        [Edit("background/process/consumers.py", "        if topic in self._apart:\n", "        if False:\n")],
        ["tests/background/alarms/test_watch.py", "-k", "hung_runs"],
    ),
    Mutation(
        "a webhook is not redirected",
        [Edit("background/alarms/webhook.py", "build_opener(_NoRedirect)", "build_opener()")],
        ["tests/background/alarms/test_webhook.py", "-k", "redirect"],
    ),
    Mutation(
        "a ping does not delay a run",
        [
            Edit(
                "background/alarms/pings.py",
                "            self._waiting.append(url)\n",
                "            self._send(url)\n",
            )
        ],
        ["tests/background/alarms/test_pings.py", "-k", "delays_and_fails_no_run"],
    ),
    Mutation(
        "a password does not leave the machine unencrypted",
        [Edit("mail.py", "            if not (is_encrypted or is_local):\n", "            if False:\n")],
        ["tests/shop/test_mail.py", "-k", "unencrypted"],
    ),
    Mutation(
        "a server's reply to a password is not repeated",
        [Edit("mail.py", "except SMTPAuthenticationError as error:", "except ZeroDivisionError as error:")],
        ["tests/shop/test_mail.py", "-k", "one_sentence_without_the_password"],
    ),
)
