"""Folds the frames of a traceback that are not the user's own code."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

_ENGINE = Path(__file__).parents[1]
_FRAME = re.compile(r'(?P<margin>[ |]*)File "(?P<path>.+?)", line \d+')
# Installed packages, and the standard library: `lib/python3.12/` everywhere but on Windows, where it is `Lib\`.
_INSTALLED = re.compile(r"/(site|dist)-packages/|/lib/(python|pypy)[0-9][^/]*/|/Lib/|^<frozen ")


@dataclass(frozen=True)
class Part:
    """Neighbouring lines of a traceback."""

    text: str
    folded: int
    """The number of frames in it that are not the user's. Zero for lines that are shown."""


@lru_cache(maxsize=200)  # a live page shows the same traceback every two seconds
def parts(text: str) -> tuple[Part, ...]:
    """Divide a traceback, or any other text. Frames of the engine, of packages and of Python's library are folded."""
    return tuple(
        Part("\n".join(line for _, _, line in lines), sum(is_first for _, is_first, _ in lines) if is_folded else 0)
        for is_folded, lines in ((key, list(same)) for key, same in groupby(_lines(text), key=lambda line: line[0]))
    )


def _lines(text: str) -> Iterator[tuple[bool, bool, str]]:
    """Yield each line, and two flags: it is folded, and a frame begins with it."""
    margin, is_folded = None, False
    for line in text.splitlines():
        if frame := _FRAME.match(line):
            margin, is_folded = frame.end("margin"), _is_foreign(frame["path"])
        elif margin is not None and not _is_of_frame(line[margin:]):
            margin, is_folded = None, False
        yield is_folded, frame is not None, line


def _is_of_frame(rest: str) -> bool:
    """Return whether a line, without its margin, is the source of a frame or says that the frame is repeated."""
    return rest.startswith(("  ", "[Previous line repeated"))


def _is_foreign(path: str) -> bool:
    path = path.replace("\\", "/")
    _, folder, name = path.rpartition(f"/{_ENGINE.name}/")  # each host may have the engine somewhere else
    return bool(_INSTALLED.search(path) or (folder and name in _engine_files()))


@lru_cache(maxsize=1)
def _engine_files() -> frozenset[str]:
    return frozenset(path.relative_to(_ENGINE).as_posix() for path in _ENGINE.rglob("*.py"))
