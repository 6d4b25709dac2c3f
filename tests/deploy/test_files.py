"""The files of deploy/, each checked by the tool that reads it, and the times that must fit together."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from support.processes import ROOT, environment, run

from background.settings import SETTINGS

DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def checked_by(tool: str, package: str, *arguments: object, **env: str) -> str:
    """Run the tool, and return its output. Skip the test where the tool is missing."""
    if not shutil.which(tool):
        pytest.skip(f"needs {tool}, {package}")
    code, said = run([tool, *map(str, arguments)], environment(**env))
    assert code == 0, said
    return said


# -- each file -------------------------------------------------------------------------------------


@pytest.fixture
def units(tmp_path: Path) -> list[Path]:
    """Give the units with commands that exist here."""
    for unit in UNITS:
        text = unit.read_text(encoding="utf-8").replace("/opt/bookstore/.venv/bin/", f"{Path(sys.executable).parent}/")
        (tmp_path / unit.name).write_text(text)
    return sorted(tmp_path.iterdir())


def test_systemd_finds_nothing_wrong_with_the_units(units: list[Path]) -> None:
    said = checked_by("systemd-analyze", "of Debian's package systemd", "verify", "--man=no", *units)
    assert not [line for line in said.splitlines() if "bookstore" in line]


def test_systemd_rates_the_units_as_confined(units: list[Path]) -> None:
    for unit in units:
        limit = ("--offline=true", "--threshold=20")  # in tenths: 92 without any hardening
        checked_by("systemd-analyze", "of Debian's package systemd", "security", "--no-pager", *limit, unit)


def test_docker_compose_accepts_the_composition_once_there_is_a_key() -> None:
    file = ("-f", DEPLOY / "compose.yaml", "config")
    said = checked_by("docker-compose", "of Debian's package of that name", *file, SECRET_KEY="of-the-tests")
    assert said.count("SECRET_KEY: of-the-tests") == 3  # web, workers and migrate
    code, said = run(["docker-compose", *map(str, file)], {**environment(), "SECRET_KEY": ""})
    assert code != 0
    assert "expected a random text" in said


def test_no_port_of_the_host_belongs_to_a_service_that_is_scaled() -> None:
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    services = dict(re.findall(r"^  (\w+):\n((?:    .*\n|\n)*)", text, re.MULTILINE))
    assert {name for name, its in services.items() if "ports:" in its} == {"proxy", "mail"}
    assert {"web", "workers", "migrate", "database"} < services.keys()


@pytest.mark.parametrize(
    ("schema", "path"),
    [("vendor.compose-spec", DEPLOY / "compose.yaml"), ("vendor.github-workflows", ROOT / ".github/workflows/ci.yml")],
)
def test_the_file_fits_its_schema(schema: str, path: Path) -> None:
    checked_by("check-jsonschema", "of PyPI", "--builtin-schema", schema, path)


def test_the_manifests_fit_the_schemas_of_kubernetes() -> None:
    said = checked_by("kubernetes-validate", "of PyPI", "--strict", "--no-warn", DEPLOY / "kubernetes.yaml")
    kinds = re.findall(r"passed for resource (\w+)/", said)
    assert sorted(kinds) == ["configmap", "deployment", "deployment", "job", "service"]


def test_prometheus_accepts_its_configuration_and_finds_the_alerts() -> None:
    said = checked_by("promtool", "of Debian's package prometheus", "check", "config", DEPLOY / "prometheus.yml")
    assert len(re.findall(r"alerts\.yml\s+SUCCESS: \d+ rules found", said)) == 2, said


def test_the_workflow_runs_the_same_checks_as_everywhere_else() -> None:
    assert "run: bash .ci/run\n" in (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci" / "run", os.R_OK)


# -- the times -------------------------------------------------------------------------------------


def seconds(pattern: str, path: str) -> list[int]:
    found = re.findall(pattern, (DEPLOY / path).read_text(encoding="utf-8"))
    assert found, pattern
    return [int(each) for each in found]


def of_gunicorn(name: str) -> int:
    [found] = re.findall(rf"^{name} = (\d+)$", (ROOT / "gunicorn.conf.py").read_text(encoding="utf-8"), re.MULTILINE)
    return int(found)


def test_each_supervisor_waits_longer_than_the_shop_takes_to_stop() -> None:
    shutdown = SETTINGS["WORKERS_SHUTDOWN_SECONDS"].default
    graceful = of_gunicorn("graceful_timeout")
    assert shutdown < graceful
    [web] = seconds(r"TimeoutStopSec=(\d+)", "systemd/bookstore-web.service")
    [workers] = seconds(r"TimeoutStopSec=(\d+)", "systemd/bookstore-workers.service")
    of_compose = seconds(r"stop_grace_period: (\d+)s", "compose.yaml")
    of_kubernetes = seconds(r"terminationGracePeriodSeconds: (\d+)", "kubernetes.yaml")
    [pause] = seconds(r'command: \[sleep, "(\d+)"\]', "kubernetes.yaml")
    assert all(given > graceful for given in (web, of_compose[0], of_kubernetes[0] - pause, of_kubernetes[1]))
    assert all(given > shutdown for given in (workers, of_compose[1]))


def test_nginx_waits_longer_for_an_answer_than_gunicorn_does() -> None:
    [read] = seconds(r"proxy_read_timeout (\d+)s", "nginx/proxy.conf")
    assert read > of_gunicorn("timeout")


def test_each_file_says_which_part_is_tested() -> None:
    for path in [*DEPLOY.rglob("*"), ROOT / ".github" / "workflows" / "ci.yml"]:
        if path.is_file():
            head = path.read_text(encoding="utf-8").partition("\n\n")[0]
            assert "Tested: " in head, path
