"""The command `flask workers alerts`."""

from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial

import click

from ..alarms import delivery
from ..alarms.alert import title, trial
from ..alarms.incidents import Incidents
from ..errors import first_line
from ..manager import BackgroundWorkerManager, the_manager
from .shared import WrongUsage, as_json_option, checked_manager, examples, print_json
from .terminal import localised, screen_of, utc_option
from .workers import workers_cli


@workers_cli.command(epilog=examples("flask workers alerts", "flask workers alerts --test"))
@click.option("--test", "is_test", is_flag=True, help="Send a test alert to each configured channel now.")
@utc_option
@as_json_option
def alerts(is_test: bool, with_json: bool) -> None:
    """Show the incidents that are open, or ended last.

    An incident opens when a worker is failing (its last ALERT_AFTER_FAILURES runs failed), overdue or stuck. It also
    opens when a message dies, a host's clock is off, or no instance was alive. ALERT_MAIL and ALERT_WEBHOOK get one
    alert when an incident opens, and one when it ends.
    """
    if is_test:
        _send_trials(the_manager())
        return
    manager = checked_manager()
    found = Incidents(manager.stores).recent()
    if with_json:
        print_json([{**asdict(each), "title": title(each)} for each in found])
    elif found:
        screen = screen_of(manager)
        rows = [
            [title(each), screen.since(each.opened_at), screen.since(each.ended_at), localised(each.at_opening)]
            for each in found
        ]
        click.echo(screen.table(("incident", "opened", "ended", "note"), rows))
    else:
        click.echo("No incident is open, or ended lately.")


def _send_trials(manager: BackgroundWorkerManager) -> None:
    """Send the test alerts without the queue, so that the user sees each error."""
    if not delivery.channels(manager.app):
        raise WrongUsage("Neither ALERT_MAIL nor ALERT_WEBHOOK is set; expected at least one: set it.")
    alert, at = trial(manager.app), datetime.now(UTC)
    sends: dict[str, Callable[[], object]] = {}
    for number, to in enumerate(manager.app.config["ALERT_MAIL"] or ()):
        sends[to] = partial(delivery.send_mail, manager, to, [alert], f"test-{alert['id']}-{number}", at)
    if manager.app.config["ALERT_WEBHOOK"]:
        sends["ALERT_WEBHOOK"] = partial(delivery.send_webhook, manager, alert)
    if [to for to, send in sends.items() if not _is_sent(to, send)]:
        raise click.exceptions.Exit(1)


def _is_sent(to: str, send: Callable[[], object]) -> bool:
    try:
        send()
    except Exception as error:  # the application's mailer may raise any error
        click.echo(f"{to} did not get the test alert: {first_line(error)}")
        return False
    click.echo(f"{to} got the test alert.")
    return True
