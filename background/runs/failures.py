"""Texts of bounded length for the errors of a user's code, and the database errors that may pass by themselves."""

import traceback

from ..errors import first_line

_MOST = 16_000  # characters of one traceback with all its causes
_MOST_OF_ONE = 4_000  # of one error's text within it
_DEEPEST = 10  # groups within groups


def traceback_of(error: BaseException) -> str:
    """Return the traceback of `error` as text of at most about 16,000 characters, with a note of the cut.

    For an exception group, the last line says the group and its first member.
    """
    try:
        parts = [cut(each, _MOST_OF_ONE) for each in traceback.format_exception(error)]
    except Exception as failure:  # deeply nested groups, or attributes of a wrong type
        parts = [f"{summary(error)} (its traceback cannot be written: {type(failure).__name__})\n"]
    if isinstance(error, BaseExceptionGroup):
        parts.append(f"{summary(error)}\n")
    return cut("".join(parts), _MOST)


def summary(error: BaseException, depth: int = 0) -> str:
    """Return the type of `error` and the first line of its text. Of an exception group, add its first member."""
    text = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, BaseExceptionGroup) and error.exceptions and depth < _DEEPEST:
        return f"{text}, the first: {summary(error.exceptions[0], depth + 1)}"
    return text


def cut(text: str, most: int) -> str:
    """Return the text without its middle if it has more than `most` characters, and the number of cut characters."""
    if len(text) <= most:
        return text
    head, tail = most // 2, most - most // 2
    return f"{text[:head]}\n... ({len(text) - most:,} characters are cut) ...\n{text[-tail:]}"
