"""The snippets of the README about books work when they are pasted."""

import re
from datetime import UTC, datetime

from flask import Flask
from support.fleet import Fleet, wait_until
from support.processes import ROOT
from support.shop import make_shop

import workers
from background import current_workers
from models import Book, db

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_worker_works_when_it_is_pasted(app: Flask) -> None:
    declared, added = re.search(r"```python\n(.*?)(# app\.py.*?)```", README, re.DOTALL).groups()
    pasted = dict(vars(workers))
    exec(declared, pasted)
    worker = pasted["RestockWorker"]
    assert f"workers.add({worker.__name__})" in added
    manager = app.extensions["background_workers"]
    manager.add(worker)
    with app.app_context():
        db.session.add(Book(title="Emma", author="Jane Austen", price_cents=900, stock=1))
        db.session.commit()
    manager.tick("restock_worker", datetime.now(UTC))
    with app.app_context():
        assert db.session.scalars(db.select(Book.stock)).all() == [11]


def test_the_example_of_a_message_works_when_it_is_pasted(fleet: Fleet) -> None:
    enqueueing, declared = re.search(r"```python\n(# in a view.*?\n)\n(.*?)```", README, re.DOTALL).groups()
    pasted = {**vars(workers), "Book": Book, "current_workers": current_workers}
    exec(declared, pasted)
    fleet.apps.append(make_shop(fleet.database_url, pasted["DeliveryWorker"]))
    manager = fleet.apps[-1].extensions["background_workers"]
    with manager.app.app_context():
        db.session.add(Book(title="Emma", author="Jane Austen", price_cents=900, stock=1))
        exec(enqueueing, pasted)
        exec(enqueueing, pasted)
        current_workers.enqueue_many("deliveries", [{"book": 1, "copies": copies} for copies in (2, 3)])
        db.session.commit()
    manager.start()
    wait_until(lambda: [row.state for row in fleet.messages()] == ["done"] * 3, "the deliveries")
    with manager.app.app_context():
        assert db.session.scalars(db.select(Book.stock)).all() == [16]
