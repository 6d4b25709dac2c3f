"""Pings of a dead-man's switch: the addresses, and runs that no ping delays."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.alert_receiver import Receiver
from support.fleet import PATIENCE, Fleet, Hourly, wait_until
from support.processes import environment, flask, run

from background import InvalidWorker, PeriodicWorker
from background.alarms import webhook
from background.alarms.pings import FAILED, STARTED, SUCCEEDED, address
from background.signals import execution_lost, execution_started, send


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.mark.parametrize(
    ("url", "event", "expected"),
    [
        ("https://hc-ping.com/an-id", STARTED, "https://hc-ping.com/an-id/start"),
        ("https://hc-ping.com/an-id", SUCCEEDED, "https://hc-ping.com/an-id"),
        ("https://hc-ping.com/an-id/", FAILED, "https://hc-ping.com/an-id/fail"),
        ("https://hc-ping.com/key/{worker}?create=1", STARTED, "https://hc-ping.com/key/my-worker_2/start?create=1"),
        ("https://s.example/cron/{worker}/key/?status={status}", STARTED, "https://s.example/cron/my-worker_2/key/?status=in_progress"),
        ("https://s.example/cron/x/key/?status={status}", SUCCEEDED, "https://s.example/cron/x/key/?status=ok"),
        ("https://s.example/cron/x/key/?status={status}", FAILED, "https://s.example/cron/x/key/?status=error"),
    ],
)  # fmt: skip
def test_the_address_of_a_ping_follows_healthchecks_or_names_the_status(url: str, event: str, expected: str) -> None:
    assert address(url, "My.worker_2", event) == expected


class Silent(Hourly):
    ping_url = ""


def test_the_address_has_any_name_of_a_worker() -> None:
    assert address("https://s.example/{worker}", "prüfer", SUCCEEDED) == "https://s.example/pr%C3%BCfer"


def test_each_run_pings_its_start_and_its_outcome(fleet: Fleet, receiver: Receiver) -> None:
    class Own(Hourly):
        ping_url = f"{receiver.url}/own"

        def do_work(self, context: Any) -> None:
            raise ValueError("no")

    manager = fleet.manager(Hourly, Own, Silent, PING_URL=f"{receiver.url}/all/{{worker}}")
    for name in ("hourly", "own", "silent"):
        manager.trigger(name)
    wait_until(lambda: len(receiver.got) == 4)
    assert receiver.paths() == ["/all/hourly/start", "/all/hourly", "/own/start", "/own/fail"]
    assert {each.method for each in receiver.got} == {"GET"}


def test_a_switch_that_hangs_or_refuses_delays_and_fails_no_run(
    fleet: Fleet, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "SECONDS", PATIENCE)
    receiver.trouble = ["hang", 500, 200]
    manager = fleet.manager(Hourly, PING_URL=f"{receiver.url}/{{worker}}")
    for _ in range(3):
        execution = manager.trigger("hourly")
        assert execution is not None
        assert execution.state == "succeeded"
    assert len(receiver.got) <= 1  # the first ping hangs, and no run waited for it
    receiver.released.set()
    wait_until(lambda: len(receiver.got) == 8)
    first = "/hourly/start"
    assert receiver.paths() == [first] * 3 + ["/hourly", first, "/hourly", first, "/hourly"]


def test_a_run_that_is_lost_pings_a_failure_once_no_attempt_follows(fleet: Fleet, receiver: Receiver) -> None:
    manager = fleet.manager(Hourly, PING_URL=f"{receiver.url}/{{worker}}")
    execution = manager.trigger("hourly")
    assert execution is not None
    for attempt in (1, Hourly.max_attempts):
        claim = replace(execution.claim, attempt=attempt)
        send(manager.app, execution_lost, claim=claim, reason="its instance died")
    wait_until(lambda: len(receiver.got) == 3)
    assert receiver.paths() == ["/hourly/start", "/hourly", "/hourly/fail"]


SHOP = """
from support.fleet import Hourly, from_environment


def create_app():
    return from_environment(Hourly)
"""


@pytest.mark.promise
def test_the_last_pings_go_out_before_the_process_ends(fleet: Fleet, receiver: Receiver, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    own = environment(fleet.database_url, FLASK_APP="shop", PING_URL=f"{receiver.url}/{{worker}}")
    own["PYTHONPATH"] = os.pathsep.join((str(tmp_path), own["PYTHONPATH"]))
    code, output = run(flask("workers", "trigger", "hourly"), own)
    assert code == 0, output
    assert receiver.paths() == ["/hourly/start", "/hourly"]


def test_without_an_address_no_signal_is_connected(fleet: Fleet) -> None:
    manager = fleet.manager(Hourly)
    assert not list(execution_started.receivers_for(manager.app))


def test_a_wrong_address_is_refused_in_a_sentence(fleet: Fleet) -> None:
    class Wrong(PeriodicWorker):
        period = Hourly.period
        ping_url = "hc-ping.com/an-id"

        def do_work(self, context: Any) -> None:
            pass

    with pytest.raises(InvalidWorker, match=r"ping_url = 'hc-ping\.com/an-id'; expected http:// or https://"):
        fleet.manager(Wrong)
