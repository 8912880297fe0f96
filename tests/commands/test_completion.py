"""What the shell offers after ``goldy completion``."""

from __future__ import annotations

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


def test_zsh_runs_the_same_script(capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "bash"])
    script = capsys.readouterr().out
    main(["completion", "zsh"])
    assert capsys.readouterr().out == f"autoload -Uz bashcompinit && bashcompinit\n{script}"
