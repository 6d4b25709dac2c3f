"""The characters that a database can hold. PostgreSQL may keep its text in an encoding other than UTF-8."""

import codecs
import json
from typing import Any

from sqlalchemy import Connection, Dialect, Engine, event

from .postgresql import reported

_ATTRIBUTE = "background_encodings"


def storable(text: str, dialect: Dialect) -> str:
    r"""Return the text with an escape, such as `\u0141`, for each character that the database cannot hold."""
    for encoding in _encodings(dialect):
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    return text.replace("\0", "\\x00")


def storable_json(text: str, dialect: Dialect) -> str:
    """Return the same JSON, written with characters that the database can hold."""
    try:
        for encoding in _encodings(dialect):
            text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(each if each.isascii() else json.dumps(each)[1:-1] for each in text)
    return text


def _encodings(dialect: Dialect) -> tuple[str, ...]:
    found: tuple[str, ...] = getattr(dialect, _ATTRIBUTE, ("utf-8",))
    return found


@event.listens_for(Engine, "engine_connect")
def _learn(connection: Connection) -> None:
    """Keep the encodings of the server and of its connections in the engine's dialect."""
    dialect = connection.dialect
    if dialect.name == "postgresql" and not hasattr(dialect, _ATTRIBUTE):
        setattr(dialect, _ATTRIBUTE, _known(connection.connection.driver_connection))


def _known(driver: Any) -> tuple[str, ...]:
    """Return Python's names for the encodings that a server reported. Without a report the encoding is UTF-8."""
    names = (reported(driver, name) for name in ("server_encoding", "client_encoding"))
    return tuple({_codec(name) for name in names if name}) or ("utf-8",)


def _codec(name: str) -> str:
    """Return Python's name for an encoding of PostgreSQL. For an unknown encoding return ASCII, which each contains."""
    try:
        return codecs.lookup(name.replace("WIN", "cp").replace("KOI8", "koi8_")).name
    except LookupError:
        return "ascii"
