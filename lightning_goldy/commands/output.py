"""Where a command writes its results, the report that it ends with, and the processes that share its work out."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

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
        NotADirectoryError: A file is in its place, or above it.
        PermissionError: It cannot be made or written to.
        ValueError: It is an address of another storage.
    """
    if output is not None:
        folder = require_local(output, "--output")
        _require_place(folder)
        if (folder / "goldy" / analysis / ROWS).exists():
            raise FileExistsError(f"{folder} holds rows of {analysis} already; give another --output")
        # Before any process writes there.
        Replicas.world().meet("the folder of the results")
        return folder
    return next_version(Path("runs") / runs)


def _require_place(folder: Path) -> None:
    """Refuses a folder that results cannot be written to, before there are any, and without making it."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"--output {folder}: {there} is a file; give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"--output {folder}: {there} may not be written to")


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


_FISH = """\
function __goldy_at
  set -l words (commandline -opc)
  set -e words[1]
  set -l place
  for part in $words
    set -l next $place $part
    contains -- "$next" {places}; and set place $next
  end
  test "$place" = "$argv[1]"
end
{lines}
"""


def completion_script(
    parser: argparse.ArgumentParser, shell: Literal["bash", "zsh", "fish"], more: Mapping[str, Sequence[str]]
) -> str:
    """A script after which the shell completes commands, options, and the values of options with choices.

    Args:
        parser: Of the whole program.
        shell: Zsh runs the script of bash; fish has its own.
        more: Words of commands that another parser reads, by command.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> _ = parser.add_argument("--form", choices=["question", "cloze"])
        >>> "question cloze" in completion_script(parser, "bash", {})
        True
    """
    if shell == "fish":
        return _fish_script(parser, more)
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


def _fish_script(parser: argparse.ArgumentParser, more: Mapping[str, Sequence[str]]) -> str:
    places = _places(parser)
    lines = []
    for place, at in places.items():
        start = f"complete -c goldy -n {shlex.quote(f'__goldy_at {shlex.quote(place)}')}"
        for action in at._actions:
            if not action.option_strings:
                # Where words are listed, files are none of them.
                lines += [f"{start} -f -a {shlex.quote(' '.join(map(str, action.choices)))}"] if action.choices else []
                continue
            names = " ".join(
                f"-l {name[2:]}" if name[:2] == "--" else f"-s {name[1:]}" for name in action.option_strings
            )
            taken = " -r" if action.nargs != 0 else ""
            if action.choices:
                taken = f" -x -a {shlex.quote(' '.join(map(str, action.choices)))}"
            lines.append(f"{start} {names}{taken}")
        lines += [f"{start} -a {shlex.quote(word)}" for word in more.get(place, ())]
    return _FISH.format(
        places=" ".join(shlex.quote(place) for place in places if place) or "''", lines="\n".join(lines)
    )


def _places(parser: argparse.ArgumentParser, at: str = "") -> dict[str, argparse.ArgumentParser]:
    """The parsers of a program by the words that lead to them."""
    places = {at: parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                places |= _places(below, f"{at} {name}".strip())
    return places


_NEEDED = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE_SECONDS = 60.0
"""How long a process that has failed waits for the others, who may be inside a collective of a sharded model."""


@dataclass(frozen=True)
class Launch:
    """Which of several processes this is.

    Args:
        rank: Among all.
        size: Their number.
        local_rank: Among those of this machine.
        local_size: Their number.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def of(cls, environment: Mapping[str, str] | None = None) -> Launch | None:
        """What torchrun has told this process; None where it is alone.

        Args:
            environment: Variables by name; this process's by default.

        Raises:
            ValueError: Some of torchrun's variables are set, and others are not.

        Example:
            >>> told = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
            >>> Launch.of({**told, "MASTER_ADDR": "there", "MASTER_PORT": "29500"})
            Launch(rank=3, size=4, local_rank=1, local_size=2)
            >>> Launch.of({}) is None
            True
            >>> Launch.of(told)
            Traceback (most recent call last):
            ValueError: of torchrun's variables MASTER_ADDR and MASTER_PORT are missing; use it, or unset WORLD_SIZE=4
        """
        known = os.environ if environment is None else environment
        if "RANK" not in known or int(known.get("WORLD_SIZE", "1")) == 1:
            return None
        missing = [name for name in _NEEDED if name not in known]
        if missing:
            raise ValueError(
                f"of torchrun's variables {' and '.join(missing)} are missing; use it, or unset "
                f"WORLD_SIZE={known['WORLD_SIZE']}"
            )
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return cls(*(int(known[name]) for name in names))


@contextmanager
def joined_ranks(work: str) -> Iterator[Replicas]:
    """Joins the processes that torchrun started, and leaves printing to the first; alone nothing happens.

    Within, a process that fails is heard of by the others at their next exchange.

    Args:
        work: What is done, for the message.

    Yields:
        This process among all of them.

    Raises:
        ValueError: Some of torchrun's variables are missing.
        RankError: Another process has failed.
    """
    launch = Launch.of()
    if launch is None:
        yield Replicas()
        return
    begun = not dist.is_initialized()
    if begun:
        if torch.cuda.is_available():
            torch.cuda.set_device(launch.local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with ExitStack() as stack:
            ranks = Replicas.world()
            if ranks.rank:
                stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            stack.enter_context(ranks.together(work, patience=PATIENCE_SECONDS))
            yield ranks
    finally:
        if begun:
            dist.destroy_process_group()


def trainer_words(*, shard: bool) -> tuple[str, ...]:
    """How a trainer that only sets up is spread over the processes, in words of the command line.

    Args:
        shard: Whether parameters are spread over them too, rather than held whole by each.

    Raises:
        ValueError: There is one process to shard over.

    Example:
        >>> trainer_words(shard=False)
        ('--trainer.devices=1', '--trainer.num_nodes=1', '--trainer.strategy=auto')
    """
    launch = Launch.of()
    if launch is None:
        if shard:
            raise ValueError(
                "--shard spreads the model over several processes, and this is one: start it with torchrun "
                "--nproc-per-node N -m lightning_goldy.cli analyze ... --shard"
            )
        return "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto"
    strategy = "ddp"
    if shard:
        sizes = {"data_parallel_size": launch.size, "tensor_parallel_size": 1}
        kind = "lightning.pytorch.strategies.ModelParallelStrategy"
        strategy = json.dumps({"class_path": kind, "init_args": sizes})
    return (
        f"--trainer.devices={launch.local_size}",
        f"--trainer.num_nodes={launch.size // launch.local_size}",
        f"--trainer.strategy={strategy}",
    )
