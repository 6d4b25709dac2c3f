"""Tracebacks on the dashboard: the frames of the user stay open, and all other frames are folded."""

import asyncio
import re
from typing import Any

import pytest
from sqlalchemy import create_engine

from background.dashboard.filters import log_text, sentence_text
from background.dashboard.tracebacks import Part, parts
from background.runs.failures import traceback_of
from background.schedule.parsing import typed_schedule


def failure(call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except Exception as error:
        return traceback_of(error)
    raise AssertionError(f"{call} did not fail")


def folded(text: str) -> list[int]:
    """Return, for each part, the number of its folded frames."""
    return [part.folded for part in parts(text)]


def test_frames_of_packages_of_the_engine_and_of_python_are_folded() -> None:
    for found, file in (
        (failure(create_engine, "nowhere://"), "sqlalchemy/engine/create.py"),
        (failure(typed_schedule, "soon"), "background/schedule/parsing.py"),
        (failure(asyncio.run, failing()), "asyncio/runners.py"),
    ):
        shown = "\n".join(part.text for part in parts(found) if not part.folded)
        hidden = "\n".join(part.text for part in parts(found) if part.folded)
        assert file in hidden
        assert file not in shown
        assert __file__ in shown
        assert __file__ not in hidden
        assert found.strip().splitlines()[-1] in shown
        assert "\n".join(part.text for part in parts(found)) == found.strip("\n")


async def failing() -> None:
    raise ValueError("no such shelf")


@pytest.mark.parametrize(
    "path",
    [
        "/srv/.venv/lib/python3.12/site-packages/requests/api.py",
        "/usr/lib/python3/dist-packages/requests/api.py",
        "/usr/local/lib/python3.13/json/decoder.py",
        "/root/.local/share/uv/python/cpython-3.11/lib/python3.11/json/decoder.py",
        "/usr/lib/pypy3.10/json/decoder.py",
        r"C:\Python312\Lib\json\decoder.py",
        r"C:\shop\.venv\Lib\site-packages\requests\api.py",
        "<frozen importlib._bootstrap>",
        "/srv/releases/7/background/runs/execution.py",
    ],
)
def test_the_path_of_any_host_shows_that_a_frame_is_not_the_users(path: str) -> None:
    assert folded(f'  File "{path}", line 1, in f\n    g()\nOSError: no') == [1, 0]


@pytest.mark.parametrize(
    "path", ["/srv/shop/workers.py", "/srv/background/jobs.py", "manager.py", "/srv/lib/python/tools.py", "<string>"]
)
def test_any_other_frame_is_the_users(path: str) -> None:
    assert folded(f'  File "{path}", line 1, in f\n    g()\nOSError: no') == [0]


def test_neighbouring_frames_are_folded_together_with_their_repetitions_and_never_with_the_error() -> None:
    library = '  File "/usr/lib/python3.11/json/decoder.py", line 1, in f\n    g(\n      x)\n    ^^^^\n'
    again = "  [Previous line repeated 96 more times]\n"
    text = f'Traceback (most recent call last):\n  File "/srv/a.py", line 1, in f\n    g()\n{library}{library}{again}'
    error = "ValueError: two\n    lines"
    assert folded(text + error) == [0, 2, 0]
    assert parts(text + error)[-1] == Part(error, 0)


def test_the_frames_of_an_exception_group_are_folded_and_any_other_text_is_not() -> None:
    def fail() -> None:
        try:
            typed_schedule("soon")
        except Exception as error:
            raise ExceptionGroup("all", [error]) from None

    found = failure(fail)
    assert sum(folded(found)) == 2
    assert "  | " in next(part.text for part in parts(found) if part.folded)
    assert parts("its instance is gone") == (Part("its instance is gone", 0),)
    assert parts("") == ()


def test_the_moments_of_a_log_and_of_a_sentence_are_marked_and_the_texts_are_escaped() -> None:
    log = (
        "(3 earlier lines are not kept)\n2026-11-30T12:00:00.120Z INFO    <b>\nmore\n2026-11-30T12:00:01.000Z INFO    2"
    )
    shown = log_text(log)
    assert re.findall(r'data-exact="([^"]*)"', shown) == ["2026-11-30T12:00:00.120Z", "2026-11-30T12:00:01.000Z"]
    assert re.sub("</?time[^>]*>", "", shown) == log.replace("<b>", "&lt;b&gt;")
    sentence = "The tick 2026-11-30T12:00:00Z <is> 2026-13-30T12:00:00Z"
    assert sentence_text(sentence).count("<time") == 1
    assert 'datetime="2026-11-30T12:00:00+00:00"' in sentence_text(sentence)
    assert re.sub("</?time[^>]*>", "", sentence_text(sentence)) == sentence.replace("<is>", "&lt;is&gt;")
