"""Rows that the handlers of a batch add are sent together, and each message still has its own effects."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import uuid4
from weakref import WeakSet

import pytest
from flask import g
from sqlalchemy import (
    JSON,
    Column,
    Engine,
    ForeignKey,
    Integer,
    String,
    TypeDecorator,
    Uuid,
    event,
    func,
    insert,
    null,
    select,
    text,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column, relationship
from support.fleet import Fleet, Note, db, statements, states, wait_until

from background import Message, MessageWorker, WorkerContext

handling: list[str] = []


class Model(DeclarativeBase):
    """The base of this file's models. Other tests compare a database with all models of the application."""


class Entry(Model):
    """A row whose default asks for the current message."""

    __tablename__ = "entries"

    id = Column(Integer, primary_key=True)
    actor = Column(String(20), default=lambda: handling[-1])


class Sealed(TypeDecorator[str]):
    """A text that the application changes for the current message, as with a key for each customer."""

    impl = String(20)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> str:
        return handling[-1]


class Letter(Model):
    """A row with a sealed text."""

    __tablename__ = "letters"

    id = Column(Integer, primary_key=True)
    sealed = Column(Sealed, default="")


class Place(Model):
    """A row whose default reads the rows before it."""

    __tablename__ = "places"

    id = Column(Integer, primary_key=True)
    number = Column(Integer, default=text("(SELECT count(*) FROM places)"))


class Ticket(Model):
    """A row whose default is a function of the standard library."""

    __tablename__ = "tickets"

    number = Column(Uuid, primary_key=True, default=uuid4)


class Node(Model):
    """A row with a parent of the same class."""

    __tablename__ = "nodes"

    id = Column(Integer, primary_key=True)
    parent_id = Column(ForeignKey("nodes.id"))
    parent = relationship("Node", remote_side=[id])


class Leaf(Model):
    """A row that needs a node, which SQLAlchemy does not know as its parent."""

    __tablename__ = "leaves"

    id = Column(Integer, primary_key=True)
    node_id = Column(ForeignKey("nodes.id"), nullable=False)


class Picture(Model):
    """A row with a value that can change."""

    __tablename__ = "pictures"

    id = Column(Integer, primary_key=True)
    tags = Column(JSON)


class Base(MappedAsDataclass, DeclarativeBase):
    """The base of models that are dataclasses."""

    metadata = Model.metadata


class Count(Base):
    """A row that is a dataclass."""

    __tablename__ = "counts"

    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    kind: Mapped[str] = mapped_column(String(20), init=False)
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "count"}


class Few(Count):
    """A row with the default of its column."""

    number: Mapped[int] = mapped_column(default=3, use_existing_column=True)
    __mapper_args__ = {"polymorphic_identity": "few"}


class Dozen(Count):
    """A row with a default of its own for the same column."""

    number: Mapped[int] = mapped_column(default=12, use_existing_column=True)
    __mapper_args__ = {"polymorphic_identity": "dozen"}


class Form(Model):
    """A row with a column of each kind. The database of the test has a default that the model does not know."""

    __tablename__ = "forms"

    id = Column(Integer, primary_key=True)
    kind = Column(String(20), nullable=False)
    title = Column("heading", String(20), key="head")
    size = Column(Integer, default=3)
    state = Column(String(20), server_default="new")
    note = Column(String(20))
    __mapper_args__ = {"polymorphic_on": kind, "polymorphic_identity": "form"}


class LongForm(Form):
    """A row of a subclass in the same table."""

    __mapper_args__ = {"polymorphic_identity": "long"}


class Answer(Model):
    """A row with a JSON value, which writes None as the JSON value null."""

    __tablename__ = "answers"

    id = Column(Integer, primary_key=True)
    answer = Column(JSON)


class Edition(Model):
    """A row that SQLAlchemy counts the versions of."""

    __tablename__ = "editions"

    id = Column(Integer, primary_key=True)
    version = Column(Integer, nullable=False)
    __mapper_args__ = {"version_id_col": version}


class Adding(MessageWorker):
    """Adds one row per message."""

    topic = "notes"
    max_attempts = 2
    backoff = timedelta(milliseconds=20)

    def handle(self, message: Message, context: WorkerContext) -> Any:
        handling.append(message.payload)
        self.add(message, context)

    def add(self, message: Message, context: WorkerContext) -> Any:
        context.session.add(Note(text=message.payload))


@pytest.fixture(autouse=True)
def tables(fleet: Fleet) -> Iterator[None]:
    handling.clear()
    Model.metadata.create_all(fleet.engine)
    yield
    Model.metadata.drop_all(fleet.engine)


def handled(fleet: Fleet, add: Callable[[Message, WorkerContext], Any], *payloads: str, **config: Any) -> list[str]:
    """Have `add` handle a batch of messages with these payloads. Return the texts of the rows, sorted."""
    manager = fleet.manager(type("AddingToo", (Adding,), {"add": lambda _, *given: add(*given)}), **config)
    fleet.enqueue("notes", *payloads)
    manager.start()
    wait_until(lambda: not {"waiting", "running"} & set(states(fleet)), "the end")
    manager.stop()
    return rows(fleet, Note.text)


def rows(fleet: Fleet, column: Any) -> list[Any]:
    with fleet.engine.connect() as connection:
        return sorted(connection.scalars(select(column)))


def add_note(message: Message, context: WorkerContext) -> None:
    context.session.add(Note(text=message.payload))


PAYLOADS = [f"{number:02}" for number in range(20)]


def test_new_rows_of_a_batch_are_sent_together(fleet: Fleet) -> None:
    with statements(Engine) as sent:
        handled(fleet, lambda _, context: context.session.add(Ticket()), *PAYLOADS)
    assert len([each for each in sent if "INTO tickets" in each]) == 1
    assert len(set(rows(fleet, Ticket.number))) == len(PAYLOADS)


def test_new_rows_are_sent_together_where_an_insert_of_many_rows_returns_none(fleet: Fleet) -> None:
    options = {"use_insertmanyvalues": False}
    with statements(Engine) as sent:
        handled(fleet, add_note, *PAYLOADS, SQLALCHEMY_ENGINE_OPTIONS=options)
    assert len([each for each in sent if "INTO notes" in each]) == 1
    assert rows(fleet, Note.text) == PAYLOADS


@pytest.mark.parametrize("model", [Form, LongForm, Answer, Edition, Few, Dozen])
def test_rows_that_waited_are_those_of_a_flush_for_each_message(fleet: Fleet, model: Any) -> None:
    def make(number: int) -> Any:
        if issubclass(model, Count):
            return model() if number % 2 else model(number=number)
        values = {"title": f"{number}", "size": number, "state": None, "note": "given", "answer": None}
        names = [each for each in values if hasattr(model, each)]
        return model(**{name: values[name] for name in names[: number % (len(names) + 1)]})

    columns: list[Any] = [each for each in model.__table__.columns if not each.primary_key]
    columns += [each.is_(null()) for each in columns]  # JSON has a null of its own
    with fleet.engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("ALTER TABLE forms ALTER note SET DEFAULT 'unknown to the model'"))
    with Session(fleet.engine) as session:
        for payload in PAYLOADS:
            session.add(make(int(payload)))
            session.flush()
        expected = session.execute(select(*columns).order_by(model.__table__.c.id)).all()
    handled(fleet, lambda message, context: context.session.add(make(int(message.payload))), *PAYLOADS)
    with fleet.engine.connect() as connection:
        found = connection.execute(select(*columns).order_by(model.__table__.c.id)).all()
    assert (found, handling) == (expected, PAYLOADS)


# -- functions of the application that ask for the current message -------------------------------------------


def test_a_default_is_asked_for_while_its_message_is_current(fleet: Fleet) -> None:
    handled(fleet, lambda _, context: context.session.add(Entry()), *PAYLOADS)
    assert rows(fleet, Entry.actor) == PAYLOADS


def test_a_type_of_the_application_is_asked_while_its_message_is_current(fleet: Fleet) -> None:
    handled(fleet, lambda _, context: context.session.add(Letter()), *PAYLOADS)
    with fleet.engine.connect() as connection:
        assert sorted(connection.scalars(text("SELECT sealed FROM letters"))) == PAYLOADS


def stamp(session: Session, *_: Any) -> None:
    for new in session.new:
        if isinstance(new, Note):
            new.text = handling[-1]


def stamp_one(_mapper: Any, _connection: Any, target: Note) -> None:
    target.text = handling[-1]


@pytest.mark.parametrize(
    ("target", "name", "listener"), [(db.session, "before_flush", stamp), (Note, "before_insert", stamp_one)]
)
def test_a_listener_is_called_while_its_message_is_current(
    fleet: Fleet, target: Any, name: str, listener: Callable[..., None]
) -> None:
    event.listen(target, name, listener)
    try:
        assert handled(fleet, lambda _, context: context.session.add(Note(text="")), *PAYLOADS) == PAYLOADS
    finally:
        event.remove(target, name, listener)


# -- rows that cannot wait ----------------------------------------------------------------------------------


def test_a_default_that_reads_rows_finds_those_of_earlier_messages(fleet: Fleet) -> None:
    handled(fleet, lambda _, context: context.session.add(Place()), *PAYLOADS)
    assert rows(fleet, Place.number) == list(range(len(PAYLOADS)))


def test_a_value_that_reads_rows_finds_those_of_earlier_messages(fleet: Fleet) -> None:
    number = select(func.count(Note.id)).scalar_subquery()
    handled(fleet, lambda _, context: context.session.add(Note(text="", number=number)), *PAYLOADS)
    assert (rows(fleet, Note.number), handling) == (list(range(len(PAYLOADS))), PAYLOADS)


def test_a_row_that_the_application_keeps_has_its_id_and_takes_later_changes(fleet: Fleet) -> None:
    def add(message: Message, context: WorkerContext) -> None:
        if "kept" not in g:  # one application context for the batch
            g.kept = Note(text="")
            context.session.add(g.kept)
        else:
            context.session.add(Note(text=message.payload, number=g.kept.id))
        if message.payload == PAYLOADS[-2]:
            context.session.execute(text("SELECT 1"))
            g.kept.number = 1000

    handled(fleet, add, *PAYLOADS)
    assert rows(fleet, Note.number) == [1] * (len(PAYLOADS) - 1) + [1000]


def test_a_value_that_a_later_message_changes_is_sent_as_it_was(fleet: Fleet) -> None:
    def add(message: Message, context: WorkerContext) -> None:
        tags = g.setdefault("tags", [])
        tags[:] = [message.payload]
        context.session.add(Picture(tags=tags))

    handled(fleet, add, *PAYLOADS)
    assert rows(fleet, Picture.tags) == [[each] for each in PAYLOADS]


def test_many_rows_of_many_messages_do_not_fill_the_memory(fleet: Fleet) -> None:
    alive: WeakSet[Ticket] = WeakSet()
    most: list[int] = []

    def add(message: Message, context: WorkerContext) -> None:
        for _ in range(400):
            alive.add(ticket := Ticket())
            context.session.add(ticket)
        del ticket
        most.append(len(alive))

    handled(fleet, add, *PAYLOADS)
    assert len(rows(fleet, Ticket.number)) == 8_000
    assert max(most) <= 1_400


# -- later messages of the batch ----------------------------------------------------------------------------


def by_a_statement(context: WorkerContext) -> None:
    context.session.execute(update(Note).values(number=Note.number + 1))


def by_a_table(context: WorkerContext) -> None:
    context.session.execute(update(Note.__table__).values(number=Note.number + 1))


def by_a_connection(context: WorkerContext) -> None:
    context.session.connection().exec_driver_sql("UPDATE notes SET number = number + 1")


def by_an_expression(context: WorkerContext) -> None:
    context.session.get(Note, 1).number = Note.number + 1  # no statement, once the session has the row


def by_an_expression_beside_a_row(context: WorkerContext) -> None:
    by_an_expression(context)
    context.session.add(Ticket())


@pytest.mark.parametrize(
    "change", [by_a_statement, by_a_table, by_a_connection, by_an_expression, by_an_expression_beside_a_row]
)
def test_a_later_message_changes_the_row_of_an_earlier_message(
    fleet: Fleet, change: Callable[[WorkerContext], None]
) -> None:
    handled(
        fleet,
        lambda message, context: (
            context.session.add(Note(id=1, text="")) if message.payload == "first" else change(context)
        ),
        "first",
        *PAYLOADS,
    )
    assert rows(fleet, Note.number) == [len(PAYLOADS)]


def count(context: WorkerContext) -> int:
    with context.session.no_autoflush:
        return context.session.scalar(select(func.count(Note.id)))


def count_by_the_driver(context: WorkerContext) -> int:
    cursor = context.session.connection().connection.cursor()
    cursor.execute("SELECT count(*) FROM notes")
    return cursor.fetchone()[0]


@pytest.mark.parametrize("count", [count, count_by_the_driver])
def test_a_statement_finds_the_rows_of_earlier_messages_and_not_those_of_its_own(
    fleet: Fleet, count: Callable[[WorkerContext], int]
) -> None:
    def add(message: Message, context: WorkerContext) -> None:
        context.session.add(note := Note(text="first"))
        context.session.add(Note(text="second"))
        note.number = count(context)

    handled(fleet, add, "first", *PAYLOADS)
    assert rows(fleet, Note.number) == sorted([0] * 21 + list(range(0, 42, 2)))


def add_incomplete(message: Message, context: WorkerContext) -> None:
    context.session.add(note := Note())
    with context.session.no_autoflush:
        note.text = str(context.session.query(Note).count())


def add_in_bulk(message: Message, context: WorkerContext) -> None:
    add_note(message, context)
    context.session.bulk_insert_mappings(Note, [{"text": message.payload}])


def add_a_child(message: Message, context: WorkerContext) -> None:
    context.session.add(Node(parent=context.session.get(Node, 1000)))


def add_a_leaf(message: Message, context: WorkerContext) -> None:
    number = handling.index(message.payload)
    context.session.add(Leaf(node_id=number) if number % 2 else Node(id=number + 1))


@pytest.mark.parametrize("add", [add_incomplete, add_in_bulk, add_a_child, add_a_leaf])
def test_a_batch_is_handled_only_once_if_its_rows_cannot_be_sent_together(
    fleet: Fleet, add: Callable[[Message, WorkerContext], None]
) -> None:
    with fleet.engine.begin() as connection:
        connection.execute(text("INSERT INTO nodes (id) VALUES (1000)"))
    handled(fleet, add, *PAYLOADS)
    assert handling == PAYLOADS
    assert states(fleet) == ["done"] * len(PAYLOADS)


def expunge_all(session: Session) -> None:
    session.expunge_all()


def add_and_expunge(session: Session) -> None:
    session.add(note := Note(text="expunged"))
    session.expunge(note)


def roll_back(session: Session) -> None:
    session.rollback()


def close(session: Session) -> None:
    session.close()


def remove(_session: Session) -> None:
    db.session.remove()


@pytest.mark.parametrize("deed", [expunge_all, add_and_expunge, roll_back, close, remove])
def test_no_later_message_takes_a_new_row_away(fleet: Fleet, deed: Callable[[Session], None]) -> None:
    def add(message: Message, context: WorkerContext) -> None:
        if message.payload == "daring":
            deed(context.session)
        else:
            add_note(message, context)

    assert handled(fleet, add, "daring", "one", "daring", "two", "daring") == ["one", "two"]
    assert set(states(fleet)) == {"done"}
    assert fleet.errors() == []


def test_a_refused_row_costs_only_its_own_message(fleet: Fleet) -> None:
    def add(message: Message, context: WorkerContext) -> None:
        context.session.add(Note(text=message.payload, number=-1 if message.payload == "bad" else 1))

    assert handled(fleet, add, "one", "bad", "two") == ["one", "two"]
    assert states(fleet) == ["done", "dead", "done"]


def in_a_savepoint(session: Session, text: str) -> None:
    with session.begin_nested():
        session.add(Note(text=text))


def by_a_core_statement(session: Session, text: str) -> None:
    session.execute(insert(Note.__table__), {"text": text, "number": 1})


@pytest.mark.parametrize("insert_one", [in_a_savepoint, by_a_core_statement])
def test_a_handler_that_expects_a_refusal_does_not_swallow_that_of_an_earlier_message(
    fleet: Fleet, insert_one: Callable[[Session, str], None]
) -> None:
    def add(message: Message, context: WorkerContext) -> None:
        if message.payload == "bad":
            context.session.add(Note(text="bad", number=-1))
        else:
            with suppress(IntegrityError):
                insert_one(context.session, message.payload)

    assert handled(fleet, add, "one", "bad", "two") == ["one", "two"]
    assert states(fleet) == ["done", "dead", "done"]
