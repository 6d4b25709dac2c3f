"""`.ci/audit`, with answers of pip-audit as it prints them: a known vulnerability fails, whatever else is unknown."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import ROOT, environment, run

Audited = Callable[..., tuple[int, str]]
AWAY = {"is_away": True}
"""The answer of pip-audit where the network does not reach the service."""

BLIND = {"is_blind": True}
"""The answer of pip-audit where a mirror of packages stands for the service, and knows no advisories."""

FAKE = """#!{python}
import json
import sys

service = {services}[sys.argv[2]]
if "is_away" in service:
    sys.exit("ERROR:pip_audit._cli:Could not connect to the vulnerability feed")
vulnerable, unknown = service.get("vulnerable", ()), service.get("unknown", ())
packages = []
for line in open(sys.argv[4]):
    name, version = line.strip().split("==")
    is_old = (name, version) == ("jinja2", "2.4.1")
    if "is_blind" in service or (name in unknown and not is_old):
        packages.append({{"name": name, "skip_reason": f"Dependency not found: {{name}} ({{version}})"}})
    else:
        found = [{{"id": "PYSEC-2026-1", "fix_versions": ["99"]}}] if name in vulnerable or is_old else []
        packages.append({{"name": name, "version": version, "vulns": found}})
print(json.dumps({{"dependencies": packages, "fixes": []}}))
sys.exit(any(each.get("vulns") for each in packages))
"""


@pytest.fixture
def audited(tmp_path: Path) -> Audited:
    """Run `.ci/audit` with the answers of both services. Return its exit code and its output."""

    def audited(pypi: dict[str, object], osv: dict[str, object] = AWAY) -> tuple[int, str]:
        tool = tmp_path / "pip-audit"
        tool.write_text(FAKE.format(python=sys.executable, services={"pypi": pypi, "osv": osv}))
        tool.chmod(0o755)
        return run([sys.executable, ".ci/audit"], environment(PIP_AUDIT=tool), ROOT)

    return audited


def test_an_audit_of_packages_without_a_vulnerability_passes(audited: Audited) -> None:
    code, said = audited(pypi={})
    assert code == 0, said
    assert "\n0 known vulnerabilities in " in said
    assert "SKIPPED" not in said


def test_a_vulnerability_fails_even_if_another_package_is_unknown(audited: Audited) -> None:
    code, said = audited(pypi={"vulnerable": ["flask"], "unknown": ["gunicorn"]})
    assert code == 1, said
    assert "flask 3." in said
    assert "PYSEC-2026-1, repaired in 99" in said
    assert "so they were not audited: gunicorn 2" in said


def test_the_second_service_is_asked_about_the_packages_that_the_first_does_not_know(audited: Audited) -> None:
    code, said = audited(pypi={"unknown": ["gunicorn", "jinja2"]}, osv={"vulnerable": ["gunicorn", "flask"]})
    assert code == 1, said
    assert "gunicorn 2" in said
    assert "flask 3" not in said  # the first service knows it, and nothing wrong with it
    assert "not audited" not in said


def test_a_package_that_no_service_knows_is_named_and_skips_nothing(audited: Audited) -> None:
    code, said = audited(pypi={"unknown": ["gunicorn"]}, osv={"unknown": ["gunicorn"]})
    assert code == 0, said
    assert "so they were not audited: gunicorn 2" in said
    assert "SKIPPED" not in said


def test_an_audit_without_a_network_says_that_it_was_skipped(audited: Audited) -> None:
    code, said = audited(pypi=AWAY, osv=AWAY)
    assert code == 0, said
    assert said.splitlines()[-1].startswith("SKIPPED: nothing was audited.")
    assert "Could not connect" in said


def test_a_service_that_finds_nothing_wrong_with_a_bad_package_does_not_count(audited: Audited) -> None:
    code, said = audited(pypi=BLIND, osv={"vulnerable": ["flask"]})
    assert code == 1, said
    assert "flask 3" in said
    assert "not audited" not in said
    code, said = audited(pypi=BLIND, osv=BLIND)
    assert code == 0, said
    assert said.splitlines()[-1].startswith("SKIPPED: nothing was audited.")
