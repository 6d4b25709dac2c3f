"""The completion of names, topics and states, by bash."""

import os
from collections.abc import Callable
from pathlib import Path

from support.processes import flask, run

Env = Callable[..., dict[str, str]]


def completed(env: dict[str, str], line: str) -> list[str]:
    """Complete the last word of the line, as bash does after the documented line of ~/.bashrc."""
    script = f"""
        eval "$(_FLASK_COMPLETE=bash_source flask)"
        COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _flask_completion flask; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = os.pathsep.join((str(Path(flask()[0]).parent), env["PATH"]))
    code, said = run(["bash", "-c", script], env | {"PATH": path})
    assert code == 0, said
    return said.split()


def test_bash_completes_names_topics_and_states_while_the_database_is_away(env: Env) -> None:
    away = env(DATABASE_URL="postgresql+psycopg://shop@127.0.0.1:9/none")
    assert completed(away, "flask workers history m") == ["morning_report_worker"]
    assert completed(away, "flask workers run morning_report_worker ''") == [
        "order_worker",
        "passive_user_checker_worker",
    ]
    assert completed(away, "flask workers history NAME --state ha") == ["handed-back"]
    assert completed(away, "flask messages list --state d") == ["dead", "discarded", "done"]
    assert completed(away, "flask messages retry --all --topic ''") == ["orders"]
    assert completed(away, "flask messages pause o") == ["orders"]
    assert completed(away, "flask workers res") == ["reschedule", "resume"]
