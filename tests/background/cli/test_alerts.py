"""`flask workers alerts` lists the incidents, and sends a test alert."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import Result
from support.alert_receiver import SECRET, Receiver
from support.fleet import Fleet, Hourly

from background.alarms.watch import FleetWatch


class Broken(Hourly):
    def do_work(self, context: Any) -> None:
        raise ValueError("no bread")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def alerts(fleet: Fleet, *arguments: str, **config: Any) -> Result:
    return fleet.app(Broken, **config).test_cli_runner().invoke(args=["workers", "alerts", *arguments])


def test_the_incidents_are_listed_with_their_detail(fleet: Fleet, receiver: Receiver) -> None:
    assert alerts(fleet).output == "No incident is open, or ended lately.\n"
    config = {"ALERT_WEBHOOK": receiver.url, "ALERT_WEBHOOK_SECRET": SECRET, "ALERT_AFTER_FAILURES": 1}
    manager = fleet.manager(Broken, **config)
    manager.trigger("broken")
    assert isinstance(manager.watch, FleetWatch)
    manager.watch.look_now()
    line = alerts(fleet).output.splitlines()[1]
    assert line.startswith("The worker broken is failing  ")
    assert "When it opened: It has failed since 2" in line
    assert line.endswith("Its last run ended as failed: ValueError: no bread")
    [found] = json.loads(alerts(fleet, "--json").output)
    assert (found["kind"], found["subject"], found["ended_at"]) == ("failing", "broken", None)


def test_a_test_alert_goes_to_each_channel_and_each_failure_is_shown(fleet: Fleet, receiver: Receiver) -> None:
    config = {"ALERT_WEBHOOK": receiver.url, "ALERT_WEBHOOK_SECRET": SECRET}
    done = alerts(fleet, "--test", **config)
    assert (done.exit_code, done.output) == (0, "ALERT_WEBHOOK got the test alert.\n")
    assert receiver.got[0].is_signed
    assert receiver.got[0].body["type"] == "test"
    receiver.trouble = [500]
    done = alerts(fleet, "--test", ALERT_MAIL="a@example.com", **config)
    assert done.exit_code == 1
    mail, webhook = done.output.splitlines()
    assert mail.startswith("a@example.com did not get the test alert: ALERT_MAIL is set, and the application has no")
    assert webhook == "ALERT_WEBHOOK did not get the test alert: The service answered 500; expected 200 to 299."


def test_a_test_alert_without_a_channel_is_wrong_usage(fleet: Fleet) -> None:
    done = alerts(fleet, "--test")
    assert done.exit_code == 2
    assert "Neither ALERT_MAIL nor ALERT_WEBHOOK is set" in done.output
