"""The table with one row for each message that was handled, and its check."""

from sqlalchemy import func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from models import db

from .figures import check_once


class Rows(DeclarativeBase):
    """The tables of the measure. The application's tables stay without them."""


class Effect(Rows):
    """The effect of one message."""

    __tablename__ = "benchmark_effects"
    id: Mapped[int] = mapped_column(primary_key=True)
    message: Mapped[int]


effects = Effect.__table__


def clear() -> None:
    """Delete all messages and effects, so that each way begins with the same tables."""
    empty("background_message_errors", "background_messages", "benchmark_effects")


def empty(*tables: str) -> None:
    with db.engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql(f"TRUNCATE {', '.join(tables)}")
            return
        for table in tables:
            connection.exec_driver_sql(f"DELETE FROM {table}")


def check_effects(expected: int, work: str) -> None:
    """Check that each of `expected` messages had its effect, once."""
    with db.engine.connect() as connection:
        columns = func.count(), func.count(effects.c.message.distinct())
        found, different = connection.execute(select(*columns).select_from(effects)).one()
    check_once(expected, found, different, work)
