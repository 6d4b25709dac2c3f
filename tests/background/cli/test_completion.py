"""The completion of names, topics and states, by bash."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.databases import on_sqlite
from support.processes import flask, run

Env = Callable[..., dict[str, str]]


LINES = {
    "flask workers history m": ["morning_report_worker"],
    "flask workers run morning_report_worker ''": ["order_worker", "passive_user_checker_worker"],
    "flask workers history NAME --state ha": ["handed-back"],
    "flask messages list --state d": ["dead", "discarded", "done"],
    "flask messages pause o": ["orders"],
    "flask workers res": ["reschedule", "resume"],
}


@pytest.mark.promise
@on_sqlite
def test_bash_completes_names_topics_and_states_while_the_database_is_away(env: Env) -> None:
    """Complete the last word of each line, as bash does after the documented line of ~/.bashrc."""
    script = ['eval "$(_FLASK_COMPLETE=bash_source flask)"']
    for line in LINES:
        script += [f"COMP_WORDS=({line}) COMPREPLY=()", "COMP_CWORD=$((${#COMP_WORDS[@]} - 1))"]
        script += ["_flask_completion flask", 'echo "${COMPREPLY[@]}"']
    away = env(DATABASE_URL="postgresql+psycopg://shop@127.0.0.1:9/none")
    path = os.pathsep.join((str(Path(flask()[0]).parent), away["PATH"]))
    code, said = run(["bash", "-c", "\n".join(script)], away | {"PATH": path})
    assert code == 0
    assert said.splitlines() == [" ".join(words) for words in LINES.values()]
