"""The page of one message worker."""

from flask import render_template

from ...history.browsing.filters import Filter
from ...history.browsing.search import MOST_GROUPED
from ...history.browsing.topics import Topic
from ...manager import the_manager
from .addresses import here
from .charts import message_charts, span_links
from .overview import about


def message_worker_page(name: str, topic: str) -> str:
    """Draw the figures, the charts and the recent errors of the topic that the worker handles."""
    manager = the_manager()
    mailbox = manager.messages
    topics = mailbox.figures()
    kinds = [Filter(topic=topic, state=state) for state in ("retrying", "dead")]
    return render_template(
        "background/message_worker.html",
        worker=manager.topics[topic],
        about=about(manager.topics[topic]),
        topic=next((each for each in topics if each.topic == topic), Topic(topic, name)),
        errors=[(kind, mailbox.errors(kind, topics)) for kind in kinds],
        grouped=MOST_GROUPED,
        charts=message_charts(topic),
        spans=span_links(),
        here=here(),
    )
