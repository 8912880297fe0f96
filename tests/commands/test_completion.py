"""What the shell offers after ``goldy completion``."""

from __future__ import annotations

import shlex
import shutil
import subprocess

import pytest

from lightning_goldy.cli import COMMANDS, main

ASKED = """
ask() { COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _goldy; echo "${COMPREPLY[*]}"; }
ask goldy ""
ask goldy re
ask goldy masks co
ask goldy masks combine a
ask goldy report run --
ask goldy basin a.ckpt --method ""
ask goldy fit --tr
"""


def test_commands_options_and_choices_are_completed(capsys: pytest.CaptureFixture[str]) -> None:
    if not shutil.which("bash"):
        pytest.skip("there is no bash")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out + ASKED
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    everything, *others = shown.stdout.splitlines()
    assert set(COMMANDS) <= set(everything.split())
    assert others == [
        "report recipes",
        "compare combine",
        "and",
        "--help --compare --output --json",
        "rays bridge auto",
        "--trainer.",
    ]
    assert shown.stderr == ""


def test_fish_is_told_the_same_words_place_by_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 0
    script = capsys.readouterr().out
    lines = script.splitlines()
    listed = next(line for line in lines if line.startswith("complete") and " -f -a " in line)
    assert set(shlex.split(shlex.split(listed)[-1])) == set(COMMANDS)
    at = "complete -c goldy -n '__goldy_at "
    assert f"{at}basin' -l method -x -a 'rays bridge auto'" in lines
    assert f"{at}report' -l json" in lines
    assert f"{at}report' -l output -r" in lines
    assert f"{at}fit' -a --trainer." in lines
    if shutil.which("fish"):
        asked = (
            "goldy re",
            "goldy masks co",
            "goldy masks combine a",
            "goldy basin a.ckpt --method ",
            "goldy fit --tr",
        )
        words = [f"complete -C {shlex.quote(line)}; echo ." for line in asked]
        command = ["fish", "--no-config", "-c", "\n".join([script, *words])]
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        assert shown.stderr == ""
        offered = [set(part.split()) for part in shown.stdout.split(".\n")[:-1]]
        assert offered[:2] == [{"report", "recipes"}, {"compare", "combine"}]
        assert "and" in offered[2]
        assert offered[3] == {"rays", "bridge", "auto"}


def test_zsh_runs_the_same_script(capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "bash"])
    script = capsys.readouterr().out
    main(["completion", "zsh"])
    assert capsys.readouterr().out == f"autoload -Uz bashcompinit && bashcompinit\n{script}"
