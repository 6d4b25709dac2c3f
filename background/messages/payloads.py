"""Checks of payloads, keys and delays: a payload is JSON of limited size."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

from ..errors import BackgroundError, InvalidMessage

T = TypeVar("T")

LONGEST_KEY = 200
LONGEST_DELAY = timedelta(days=36_500)
_DEEPEST = 100
_LONGEST_NUMBER = 13_000  # bits: about the largest number that Python converts to text


@dataclass(frozen=True)
class Draft:
    """A message before it is enqueued: its payload as JSON text, and its key."""

    payload: str
    key: str | None


def draft(payload: Any, key: str | None, most_bytes: int) -> Draft:
    """Return the draft of a message. Raises InvalidMessage, with the path to a value that JSON cannot hold."""
    if key is not None and not (isinstance(key, str) and 1 <= len(key) <= LONGEST_KEY and key.isprintable()):
        raise InvalidMessage(
            f"The key of a message is {key!r:.100}; expected 1 to {LONGEST_KEY} printable characters, or None."
        )
    text = as_json(payload, "payload", InvalidMessage, "enqueue it")
    if (size := len(text.encode())) > most_bytes:
        raise InvalidMessage(
            f"The payload is {size:,} bytes of JSON; expected at most {most_bytes:,} (MESSAGES_MAX_BYTES): "
            "enqueue a reference to the data instead, or raise that setting."
        )
    return Draft(text, key)


def as_json(value: Any, name: str, refusal: type[BackgroundError], next_step: str, ensure_ascii: bool = False) -> str:
    """Return `value` as JSON text. Raises `refusal`, with the path to a value that JSON cannot hold."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=ensure_ascii, separators=(",", ":"))
        text.encode()
        is_plain = _is_carried(value)
    except (TypeError, ValueError, RecursionError):
        is_plain = False
    if not is_plain:
        path, problem = next(_problems(value, name, ()), (name, f"nested more than {_DEEPEST} deep"))
        raise refusal(
            f"{path} is {problem}, which JSON cannot carry; expected None, a bool, a finite number, a str, or lists "
            f"and dicts (with str keys) of them: convert it before you {next_step}."
        )
    return text


def drafts(payloads: Iterable[Any], keys: Iterable[str | None] | None, most_bytes: int) -> list[Draft]:
    """Draft many messages. Raises InvalidMessage as `draft` does, and if the keys are fewer or more."""
    each = _listed(payloads, "payloads")
    names = [None] * len(each) if keys is None else _listed(keys, "keys")
    if len(names) != len(each):
        raise InvalidMessage(f"There are {len(names)} keys for {len(each)} payloads; expected one for each.")
    return [draft(payload, key, most_bytes) for payload, key in zip(each, names, strict=True)]


def _listed(values: Iterable[T], what: str) -> list[T]:
    """Return `values` as a list. Raises InvalidMessage for a single value, also for a text or a dict."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise InvalidMessage(
            f"The {what} of many messages are {values!r:.100}; expected a list, or another iterable, with a value for "
            "each message: write [...] around a single value."
        )
    return list(values)


def as_delay(delay: timedelta | float | None, unit: Literal["seconds", "minutes"] = "seconds") -> timedelta | None:
    """Return a delay as a timedelta. A number has the `unit`. Raises InvalidMessage."""
    try:
        found = delay if isinstance(delay, timedelta | None) else timedelta(**{unit: delay})
        if isinstance(delay, bool) or (found is not None and not timedelta() <= found <= LONGEST_DELAY):
            raise ValueError(delay)
    except (TypeError, ValueError, OverflowError):
        raise InvalidMessage(
            f"The delay of a message is {delay!r}; expected a timedelta or a number of {unit}, at least 0 and at "
            f"most {LONGEST_DELAY.days:,} days: leave it out to have the message handled now."
        ) from None
    return found


def _is_carried(value: Any, depth: int = 0) -> bool:
    """Return whether all keys are texts (`json` converts numbers to texts), and no value is nested too deeply."""
    if isinstance(value, dict):
        each: Any = value.values()
        if not all(isinstance(key, str) for key in value):
            return False
    elif isinstance(value, list | tuple):
        each = value
    else:
        return True
    return depth < _DEEPEST and all(_is_carried(one, depth + 1) for one in each)


def _problems(value: Any, path: str, within: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """Yield each part of `value` that JSON cannot hold, as (path, problem)."""
    if isinstance(value, float) and not math.isfinite(value):
        yield path, str(value)
    elif isinstance(value, str) and not _is_encodable(value):
        yield path, f"the text {value!a} with an unpaired surrogate"
    elif isinstance(value, int) and value.bit_length() > _LONGEST_NUMBER:
        yield path, "a whole number of thousands of digits"
    elif not (value is None or isinstance(value, str | float | int | dict | list | tuple)):
        yield path, f"of type {type(value).__name__}"
    elif id(value) in within:
        yield path, "a container that contains itself"
    elif isinstance(value, dict | list | tuple) and len(within) < _DEEPEST:
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, dict) and not isinstance(key, str):
                yield f"{path}[{key!r}]", f"under a key of type {type(key).__name__}"
            elif not _is_encodable(str(key)):
                yield path, f"a dict with the key {key!a}, which has an unpaired surrogate"
            else:
                yield from _problems(each, f"{path}[{key!r}]", (*within, id(value)))


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
