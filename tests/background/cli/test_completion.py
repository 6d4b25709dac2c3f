"""The completion of names, topics and states, by bash, zsh and fish."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from shlex import quote

import pytest
from support.databases import on_sqlite
from support.processes import ROOT, flask, run

OPERATING = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
Env = Callable[..., dict[str, str]]


LINES = {
    "flask workers history m": ["morning_report_worker"],
    "flask workers run morning_report_worker ''": ["order_worker", "passive_user_checker_worker"],
    "flask workers history NAME --state ha": ["handed-back"],
    "flask messages list --state d": ["dead", "discarded", "done"],
    "flask messages pause o": ["orders"],
    "flask workers res": ["reschedule", "resume"],
}


FEW = {line: LINES[line] for line in list(LINES)[1:4]}
"""Another shell needs no more lines: their words come from the same code."""


def away(env: Env, **more: str) -> dict[str, str]:
    """Return an environment with the command `flask` and without a database."""
    found = env(DATABASE_URL="postgresql+psycopg://shop@127.0.0.1:9/none")
    return found | {"PATH": os.pathsep.join((str(Path(flask()[0]).parent), found["PATH"]))} | more


def documented(shell: str) -> str:
    """Return the line that docs/operating.md has for the file of that shell."""
    found = re.search(rf"^\| {shell} \| \S+ \| `(.+)` \|$", OPERATING, re.MULTILINE)
    assert found
    return found[1].replace("\\|", "|")


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"there is no {shell} (apt install {shell})")


@pytest.mark.promise
@on_sqlite
def test_bash_completes_names_topics_and_states_while_the_database_is_away(env: Env) -> None:
    """Complete the last word of each line, as bash does after the documented line of ~/.bashrc."""
    script = ['eval "$(_FLASK_COMPLETE=bash_source flask)"']
    for line in LINES:
        script += [f"COMP_WORDS=({line}) COMPREPLY=()", "COMP_CWORD=$((${#COMP_WORDS[@]} - 1))"]
        script += ["_flask_completion flask", 'echo "${COMPREPLY[@]}"']
    code, said = run(["bash", "-c", "\n".join(script)], away(env))
    assert code == 0
    assert said.splitlines() == [" ".join(words) for words in LINES.values()]


@pytest.mark.promise
@needs("zsh")
@on_sqlite
def test_zsh_completes_what_a_user_types_after_the_documented_line(env: Env, tmp_path: Path) -> None:
    first = "autoload -Uz compinit && compinit"
    assert f"In zsh, the line `{first}` must stand before it." in OPERATING
    (tmp_path / ".zshrc").write_text(f"{first}\n{documented('zsh')}\n", encoding="utf-8")
    script = ["zmodload zsh/zpty", "zpty terminal zsh -i"]
    for line, words in FEW.items():  # ^U empties the line before
        typed = quote(line.removesuffix("''"))
        script += [f"zpty -w -n terminal $'\\C-u'{typed}$'\\t'", f"zpty -r -m terminal said '*{'*'.join(words)}*'"]
    code, said = run(["zsh", "-f", "-c", "\n".join([*script, "zpty -d"])], away(env, ZDOTDIR=str(tmp_path)))
    assert (code, said) == (0, "")


@pytest.mark.promise
@needs("fish")
@on_sqlite
def test_fish_completes_names_topics_and_states_by_the_documented_line(env: Env, tmp_path: Path) -> None:
    file = tmp_path / "fish" / "completions" / "flask.fish"
    file.parent.mkdir(parents=True)
    file.write_text(documented("fish"), encoding="utf-8")
    script = [f"echo (complete -C {quote(line.removesuffix(chr(39) * 2))} | string split -f1 \\t)" for line in FEW]
    code, said = run(["fish", "-c", "\n".join(script)], away(env, XDG_CONFIG_HOME=str(tmp_path), HOME=str(tmp_path)))
    assert code == 0, said
    assert [line.split() for line in said.splitlines()] == list(FEW.values())
