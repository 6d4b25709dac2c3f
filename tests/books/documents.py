"""The README and the pages of docs/: their links and their snippets."""

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}


def text(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


def snippets(page: str) -> list[str]:
    """Return the blocks of Python on the page."""
    return re.findall(r"^```python\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE)


def snippet(page: str, marker: str) -> str:
    """Return the only block of Python on the page that contains `marker`."""
    [found] = [each for each in snippets(page) if marker in each]
    return found


def blocks(page: str) -> list[str]:
    """Return the blocks of the page that are not Python, without their indent: commands, drawings and output."""
    rest = re.sub(r"^```python\n.*?^```\n", "", text(page), flags=re.DOTALL | re.MULTILINE)
    fenced = re.compile(r"^```\w*\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
    indented = re.findall(r"(?<=\n\n)(?:    .*\n)+", fenced.sub("", rest))
    return [*fenced.findall(rest), *(textwrap.dedent(each) for each in indented)]


def commands(page: str, heading: str) -> str:
    """Return the indented lines of the first block below the heading, without their indent."""
    section = text(page).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    prose = re.sub(r"^```.*?^```", "", section, flags=re.DOTALL | re.MULTILINE)
    block = re.search(r"(?:^    .*\n)+", prose, re.MULTILINE)
    assert block, f"{page} has no commands below {heading!r}"
    return re.sub(r"^    ", "", block[0], flags=re.MULTILINE)
