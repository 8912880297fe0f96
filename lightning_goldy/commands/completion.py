"""``goldy completion``: a script for the shell, made of the parsers."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from typing import Literal

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
