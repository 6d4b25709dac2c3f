"""Executes a Dockerfile's instructions, each in a root file system of its own above this machine's, without Docker."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.processes import ROOT, Process, started

PLENTY_BYTES = 10**9
SYSTEM_PYTHON = "/usr/bin/python3"  # has Docker's own rules for .dockerignore, of Debian's docker-compose
_CONTEXT = """
import sys
from docker.utils.build import exclude_paths
lines = [line.strip() for line in open(sys.argv[1] + "/.dockerignore") if line.strip() and line[0] != "#"]
print("\\0".join(exclude_paths(sys.argv[1], lines)))
"""
_MOUNTED = """
set -e
mount -t overlay overlay -o "lowerdir=/,upperdir=$UPPER,workdir=$WORK" "$ROOT"
mount --rbind /proc "$ROOT/proc"
mount --rbind /dev "$ROOT/dev"
"""
# The base image's Python is this one, in a folder that only root may search.
_AS_USER = "setpriv --reuid {0} --regid {0} --clear-groups --inh-caps=+dac_read_search --ambient-caps=+dac_read_search"


class Image:
    """The result of a stage: files above this machine's, and the settings of its processes."""

    def __init__(self, folder: Path) -> None:
        self.upper, self._work, self._root = (folder / name for name in ("upper", "work", "root"))
        for each in (self.upper, self._work, self._root):
            each.mkdir(parents=True)
        self.env = {"PATH": f"{self._base_image()}:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.workdir, self.user = "/", "0"
        self.command: list[str] = []
        self.check: list[str] = []

    def _base_image(self) -> Path:
        """Give the image a command `python`, this machine's. Return its folder."""
        python = _base_python()
        if not python.with_name("python").exists():
            self.file(str(python.parent)).mkdir(parents=True)
            self.file(str(python.with_name("python"))).symlink_to(python.name)
        return python.parent

    def file(self, path: str) -> Path:
        return self.upper / path.lstrip("/")

    def shell(self, script: str, mounts: str = "", own_network: bool = False) -> list[str]:
        """Return the command that executes `script` in the image. `mounts` is executed before, outside it."""
        network = ["--net"] if own_network else []
        inside = f"cd {self.workdir} && exec {_AS_USER.format(self.user) if self.user != '0' else ''} {script}"
        prepare = _MOUNTED + ("ip link set lo up\n" if own_network else "") + mounts
        outside = f'{prepare}\nexec chroot "$ROOT" sh -c {shlex.quote(inside)}'
        return ["unshare", "--mount", *network, "sh", "-c", outside]

    def environment(self, **more: str) -> dict[str, str]:
        ours = {"UPPER": self.upper, "WORK": self._work, "ROOT": self._root}
        return self.env | {name: str(path) for name, path in ours.items()} | more

    def run(self, script: str, own_network: bool = False, **more: str) -> str:
        """Execute a shell's line in the image, as its user, and return the output."""
        command = self.shell(f"sh -c {shlex.quote(script)}", own_network=own_network)
        done = subprocess.run(command, env=self.environment(**more), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (script, done.stdout + done.stderr)
        return done.stdout

    @contextmanager
    def started(self, mounts: str = "", **more: str) -> Iterator[Process]:
        """Start the image's command on a read-only root file system, and with a network of its own."""
        mounts += 'mount -o remount,ro "$ROOT"'
        command = self.shell(shlex.join(self.command), mounts, own_network=True)
        with started(command, self.environment(**more)) as process:
            yield process

    def beside(self, process: Process, *command: str) -> int:
        """Execute the command beside `process`, in its file system and network. Return the exit code."""
        inside = ["nsenter", "--target", str(process.pid), "--mount", "--net", "--root", "--wd"]
        return subprocess.run([*inside, *command], env=self.env, capture_output=True, timeout=30).returncode


def needs_namespaces() -> None:
    """Skip the test where this user cannot make a file system above this machine's and a network of its own."""
    if missing := [each for each in ("unshare", "nsenter", "setpriv", "ip") if not shutil.which(each)]:
        pytest.skip(f"needs {', '.join(missing)}, of Debian's packages util-linux and iproute2")
    if shutil.disk_usage("/dev/shm").free < PLENTY_BYTES:
        pytest.skip(f"needs {PLENTY_BYTES / 10**9:g} GB in /dev/shm")
    needed = " && ".join(f'test -e "$PWD/root{path}"' for path in (sys.prefix, _base_python(), ROOT))
    mount = f"mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root && {needed}"
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for name in ("upper", "work", "root"):
            (Path(folder) / name).mkdir()
        tried = subprocess.run(["unshare", "--mount", "--net", "sh", "-c", mount], cwd=folder, capture_output=True)
    if tried.returncode:
        pytest.skip(f"needs root, namespaces, and the project on the root file system: {tried.stderr.decode()}")


def _base_python() -> Path:
    """Return this interpreter, outside its environment."""
    return Path(sys._base_executable).resolve()  # type: ignore[attr-defined]


def build(dockerfile: Path, context: Path, **arguments: str) -> Iterator[Image]:
    """Execute the instructions, and give the image of the last stage."""
    needs_namespaces()
    memory = Path(tempfile.mkdtemp(prefix="bookstore-image-", dir="/dev/shm"))
    stages: dict[str, Image] = {}
    try:
        for instruction, rest in _instructions(dockerfile.read_text(encoding="utf-8")):
            if instruction == "FROM":
                name = rest.partition(" AS ")[2] or "last"
                assert name not in stages, name
                image = stages[name] = Image(memory / name)
            else:
                _execute(image, instruction, rest, context, stages, arguments)
        yield image
    finally:
        shutil.rmtree(memory)


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    for line in filter(None, lines.splitlines()):
        instruction, _, rest = line.partition(" ")
        yield instruction, rest.strip()


def _execute(
    image: Image, instruction: str, rest: str, context: Path, stages: Mapping[str, Image], arguments: Mapping[str, str]
) -> None:
    match instruction:
        case "RUN":
            assert image.user == "0", "this user would leave no files for the next instruction"
            image.run(rest, **_of_pip())
        case "COPY":
            _copy(image, rest, context, stages)
        case "ENV":
            image.env |= dict(pair.split("=", 1) for pair in shlex.split(_filled(rest, image.env)))
        case "ARG":
            image.env |= {rest: arguments[rest]}
        case "WORKDIR":
            image.workdir = rest
            image.file(rest).mkdir(parents=True)
        case "USER":
            image.user = rest.partition(":")[0]
            assert rest == f"{image.user}:{image.user}"
        case "HEALTHCHECK":
            image.check = _exec_form(rest.partition("CMD")[2])
        case "CMD":
            image.command = _exec_form(rest)
        case "EXPOSE":
            assert rest == image.env["PORT"]
        case _:
            raise AssertionError(f"{instruction} is not known here")


def _filled(text: str, env: Mapping[str, str]) -> str:
    return re.sub(r"\$(\w+)", lambda name: env[name[1]], text)


def _exec_form(text: str) -> list[str]:
    command: Any = json.loads(text)  # a shell's form, which would not hand SIGTERM on, is not JSON
    assert isinstance(command, list)
    return command


def _copy(image: Image, rest: str, context: Path, stages: Mapping[str, Image]) -> None:
    *options, source, target = rest.split()
    to = image.file(target if target.startswith("/") else f"{image.workdir}/{target}")
    if options:
        origin = stages[options[0].removeprefix("--from=")].file(source)
        shutil.copytree(origin, to, symlinks=True)
    elif source == ".":
        for name in _context_files(context):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            if (context / name).is_file():
                shutil.copy2(context / name, to / name)
    else:
        shutil.copy2(context / source, to)


def _context_files(context: Path) -> list[str]:
    done = subprocess.run([SYSTEM_PYTHON, "-c", _CONTEXT, str(context)], capture_output=True, text=True)
    if "No module named 'docker'" in done.stderr:
        pytest.skip("needs Debian's docker-compose, for Docker's rules of .dockerignore")
    assert done.returncode == 0, done.stderr
    return [name for name in done.stdout.rstrip("\n").split("\0") if name]


def _of_pip() -> dict[str, str]:
    """Return the settings of pip and of this machine's network."""
    kept = re.compile(r"PIP_|HOME$|SSL_CERT|REQUESTS_CA|.*_proxy$", re.IGNORECASE)
    return {name: value for name, value in os.environ.items() if kept.match(name)}
