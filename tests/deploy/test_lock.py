"""requirements.lock: a version and hashes for each package of a deployment, and nothing about its maker."""

import re
from collections.abc import Iterator
from importlib.metadata import distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.processes import ROOT

LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+) \\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", LOCK, re.MULTILINE))


def required() -> list[Requirement]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    return [Requirement(line) for line in lines if line]


def dependencies(requirement: Requirement, seen: set[str]) -> Iterator[Requirement]:
    """Yield the requirement, and the requirements of the package that is installed here for it."""
    yield requirement
    name = canonicalize_name(requirement.name)
    for line in distribution(name).requires or ():
        further = Requirement(line)
        wanted = further.marker is None or any(
            further.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)
        )
        if wanted and (key := f"{name} {line}") not in seen:
            seen.add(key)
            yield from dependencies(further, seen)


def test_each_package_of_a_deployment_is_locked_at_a_version_that_all_others_accept() -> None:
    seen: set[str] = set()
    needed = [each for requirement in required() for each in dependencies(requirement, seen)]
    assert len({each.name for each in needed}) > 40
    for each in needed:
        version = PINNED.get(canonicalize_name(each.name))
        assert version, f"requirements.lock lacks {each}. Run `make lock`."
        assert each.specifier.contains(version), f"requirements.lock has {each.name} {version}. Run `make lock`."


def test_each_line_of_the_lock_is_a_version_a_hash_or_a_comment() -> None:
    assert len(PINNED) == len(re.findall(r"^[^\s#]", LOCK, re.MULTILINE))
    assert not re.search(r"https?:|file:|--(index|extra|find|trusted)|-r /", LOCK)


@pytest.mark.parametrize("path", ["deploy/Dockerfile", "docs/deploying.md"])
def test_a_deployment_installs_by_hash(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert re.search(r"pip install [^\n]*--require-hashes[^\n]* -r \S*requirements\.lock", text)
    assert not re.search(r"pip install [^\n]*requirements\.txt", text)
