"""JSON as every reader takes it: Python writes NaN and Infinity, which are none of it."""

import json
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps`, with null in the place of a number that is not finite."""
    return without_nan(json.dumps(value, **options), indent=options.get("indent"))


def without_nan(text: str, indent: int | str | None = None) -> str:
    """The JSON `text` of Python's with null in the place of NaN and Infinity."""
    if "NaN" not in text and "Infinity" not in text:
        return text
    value = json.loads(text, parse_constant=lambda _: None)
    return json.dumps(value, indent=indent, ensure_ascii=text.isascii(), allow_nan=False)
