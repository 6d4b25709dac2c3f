"""JSON that every reader accepts. Python alone writes NaN and Infinity, which are not JSON."""

import json
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """Return the value as JSON, with null for a number that is not finite."""
    return without_nan(json.dumps(value, **options), indent=options.get("indent"))


def loads(text: str) -> Any:
    """Return the value of JSON. Raises ValueError."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def without_nan(text: str, indent: int | str | None = None) -> str:
    """Return Python's JSON `text` with null for NaN and Infinity."""
    if "NaN" not in text and "Infinity" not in text:
        return text
    value = json.loads(text, parse_constant=lambda _: None)
    return json.dumps(value, indent=indent, ensure_ascii=text.isascii(), allow_nan=False)
