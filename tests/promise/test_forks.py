"""Forks within a worker: the child is not part of the engine, and the run of its parent goes on."""

import re
import signal

import pytest
from support.databases import close
from support.fork_server import Member, Nursery, Shops
from support.message_traces import Letterbox
from support.processes import environment, eventually, gunicorn
from support.run_traces import Effects

NEVER_COMMITTED = "It ends here, and nothing that it did is committed"
ENDINGS = {
    "returns": ("returned", 0),
    "raises": ("raised ValueError: the child's own", 1),
    "exits": ("raised SystemExit: 3", 3),
    "commits": ("raised (ClaimLost: .*tried to commit|OperationalError: .*database is locked)", 1),
    "rolls back": ("raised SystemExit: 4", 4),
}


@pytest.mark.parametrize("child", ENDINGS)
@pytest.mark.parametrize("worker", ["forking", "async_forking"])
def test_a_child_that_returns_from_do_work_ends_there_and_its_parents_run_succeeds(
    worker: str, child: str, shops: Shops, effects: Effects
) -> None:
    (parent,) = shops.join(PROBE_WORKERS=f"{worker},ticker", PROBE_CHILD=child, WORKERS_HEARTBEAT_SECONDS=1)
    assert eventually(lambda: effects.states(worker) == [("succeeded", 1)]), parent.output
    assert {(effect.note, effect.pid) for note in NOTES for effect in effects.all(worker, note)} == {
        ("done", parent.pid),
        ("after the child", parent.pid),
    }
    came_back(parent, child)
    goes_on(parent, effects)


def test_a_child_forked_at_the_end_of_a_run_ends_there(shops: Shops, effects: Effects) -> None:
    (parent,) = shops.join(PROBE_WORKERS="forking_at_the_end,ticker", WORKERS_HEARTBEAT_SECONDS=1)
    came_back(parent, "returns")
    assert effects.states("forking_at_the_end") == [("succeeded", 1)]
    goes_on(parent, effects)


@pytest.mark.parametrize("child", ["returns", "raises", "exits", "commits"])
def test_a_child_that_returns_from_a_handler_ends_there_and_each_message_is_handled_once(
    child: str, shops: Shops, effects: Effects
) -> None:
    (parent,) = shops.join(PROBE_WORKERS="notes,ticker", PROBE_CHILD=child, WORKERS_HEARTBEAT_SECONDS=1)
    letters = Letterbox(effects)
    letters.put("notes", ["fork", "after the fork"])
    assert eventually(letters.are_over), parent.output
    assert letters.states() == {"done": 2}
    close(letters.app)
    assert [effect.pid for note in NOTES for effect in effects.all("notes", note)] == [parent.pid] * 3
    came_back(parent, child)
    goes_on(parent, effects)


def test_a_pool_of_forked_processes_works_within_a_run(shops: Shops, effects: Effects) -> None:
    (parent,) = shops.join(PROBE_WORKERS="pooled,ticker", WORKERS_HEARTBEAT_SECONDS=1)
    parent.wait_for(re.escape("The pool says [1, 2, 3]"))
    assert eventually(lambda: effects.states("pooled") == [("succeeded", 1)]), parent.output
    assert [effect.pid for effect in effects.all("pooled", "after the pool")] == [parent.pid]
    goes_on(parent, effects)


def test_a_child_ends_by_a_signal_that_comes_right_after_the_fork(shops: Shops, effects: Effects) -> None:
    (parent,) = shops.join(PROBE_WORKERS="terminator,ticker", WORKERS_HEARTBEAT_SECONDS=1)
    assert parent.wait_for(r"The children ended with (.*)")[1] == "[-15, -2]"
    goes_on(parent, effects)


def test_a_child_of_a_server_ends_by_a_signal_like_a_plain_process(nursery: Nursery, effects: Effects) -> None:
    env = environment(effects.url, PROBE_WORKERS="terminator,ticker", WORKERS_HEARTBEAT_SECONDS=1)
    with nursery.forked(gunicorn("support.traced_app:create_app()"), env) as parent:
        assert parent.wait_for(r"The children ended with (.*)")[1] == "[-15, -2]"
        assert eventually(lambda: len(effects.ticks()) >= 2), parent.output
        assert "Traceback" not in parent.output
        parent.signal(signal.SIGTERM)
        assert parent.wait() == 0, parent.output


NOTES = ("done", "after the child", "of the child")


def came_back(parent: Member, child: str) -> None:
    """Check that one log line names the child, and that the child ended with this exit code."""
    said, code = ENDINGS[child]
    line = parent.wait_for(rf"forked, and the child process (\d+) returned \({said}.*{NEVER_COMMITTED}")
    parent.wait_for(rf"The child {line[1]} ended with {code}")
    assert parent.output.count("WARNING") == parent.output.count(NEVER_COMMITTED) == 1
    assert "Traceback" not in parent.output


def goes_on(parent: Member, effects: Effects) -> None:
    ticks = len(effects.ticks())
    assert eventually(lambda: len(effects.ticks()) >= ticks + 2)
    assert effects.pids() == {parent.pid}
    effects.check_once()
    parent.signal(signal.SIGTERM)
    assert parent.wait() == 0, parent.output
