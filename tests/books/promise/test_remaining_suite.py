"""The tests that remain in an application without the shop pass there."""

import re
from pathlib import Path

from support.processes import ROOT

from tests.books.test_emptying import make_emptied, pytest_in


def listed_in(folder: Path, *more: str) -> set[str]:
    """Return the tests of the engine and of accounts, without the tests about a list of files, which differ."""
    said = pytest_in(folder, "--collect-only", "-q", "-o", "addopts=--import-mode=importlib", *more)
    return {line for line in said.splitlines() if "::" in line and "test_architecture" not in line}


def test_no_test_of_the_engine_or_of_accounts_is_lost(tmp_path: Path) -> None:
    kept = ("tests/background", "tests/shop", "tests/promise")
    assert listed_in(make_emptied(tmp_path / "emptied"), *kept) == listed_in(ROOT, *kept)


def test_the_remaining_tests_of_the_application_pass(tmp_path: Path) -> None:
    """The tests of the engine import nothing of the application, so they need no second run here."""
    usual = ("-m", "not promise and not browser and not fuzz", "-n", "2", f"--basetemp={tmp_path / 'files'}")
    said = pytest_in(make_emptied(tmp_path / "emptied"), *usual, "tests/shop")
    assert re.search(r"\d{3,} passed", said.splitlines()[-1])
