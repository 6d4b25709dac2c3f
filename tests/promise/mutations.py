"""Removes the guards of the promise one at a time, and checks that a test fails without each.

    python tests/promise/mutations.py            all of them
    python tests/promise/mutations.py -k WORDS   only guards with WORDS in their name, or in an edited file's
    python tests/promise/mutations.py --look     check only that each guard and its tests are there, and run no test

guards.py has the list. Works on copies of the tree, two per core. Each copy has a PostgreSQL server. The tests run in
forks of this process, which has imported the libraries, and nothing of the product. At the end, the tests that noticed
run on the whole tree.
Exits with 1 if a guard or its tests are not in their place, or if no test notices its removal.
"""

import argparse
import importlib
import io
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack, redirect_stdout
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import deselect_by_keyword
from guards import MUTATIONS, Edit, Mutation
from sqlalchemy import URL, create_engine
from sqlalchemy.pool import NullPool

ROOT = Path(__file__).parents[2]
SHOP = "tests/books"
CORES = os.cpu_count() or 1
PLACES = 2 * CORES  # the processor is idle while a test waits in vain
CRASHED = 99
SHORT_PATIENCE = 15  # seconds: without its guard, a test often waits in vain
LIBRARIES = ("apscheduler.schedulers.background", "flask_migrate", "flask_security", "psycopg", "prometheus_client")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", metavar="WORDS", default="", dest="words")
    parser.add_argument("--look", action="store_true")
    given = parser.parse_args()
    chosen = [
        mutation
        for mutation in MUTATIONS
        if is_here(mutation) and given.words in " ".join([mutation.guard, *files_of(mutation)])
    ]
    if not chosen:
        parser.error(f"no guard has {given.words!r} in its name or file")
    return look(chosen) if given.look else try_out(chosen)


def is_here(mutation: Mutation) -> bool:
    """Return False for a guard of the shop, in an application without the shop."""
    return not mutation.tests[0].startswith(f"{SHOP}/") or (ROOT / SHOP).exists()


def files_of(mutation: Mutation) -> list[str]:
    return [edit.file for edit in mutation.edits]


def look(chosen: Sequence[Mutation]) -> int:
    """Print the edits that do not fit, and the guards without a test. Return the exit code."""
    misfits = [misfit for mutation in chosen for edit in mutation.edits if (misfit := misfit_of(edit, ROOT))]
    os.chdir(ROOT)
    sys.path[0] = str(ROOT)
    finder = Finder(chosen)
    files = {name for mutation in chosen for name in mutation.tests if name.startswith("tests/")}
    with redirect_stdout(io.StringIO()) as said:
        code = pytest.main(["-q", "--collect-only", "-n0", "-p", "no:cacheprovider", *sorted(files)], [finder])
    if code:
        sys.exit(f"pytest ended with {code} as it collected the tests\n{said.getvalue()}")
    misfits += [f"No test is chosen for this guard: {guard}. Correct its -k." for guard in finder.missing]
    print("\n".join(misfits) or f"All {len(chosen)} guards are where they were.")
    return 1 if misfits else 0


class Finder:
    """A plugin of pytest, which looks for each guard's tests."""

    def __init__(self, chosen: Sequence[Mutation]) -> None:
        self._chosen = chosen
        self.missing: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item], config: pytest.Config) -> None:
        for mutation in self._chosen:
            tests = [*mutation.tests, ""]
            config.option.keyword = tests[tests.index("-k") + 1] if "-k" in tests else ""
            found = [item for item in items if item.nodeid.partition("::")[0] in tests]
            deselect_by_keyword(found, config)
            if not found:
                self.missing.append(mutation.guard)


def try_out(chosen: Sequence[Mutation]) -> int:
    """Remove each guard, on all cores. Return the exit code."""
    for name in LIBRARIES:
        importlib.import_module(name)
    start = runpy.run_path(str(ROOT / "background/testing/postgresql.py"))["started_server"]
    noticing: dict[str, str] = {}  # by the guard: the test that fails without it
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bookstore-mutations-")))
        free = [Place(folder / str(number), stack.enter_context(start())) for number in range(PLACES)]
        waiting, busy = list(chosen), dict[int, tuple[Mutation, Place]]()
        stack.callback(lambda: [os.kill(pid, signal.SIGKILL) for pid in busy])  # after an error
        while waiting or busy:
            if waiting and free:
                mutation, place = waiting.pop(0), free.pop()
                busy[place.begin(mutation)] = mutation, place
                continue
            pid, status = os.wait()
            mutation, place = busy.pop(pid)
            free.append(place)
            if test := place.end(mutation, os.waitstatus_to_exitcode(status)):
                noticing[mutation.guard] = test
    guards = [mutation.guard for mutation in chosen]
    bad = [
        f"Nothing fails without this guard: {guard}. Write the test that does."
        for guard in guards
        if guard not in noticing
    ]
    useless = failing({*noticing.values()}) if noticing else []
    bad += [
        f"{guard}: {test} fails with this guard, too, so it tells nothing of it."
        for guard, test in noticing.items()
        if test in useless
    ]
    print("\n".join(bad) or f"A test notices the removal of each of the {len(chosen)} guards.")
    return 1 if bad else 0


def failing(names: Collection[str]) -> list[str]:
    """Run the tests on the tree as it is. Return the names of those that fail."""
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", str(CORES), *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    failed = failed_tests(tests.stdout)
    if tests.returncode != bool(failed):
        sys.exit(f"pytest ended with {tests.returncode}\n{tests.stdout}{tests.stderr}")
    return failed


def failed_tests(said: str) -> list[str]:
    return re.findall(r"^FAILED (.+?)(?: - .*)?$", said, re.MULTILINE)


class Place:
    """A copy of the tree and a server, in which one guard at a time is missing."""

    def __init__(self, tree: Path, server: URL) -> None:
        self._tree, self._server, self._said = tree, server, tree.with_suffix(".txt")
        ignored = shutil.ignore_patterns(".*_cache", "__pycache__", ".git", ".venv", "instance")
        shutil.copytree(ROOT, tree, ignore=ignored)

    def begin(self, mutation: Mutation) -> int:
        """Remove the guard, and run its tests in a new process. Return the process id."""
        self._began = time.monotonic()
        for edit in mutation.edits:
            take_away(edit, self._tree)
        self._empty_the_server()
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        code = CRASHED
        try:
            code = self._run(mutation.tests)
        finally:
            os._exit(code)

    def _run(self, tests: Sequence[str]) -> int:
        """Run the tests in this process. Return the exit code of pytest."""
        said = os.open(self._said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(said, number)
        os.chdir(self._tree)
        sys.path[0] = str(self._tree)
        os.environ["TEST_PATIENCE"] = str(SHORT_PATIENCE)
        sys.dont_write_bytecode = False  # the next guard's tests start from the same compiled files
        code = pytest.main(["-q", "-x", "-n0", "--no-header", *tests], [self])
        sys.stdout.flush()
        return code

    def _empty_the_server(self) -> None:
        engine = create_engine(self._server, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            names = "SELECT datname FROM pg_database WHERE NOT datistemplate AND datname <> 'postgres'"
            for name in connection.exec_driver_sql(names).scalars().all():
                connection.exec_driver_sql(f'DROP DATABASE "{name}" WITH (FORCE)')

    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> URL | None:
        """Give the tests the server of this place instead of a new one."""
        if fixturedef.argname != "postgresql_server":
            return None
        fixturedef.cached_result = self._server, fixturedef.cache_key(request), None
        return self._server

    def end(self, mutation: Mutation, code: int) -> str | None:
        """Put the guard back. Return the name of the first test that failed without it, or None."""
        for edit in mutation.edits:
            shutil.copy2(ROOT / edit.file, self._tree / edit.file)
            Path(cache_from_source(str(self._tree / edit.file))).unlink(missing_ok=True)
        said = self._said.read_text()
        failed = failed_tests(said)
        if code not in (0, 1) or len(failed) != code:  # an error, not a failed test
            sys.exit(f"{mutation.guard}: pytest ended with {code}\n{said}")
        took = time.monotonic() - self._began
        print(f"{took:5.1f} s  without '{mutation.guard}': {failed[0] if failed else 'all pass'}", flush=True)
        return failed[0] if failed else None


def take_away(edit: Edit, tree: Path) -> None:
    if misfit := misfit_of(edit, tree):
        sys.exit(misfit)
    path = tree / edit.file
    path.write_text(path.read_text().replace(edit.before, edit.after))


def misfit_of(edit: Edit, tree: Path) -> str | None:
    """Return a sentence if the guard is not in its place, else None."""
    found = (tree / edit.file).read_text().count(edit.before)
    if found == edit.times:
        return None
    return f"{edit.file} has this {found} times, not {edit.times} times: {edit.before!r}"


if __name__ == "__main__":
    sys.exit(main())
