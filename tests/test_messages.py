"""Messages: each is handled once, with its effects, or ends in the dead letters with its errors."""

from datetime import timedelta

from fleet import Fleet, effect, wait_until

from background import Message, MessageWorker, WorkerContext


class Notes(MessageWorker):
    """Leaves one effect per message."""

    topic = "notes"
    backoff = timedelta(milliseconds=20)

    def handle(self, message: Message, context: WorkerContext) -> None:
        effect(context, message.payload)


def states(fleet: Fleet) -> list[str]:
    return [row.state for row in fleet.messages()]


def all_are(fleet: Fleet, state: str, count: int) -> None:
    wait_until(lambda: states(fleet) == [state] * count, f"{count} messages that are {state}")


def test_a_message_is_handled_once_with_its_effect(fleet: Fleet) -> None:
    fleet.manager(Notes).start()
    fleet.enqueue("notes", "one", "two", "three")
    all_are(fleet, "done", 3)
    assert fleet.effects() == ["one", "two", "three"]
    assert fleet.keys() == [f"notes:{row.id}" for row in fleet.messages()]


def test_what_was_enqueued_before_the_start_is_handled_in_the_order_in_which_it_was_enqueued(fleet: Fleet) -> None:
    manager = fleet.manager(Notes)
    fleet.enqueue("notes", *range(250))
    manager.start()
    all_are(fleet, "done", 250)
    assert fleet.effects() == [str(each) for each in range(250)]
