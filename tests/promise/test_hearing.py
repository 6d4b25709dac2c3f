"""Signals under servers that know nothing of the engine. Runs get a stop request, then time to finish."""

import signal
import sys
import urllib.request

import pytest
from flask import Flask
from support.processes import environment, flask, margin, started
from support.run_traces import Effects


def script(call: str) -> list[str]:
    return [sys.executable, "-c", f"from support import traced_app; traced_app.{call}()"]


def uvicorn(application: str) -> list[str]:
    return [sys.executable, "-m", "uvicorn", "--port", "0", "--factory", application]


OTHERS = {
    "waitress": [sys.executable, "-m", "waitress", "--listen=127.0.0.1:0", "--call", "support.traced_app:create_app"],
    "uvicorn-a2wsgi": uvicorn("support.traced_app:by_a2wsgi"),
    "uvicorn-asgiref": uvicorn("support.traced_app:by_asgiref"),
    "app-run": script("by_app_run"),
    "loop": script("with_a_loop"),
}


@pytest.mark.parametrize("server", OTHERS)
def test_a_signal_is_heard_under_any_server_even_if_the_workers_start_in_the_thread_of_a_request(
    server: str, postgresql_url: str
) -> None:
    effects = Effects(postgresql_url)
    env = environment(postgresql_url, PROBE_WORKERS="listener,deaf", PROBE_SECONDS=2, WORKERS_SHUTDOWN_SECONDS=20)
    with started(OTHERS[server], env) as process:
        address = process.wait_for(r"(http://127\.0\.0\.1:\d+)")[1]
        with urllib.request.urlopen(address, timeout=30) as response:
            assert response.status == 200
        process.wait_for("The listener began")
        process.wait_for("The deaf one began")
        process.signal(signal.SIGTERM)
        process.wait_for("The listener was told", timeout=margin(5))
        assert process.wait() == 0, process.output
        assert "Traceback" not in process.output
        assert "is not heard" not in process.output
    assert effects.states("listener") == [("handed back", 1)]
    assert effects.states("deaf") == [("succeeded", 1)], "it was waited for"
    assert effects.instances(alive=True) == set()


@pytest.mark.parametrize("command", [flask("run", "--debug", "--port", "0"), script("by_app_run_in_debug_mode")])
def test_on_sigterm_the_debug_reloader_lets_its_child_hand_its_runs_back(command: list[str], sqlite_url: str) -> None:
    effects = Effects(sqlite_url)
    with started(command, environment(sqlite_url, PROBE_WORKERS="listener,deaf", PROBE_SECONDS=2)) as process:
        address = process.wait_for(r"Running on (http://127\.0\.0\.1:\d+)")[1]
        with urllib.request.urlopen(address, timeout=30) as response:
            assert response.status == 200
        process.wait_for("The listener began")
        process.wait_for("The deaf one began")
        process.signal(signal.SIGTERM)
        process.wait()
        assert "The listener was told" in process.output
        assert "Traceback" not in process.output
    assert effects.states("listener") == [("handed back", 1)]
    assert effects.instances(alive=True) == set()


def test_the_log_says_at_the_start_that_signals_cannot_be_heard(sqlite_url: str) -> None:
    with started(script("made_in_a_thread"), environment(sqlite_url)) as process:
        address = process.wait_for(r"(http://127\.0\.0\.1:\d+)")[1]
        with urllib.request.urlopen(address, timeout=30) as response:
            assert response.status == 200
        process.wait_for("SIGTERM is not heard in this process")
        assert process.output.count("is not heard") == 1
        assert "flask workers run" in process.output


def test_a_process_without_workers_handles_a_signal_as_without_the_engine(sqlite_url: str) -> None:
    rest = "while True: time.sleep(0.05)"  # a longer sleep might begin right after the signal
    command = [
        sys.executable,
        "-c",
        f"import time; from support import traced_app; traced_app.create_app(); print('made')\n{rest}",
    ]
    with started(command, environment(sqlite_url)) as process:
        process.wait_for("made")
        process.signal(signal.SIGTERM)
        assert process.wait() == -signal.SIGTERM
    with started(command, environment(sqlite_url)) as process:
        process.wait_for("made")
        process.signal(signal.SIGINT)
        process.wait()
        assert "KeyboardInterrupt" in process.output


def test_a_caller_that_asks_for_a_handler_gets_its_own_handler_and_not_the_engines(app: Flask) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for handler in (lambda number, frame: None, signal.SIG_IGN, signal.SIG_DFL, signal.default_int_handler):
        last = signal.getsignal(signal.SIGTERM)
        assert signal.signal(signalnum=signal.SIGTERM, handler=handler) == last
        assert signal.getsignal(signalnum=signal.SIGTERM) == handler
    assert signal.signal(signal.SIGTERM, before) == signal.default_int_handler
    with pytest.raises(TypeError):
        signal.signal(signal.SIGTERM, "no handler")  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGTERM) == before
