"""``goldy coupling``: what a model's knowledge is coupled to, without training."""

from __future__ import annotations

import argparse
from typing import Any


def add_coupling(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to those of ``goldy``.

    Args:
        commands: The sub-commands.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_coupling(parser.add_subparsers())
        >>> parser.parse_args(["coupling", "--model", "base", "--data", "atlas", "--edits", "5"]).edits
        '5'
    """
    parser = commands.add_parser(
        "coupling",
        help="which answers learn together: goldy coupling --model MODEL --data FILE",
        description="Cosines between the gradients of answers, their statistics and figures, and with --edits what "
        "edits do to other answers. Nothing is trained.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="MODEL", required=True, help="a folder of save_pretrained, or a hub name")
    parser.add_argument("--tokenizer", metavar="NAME", help="a folder, a hub name, or bytes (default: the model's)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        default="float32",
        help="of the weights (default: %(default)s)",
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--out", metavar="DIR", help="an empty folder (default: runs/coupling/version_N, the next one)")
    parser.add_argument("--seed", type=int, default=0, help="decides pieces, edits, projection (default: %(default)s)")
    _add_pieces(parser.add_argument_group("pieces"))
    _add_method(parser.add_argument_group("coupling"))
    _add_editing(parser.add_argument_group("ripple effects"))
    parser.set_defaults(run=_coupling)


def _add_pieces(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data", metavar="SOURCE", required=True, help="a file, a dataset's folder or name, or atlas")
    group.add_argument("--format", default="auto", metavar="NAME", help="as for goldy data (default: %(default)s)")
    group.add_argument(
        "--form",
        choices=("question", "cloze"),
        default="question",
        help="how a subject and a relation are worded (default: %(default)s)",
    )
    group.add_argument("--n-pieces", type=int, metavar="N", help="draw N pieces, groups together (default: all)")
    group.add_argument(
        "--template",
        metavar="TEXT",
        help=r"the prompt, with {question}; \n is a new line (default: 'Question: {question}\nAnswer:'; of the atlas "
        "and of clozes '{question}')",
    )


def _add_method(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--select",
        metavar="NAME",
        nargs="+",
        default=["mlp_output"],
        help="mlp_output, attention_output, or patterns of parameter names (default: mlp_output)",
    )
    group.add_argument("--layers", metavar="RANGE", help="a:b without b, or last:4 (default: all)")
    group.add_argument("--center", action="store_true", help="subtract the mean gradient first")
    group.add_argument("--projection", type=int, metavar="K", help="random combinations of each gradient to keep")
    group.add_argument(
        "--workspace", metavar="DIR", help="a folder for more than memory holds, and to go on after a stop"
    )
    group.add_argument("--activation", action="store_true", help="compare with the similarity of activations")
    group.add_argument("--high", type=float, default=0.4, help="cosine of a high coupling (default: %(default)s)")
    group.add_argument("--moderate", type=float, default=0.1, help="of a moderate one (default: %(default)s)")


def _add_editing(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--edits", metavar="N|FILE", help="edits to draw, or JSON lines with id, answer (default: none)")
    # The names are the registry's to check: it brings torch, which other commands need not wait for.
    group.add_argument(
        "--editor", default="gradient_step", metavar="NAME", help="or finetune, rank_one (default: %(default)s)"
    )
    group.add_argument("--learning-rate", type=float, metavar="RATE", help="of the editor (default: its own)")
    group.add_argument("--steps", type=int, metavar="N", help="of the editor (default: its own)")


def parsed_layers(text: str | None) -> tuple[int, int] | str | None:
    """The blocks that ``--layers`` names.

    Raises:
        ValueError: It is neither a range nor ``last:N``.

    Example:
        >>> parsed_layers("2:6"), parsed_layers("last:4"), parsed_layers(None)
        ((2, 6), 'last:4', None)
    """
    if text is None or text.startswith("last:"):
        return text
    start, colon, stop = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return int(start), int(stop)
    except ValueError:
        raise ValueError(
            f"--layers is a:b for the layers from a up to but not including b, or last:4; got {text!r}"
        ) from None


def _coupling(options: argparse.Namespace) -> int:
    if options.edits is None and (options.learning_rate is not None or options.steps is not None):
        raise ValueError("--learning-rate and --steps belong to the editor; say with --edits what to edit")
    # Brings torch, which other commands need not wait for.
    from lightning_goldy.coupling.options import Editing, Method, Pieces
    from lightning_goldy.coupling.summary import Model, run_coupling

    words = options.select
    select: Any = words[0] if len(words) == 1 and not set("*.?[") & set(words[0]) else words
    editing = None
    if options.edits is not None:
        edits = int(options.edits) if options.edits.lstrip("-").isdecimal() else options.edits
        editing = Editing(edits, editor=options.editor, learning_rate=options.learning_rate, steps=options.steps)
    run_coupling(
        Model(options.model, tokenizer=options.tokenizer, dtype=options.dtype, device=options.device),
        Pieces(
            options.data,
            format=options.format,
            form=options.form,
            count=options.n_pieces,
            template=_template(options),
            seed=options.seed,
        ),
        Method(
            select=select,
            layers=parsed_layers(options.layers),
            center=options.center,
            projection=options.projection,
            workspace=options.workspace,
            activation=options.activation,
            moderate=options.moderate,
            high=options.high,
            seed=options.seed,
        ),
        editing,
        out=options.out,
    )
    return 0


def _template(options: argparse.Namespace) -> str | None:
    # A shell hands over a backslash and an n.
    return None if options.template is None else str(options.template).replace("\\n", "\n")
