"""Where a command writes its results, and the report that it ends with."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from lightning_goldy.callbacks.engine.store import ROWS
from lightning_goldy.core.files import printable, require_local
from lightning_goldy.core.sharding import Replicas


def output_folder(output: str | Path | None, analysis: str, runs: str) -> Path:
    """The folder that was asked for, or a numbered one of its own, the same on all processes.

    Args:
        output: What was asked for; None for ``runs/<runs>/version_<n>``.
        analysis: The analysis whose rows will lie below ``goldy/``.
        runs: Folder of the numbered ones.

    Raises:
        FileExistsError: The folder holds such rows already.
        ValueError: It is an address of another storage.
    """
    if output is not None:
        folder = require_local(output, "--output")
        if (folder / "goldy" / analysis / ROWS).exists():
            raise FileExistsError(f"{folder} holds rows of {analysis} already; give another --output")
        # Before any process writes there.
        Replicas.world().meet("the folder of the results")
        return folder
    return next_version(Path("runs") / runs)


def next_version(folder: Path) -> Path:
    """The next free ``version_<n>`` below a folder, as the first process sees it.

    Example:
        >>> next_version(Path("nowhere"))
        PosixPath('nowhere/version_0')
    """
    number = 0
    while (folder / f"version_{number}").exists():
        number += 1
    return folder / f"version_{Replicas.world().gather_objects(number)[0]}"


def print_report(folder: Path) -> None:
    """Writes the report of a folder and prints where it is, or why there is none."""
    from lightning_goldy.report.page import write_report

    try:
        print(printable(f"report: {write_report(folder)}"))
    except ImportError as error:
        print(printable(f"no report: {error}"))


_SCRIPT = """\
_goldy() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" place="" words="" part
  for part in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "${{place:+$place }}$part" in {places}) place="${{place:+$place }}$part";; esac
  done
  case "$place:$before" in
{values}
    *) case "$place" in
{words}
    esac;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  case "${{COMPREPLY[0]}}" in *.) compopt -o nospace 2>/dev/null;; esac
}}
complete -o default -F _goldy goldy
"""


def completion_script(
    parser: argparse.ArgumentParser, shell: Literal["bash", "zsh"], more: Mapping[str, Sequence[str]]
) -> str:
    """A script after which the shell completes commands, options, and the values of options with choices.

    Args:
        parser: Of the whole program.
        shell: Zsh runs the script of bash.
        more: Words of commands that another parser reads, by command.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> _ = parser.add_argument("--form", choices=["question", "cloze"])
        >>> "question cloze" in completion_script(parser, "bash", {})
        True
    """
    places, values, words = [], [], []
    for place, at in _places(parser).items():
        options = [option for action in at._actions for option in action.option_strings]
        listed = [choice for action in at._actions if not action.option_strings for choice in action.choices or ()]
        told = " ".join([*listed, *options, *more.get(place, ())])
        words.append(f"      {shlex.quote(place)}) words={shlex.quote(told)};;")
        places += [shlex.quote(place)] if place else []
        for action in at._actions:
            if action.option_strings and action.choices:
                cases = "|".join(shlex.quote(f"{place}:{option}") for option in action.option_strings)
                values.append(f"    {cases}) words={shlex.quote(' '.join(map(str, action.choices)))};;")
    script = _SCRIPT.format(places="|".join(places) or "''", values="\n".join(values), words="\n".join(words))
    return f"autoload -Uz bashcompinit && bashcompinit\n{script}" if shell == "zsh" else script


def _places(parser: argparse.ArgumentParser, at: str = "") -> dict[str, argparse.ArgumentParser]:
    """The parsers of a program by the words that lead to them."""
    places = {at: parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                places |= _places(below, f"{at} {name}".strip())
    return places
