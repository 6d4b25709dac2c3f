"""A plain `Mapped[datetime]` of a user's own model is an aware UTC moment on both engines."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from functools import cache

import pytest
from flask import Flask
from sqlalchemy.orm import Mapped, mapped_column

from background import UtcDateTime
from models import db


@cache
def model() -> type:
    """Return a model of the user's own. Its table is not one of the application's."""

    class Reminder(db.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "reminders"

        id: Mapped[int] = mapped_column(primary_key=True)
        at: Mapped[datetime]
        sent_at: Mapped[datetime | None]

    db.metadata.remove(Reminder.__table__)
    return Reminder


@pytest.fixture
def reminder(app: Flask) -> Iterator[type]:
    """Give the model, with its table."""
    with app.app_context():
        model().__table__.create(db.engine)
        yield model()
        db.session.remove()


def test_a_plain_column_keeps_the_moment_and_is_aware(reminder: type) -> None:
    moment = datetime(2026, 3, 29, 3, 30, tzinfo=timezone(timedelta(hours=2)))
    db.session.add(reminder(at=moment))
    db.session.commit()
    [found] = db.session.scalars(db.select(reminder).where(reminder.at == moment.astimezone(UTC)))
    assert (found.at, found.at.tzinfo, found.sent_at) == (moment, UTC, None)
    assert found.at < datetime.now(UTC)


def test_a_plain_column_refuses_a_moment_without_a_zone(reminder: type) -> None:
    db.session.add(reminder(at=datetime(2026, 3, 29, 3, 30)))  # noqa: DTZ001 - the test is about it
    with pytest.raises(Exception, match="has no time zone; expected an aware datetime"):
        db.session.commit()
    db.session.rollback()
    assert isinstance(reminder.__table__.c.at.type, UtcDateTime)


def test_a_plain_column_refuses_a_text(reminder: type) -> None:
    db.session.add(reminder(at="2026-03-29"))
    with pytest.raises(Exception, match="'2026-03-29' has no time zone; expected an aware datetime"):
        db.session.commit()
    db.session.rollback()
