"""The ``goldy`` command; torch is imported only when a sub-command runs."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import lightning_goldy
from lightning_goldy.training.recipes import all_recipes, copy_recipe, find_recipe

_Place = argparse.ArgumentParser | argparse._ArgumentGroup
# What LightningCLI takes beside --config.
_CONFIGURATION = ("data", "model", "trainer", "optimizer", "lr_scheduler", "seed_everything")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Words after the program's name; those of this process by default.

    Returns:
        The exit code: 0, or 2 when a command failed for a reason that its message tells; wrong words exit with 2, too.
        ``--debug`` among the words, or ``GOLDY_TRACEBACK=1`` in the environment, shows the error's trace before it.

    Example:
        >>> main(["recipes", "show", "no_such_recipe"])
        2
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    arguments = [word for word in words if word != "--debug"]
    before = os.environ.get("GOLDY_TRACEBACK")
    if len(arguments) < len(words):
        # Processes that a distributed strategy starts inherit it.
        os.environ["GOLDY_TRACEBACK"] = "1"
    for stream in (sys.stdout, sys.stderr):
        # A console without a letter of a name or a table shows another, and ends no command.
        if getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        return _run(arguments)
    finally:
        if before is None:
            os.environ.pop("GOLDY_TRACEBACK", None)


def _run(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in COMMANDS and COMMANDS[arguments[0]].add is None:
        from lightning_goldy.commands.fit import run_trainer

        return run_trainer(arguments)
    parser = command_parser()
    if not arguments:
        print(parser.format_help(), end="", file=sys.stderr)
        return 2
    if arguments[0].startswith("-") and arguments[0] not in option_strings(parser)[:3]:
        _check_more(parser, None, [arguments[0]])
    options, more = parser.parse_known_args(arguments)
    _check_more(getattr(options, "chosen", parser), getattr(options, "configured", None), more)
    options.more = more
    try:
        options.run(options)
    except BrokenPipeError:
        # Whoever read it, such as head, has enough; the interpreter's own last flush would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        from lightning_goldy.core.files import printable  # brings torch, which a command without a fault need not

        if os.environ.get("GOLDY_TRACEBACK"):
            traceback.print_exc()
        print("\n".join(map(printable, f"goldy: {error}".expandtabs().split("\n"))), file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    """Names the nearest choice to a misspelt one."""

    def error(self, message: str) -> NoReturn:
        misspelt = re.search(r"argument (?:COMMAND|ACTION): invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if misspelt:
            word, choices = misspelt[1], [choice.strip(" '") for choice in misspelt[2].split(",")]
            message = f"unknown {word!r}; {_meant(word, choices)}there are: {', '.join(choices)}"
        if message.endswith("arguments are required: ACTION"):
            below = next(action for action in self._actions if isinstance(action, argparse._SubParsersAction))
            message = f"say what to do: {', '.join(below.choices)}"
        super().error(message)


class _MainParser(_Parser):
    """Of ``goldy`` itself, whose help lists the commands by what they are for, on one screen."""

    def format_help(self) -> str:
        width = max(map(len, COMMANDS))
        lines = [f"{'goldy COMMAND --help':{width + 21}}the options of a command; goldy --version", ""]
        for group in dict.fromkeys(command.group for command in COMMANDS.values()):
            listed = [(name, command.help) for name, command in COMMANDS.items() if command.group == group]
            lines += [group, *(f"  {name:{width}}  {told}" for name, told in listed)]
        return "\n".join([*lines, "", "--debug with any command shows the trace of an error", ""])


def command_parser() -> argparse.ArgumentParser:
    """The parser of ``goldy`` with all commands but those that LightningCLI parses, which have a name only."""
    parser = _MainParser(prog="goldy", description=lightning_goldy.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"lightning_goldy {lightning_goldy.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for name in COMMANDS:
        add_command(commands, name)
    return parser


def option_strings(parser: argparse.ArgumentParser) -> list[str]:
    """The options of a parser and of its sub-commands, in their order.

    Example:
        >>> option_strings(argparse.ArgumentParser(add_help=False))
        []
    """
    found = [option for action in parser._actions for option in action.option_strings]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [option for below in action.choices.values() for option in option_strings(below)]
    return list(dict.fromkeys(found))


def _meant(word: str, choices: Sequence[str]) -> str:
    # Options have their dashes in common, which makes any two of them alike.
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.7 if word.startswith("-") else 0.6)
    return f"did you mean {close[0]}? " if close else ""


def add_command(commands: argparse._SubParsersAction[Any], name: str) -> None:
    """Adds a command to those of ``goldy``.

    Args:
        commands: The sub-commands.
        name: One of :data:`COMMANDS`.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> commands = parser.add_subparsers()
        >>> for name in ("analyze", "basin", "coupling", "data", "doctor", "masks", "plasticity"):
        ...     add_command(commands, name)
        >>> parser.parse_args(["analyze", "a.ckpt", "--config", "run.yaml", "--prompt", "1+1="]).prompt
        ['1+1=']
        >>> parser.parse_args(["basin", "a.ckpt", "b.ckpt", "--config", "run.yaml"]).checkpoints
        ['a.ckpt', 'b.ckpt']
        >>> parser.parse_args(["coupling", "--model", "base", "--data", "atlas", "--edits", "5"]).edits
        '5'
        >>> options = parser.parse_args(["data", "convert", "atlas", "--output", "atlas.jsonl", "--whole-questions"])
        >>> options.source, options.format, options.whole_questions
        ('atlas', 'auto', True)
        >>> parser.parse_args(["masks", "combine", "and", "a", "b", "--output", "c"]).files
        ['a', 'b']
        >>> parser.parse_args(["plasticity", "--levels", "0.1", "0.3"]).levels
        [0.1, 0.3]
    """
    command = COMMANDS[name]
    parser = commands.add_parser(name, help=command.help)
    parser.set_defaults(chosen=parser)
    if command.add is not None:
        command.add(parser)


def _check_more(parser: argparse.ArgumentParser, configured: argparse.ArgumentParser | None, more: list[str]) -> None:
    """Exits when words are neither the command's nor, for a ``configured`` one, changes of its configuration."""
    if configured is None:
        if more:
            meant = _meant(more[0].partition("=")[0], option_strings(parser)).strip()
            parser.error(f"unrecognized arguments: {' '.join(more)}{'; ' if meant else ''}{meant}")
        return
    own = option_strings(configured)
    for word in more:
        option = word.partition("=")[0]
        if option.startswith("--") and option[2:].partition(".")[0] not in _CONFIGURATION:
            sections = ", ".join(f"--{section}" for section in _CONFIGURATION)
            configured.error(
                f"unrecognized option {option}; {_meant(option, own)}Options of the configuration: {sections}"
            )


def _add_configuration(parser: argparse.ArgumentParser, *, otherwise: str = "") -> None:
    """``--config``, which must be given unless it is said what there is otherwise, and changes of what it says."""
    shown = "as for goldy fit; may be repeated"
    parser.add_argument("--config", metavar="FILE", action="append", required=not otherwise, help=shown + otherwise)
    parser.set_defaults(configured=parser)


def _add_checkpoint(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    parser.add_argument(name, metavar="CHECKPOINT", help="a Lightning .ckpt, or a folder of save_pretrained", **options)


def _add_seed(parser: _Place, decides: str) -> None:
    parser.add_argument("--seed", type=int, default=0, help=f"decides {decides} (default: %(default)s)")


def _add_folder(parser: _Place, what: str, command: str) -> None:
    place = f"where {what} (default: runs/{command}/version_N, the next free one)"
    parser.add_argument("--output", metavar="DIR", help=place)


def _add_file(parser: _Place, what: str) -> None:
    parser.add_argument("--output", metavar="FILE", required=True, help=f"the {what} to write")
    _add_force(parser)


def _add_force(parser: _Place) -> None:
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def _add_choice(parser: _Place, name: str, choices: tuple[str, ...], text: str) -> None:
    """An option of which the first choice is the default."""
    parser.add_argument(name, choices=choices, default=choices[0], help=f"{text} (default: %(default)s)")


def _add_form(parser: _Place) -> None:
    _add_choice(parser, "--form", ("question", "cloze"), "how a subject and a relation are worded")


def _add_several(parser: _Place, name: str, metavar: str, default: list[Any], text: str) -> None:
    """An option of one or more values, of the type of the default's."""
    values = " ".join(str(value) for value in default)
    options: dict[str, Any] = {"metavar": metavar, "nargs": "+", "type": type(default[0]), "default": default}
    parser.add_argument(name, **options, help=f"{text} (default: {values})")


def _describe(parser: argparse.ArgumentParser, description: str) -> None:
    """A long command has no short forms of options: what it does not know may be its configuration's."""
    parser.description, parser.allow_abbrev = description, False


def _settings(configs: Sequence[str | Path], more: Sequence[str]) -> list[str]:
    """The words that ``goldy fit`` would be given."""
    return [word for path in configs for word in ("--config", str(path))] + [*more]


def _add_analyze(parser: argparse.ArgumentParser) -> None:
    _describe(
        parser,
        "Attention, Taylor expansion, shape of the change and generations of one checkpoint against its "
        "base. Further options change the configuration, as in --data.source=text.txt.",
    )
    _add_checkpoint(parser, "checkpoint")
    _add_configuration(parser)
    parser.add_argument(
        "--base",
        metavar="PATH",
        help="what the model was before: a .ckpt, a folder of save_pretrained, a vector file, a run with a snapshot "
        "(default: the snapshot of the checkpoint's run, else the pretrained model of the configuration)",
    )
    _add_writing(parser)
    parser.add_argument("--n-samples", type=int, help="samples of the probe (default: at most 16)")
    parser.add_argument(
        "--shard",
        action="store_true",
        help="spread the model over the processes that torchrun started, when it is too large for one device",
    )
    _add_circuits(parser)
    _add_space(parser)
    _add_folder(parser, "everything goes", "analyze")
    parser.set_defaults(run=_analyze)


def _add_writing(parser: _Place) -> None:
    """What a model is to continue, and how."""
    words = r"to continue, \n is a new line; may be repeated"
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help=words)
    parser.add_argument("--prompts", metavar="FILE", help="more of them, one per line; empty lines are passed over")
    words = "longest continuation, tokens (default: %(default)s)"
    parser.add_argument("--max-new-tokens", type=int, default=50, help=words)
    words = "draw tokens at this temperature (default: take the most probable token)"
    parser.add_argument("--temperature", type=float, help=words)
    _add_seed(parser, "the draws")


def _add_circuits(parser: _Place) -> None:
    """Whose circuit is looked for, on what, and what stands beside it."""
    tasks = ("induction", "indirect_object", "greater_than", "atlas")
    words = "look for the circuit of this task, and measure what it keeps (default: none)"
    parser.add_argument("--circuits", choices=tasks, help=words)
    words = "pairs of prompts that choose it, and as many others that measure it (default: %(default)s)"
    parser.add_argument("--circuit-pairs", type=int, default=32, metavar="N", help=words)
    words = "a finetune that differs in its seed alone: what two seeds share of the circuit (default: none)"
    parser.add_argument("--circuit-noise", metavar="CHECKPOINT", help=words)
    words = "another task whose circuit of the same size stands beside it; may be given again (default: none)"
    parser.add_argument("--circuit-beside", action="append", default=[], choices=tasks, help=words)


def _add_space(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--space",
        choices=["merged", "adapters"],
        default="merged",
        help="of a model with adapters: the change of the weights that they come to, or of the adapters "
        "(default: %(default)s)",
    )


def _analyze(options: argparse.Namespace) -> None:
    # Brings torch and Lightning, which other commands need not wait for.
    from lightning_goldy.commands.analyze import CircuitTask, Writing, analyze_checkpoint, read_prompts

    # A shell hands over a backslash and an n.
    told = [prompt.replace("\\n", "\n") for prompt in options.prompt]
    prompts = [*told, *(read_prompts(options.prompts) if options.prompts else ())]
    analyze_checkpoint(
        options.checkpoint,
        _settings(options.config, options.more),
        base=options.base,
        writing=Writing(tuple(prompts), options.max_new_tokens, options.temperature, options.seed),
        n_samples=options.n_samples,
        output=options.output,
        shard=options.shard,
        space=options.space,
        circuits=options.circuits
        and CircuitTask(
            options.circuits, options.circuit_pairs, options.seed, options.circuit_noise, tuple(options.circuit_beside)
        ),
    )


def _add_graft(parser: argparse.ArgumentParser) -> None:
    _describe(
        parser,
        "Divides a checkpoint's effect among its elements, tries parts of the change on held-out samples, and writes "
        "the one that is wanted. Further options change the configuration.",
    )
    _add_checkpoint(parser, "checkpoint")
    _add_configuration(parser)
    parser.add_argument("--base", metavar="PATH", help="what the model was before (default: as for goldy analyze)")
    parser.add_argument("--keep", type=float, metavar="SHARE", help="of the elements, those that carry most")
    parser.add_argument(
        "--recover", type=float, metavar="SHARE", help="of the effect, with the least harm to other text"
    )
    parser.add_argument("--harm", type=float, metavar="NATS", help="allowed on other text, for the most effect")
    _add_choice(
        parser,
        "--method",
        ("best", "attribution", "gradient", "interpolation", "learned", "magnitude", "random", "drop_and_rescale"),
        "attribution: the strongest elements; gradient: those by the gradient at the base; learned: elements found by "
        "gradients of the graft itself; interpolation: a part of the change everywhere; magnitude: what changed most; "
        "random, drop_and_rescale: random elements, as they are or scaled up; best: whichever of all but learned has "
        "least harm (with --keep: attribution)",
    )
    parser.add_argument("--sparse", action="store_true", help="write the change alone, as elements and values")
    parser.add_argument("--n-samples", type=int, default=32, help="of the probe, half held out (default: %(default)s)")
    parser.add_argument("--n-collateral", type=int, default=16, help="samples of other text (default: %(default)s)")
    _add_space(parser)
    _add_folder(parser, "everything goes", "graft")
    parser.set_defaults(run=_graft)


def _graft(options: argparse.Namespace) -> None:
    # Brings torch and Lightning, which other commands need not wait for.
    from lightning_goldy.commands.graft import Wanted, graft_checkpoint

    graft_checkpoint(
        options.checkpoint,
        _settings(options.config, options.more),
        Wanted(options.keep, options.recover, options.harm, options.method, options.sparse),
        base=options.base,
        n_samples=options.n_samples,
        n_collateral=options.n_collateral,
        output=options.output,
        space=options.space,
    )


def _add_basin(parser: argparse.ArgumentParser) -> None:
    _describe(
        parser,
        "The log-volume of the region around each checkpoint in which the model says the same. Further "
        "options change the configuration, as in --data.edits=20.",
    )
    _add_checkpoint(parser, "checkpoints", nargs="+")
    _add_configuration(parser)
    parser.add_argument("--n-directions", type=int, default=10, help="directions per volume (default: %(default)s)")
    parser.add_argument(
        "--cutoff",
        type=float,
        action="append",
        help="mean divergence at the boundary, nats per target; may be repeated (default: 0.01)",
    )
    _add_choice(
        parser,
        "--preconditioner",
        ("none", "adam", "best", "kronecker"),
        "adam: from the checkpoint's optimizer; kronecker: from the samples' Fisher information; best: the best of all",
    )
    _add_choice(
        parser,
        "--method",
        ("rays", "bridge", "auto"),
        "rays: a lower bound; bridge: the volume with its error too; auto: the bridge where it can be walked",
    )
    parser.add_argument(
        "--max-gradients", type=int, default=20_000, help="of each bridge, over all samples (default: %(default)s)"
    )
    parser.add_argument("--keep-in", metavar="FOLDER", help="where an interrupted bridge goes on, by the same command")
    parser.add_argument(
        "--sigma", type=float, help="of the Gaussian measure (default: the root mean square of the earliest checkpoint)"
    )
    _add_seed(parser, "the directions")
    parser.add_argument("--n-samples", type=int, help="samples of the probe, or of each split (default: all)")
    parser.add_argument(
        "--splits", action="store_true", help="measure the data module's analysis splits instead of the probe"
    )
    _add_folder(parser, "rows and report go", "basin")
    parser.set_defaults(run=_basin)


def _basin(options: argparse.Namespace) -> None:
    # Brings torch and Lightning, which other commands need not wait for.
    from lightning_goldy.analysis.basin import BridgeSettings, Estimator, VolumeSurvey
    from lightning_goldy.commands.analyze import measure_checkpoints

    survey = VolumeSurvey(
        n_directions=options.n_directions,
        cutoffs=options.cutoff or (1e-2,),
        preconditioner=options.preconditioner,
        sigma="first" if options.sigma is None else options.sigma,
        n_samples=options.n_samples,
        estimator=Estimator(seed=options.seed),
        method=options.method,
        bridge=BridgeSettings(max_gradients=options.max_gradients, keep_in=options.keep_in),
    )
    settings = _settings(options.config, options.more)
    measure_checkpoints(options.checkpoints, settings, survey, splits=options.splits, output=options.output)


def _add_plasticity(parser: argparse.ArgumentParser) -> None:
    _describe(
        parser,
        "Trains once without pruning and once for each strategy, level and number of cycles, and compares "
        "the losses on the validation set. Further options change the configuration, as in --trainer.max_steps=200.",
    )
    _add_configuration(parser, otherwise=" (default: a small model)")
    parser.add_argument("--model", metavar="NAME", help="a hub name or a folder, with its tokenizer")
    parser.add_argument("--data", metavar="FILE", help="a text file or a folder of them")
    strategies = ["taylor", "entropy", "magnitude", "random"]
    words = (
        "scores of heads, also first_order, combined, ablation and your own; random with several seeds draws its band"
    )
    _add_several(parser, "--strategies", "NAME", strategies, words)
    _add_several(parser, "--levels", "SHARE", [0.1, 0.3, 0.5], "shares of all heads to cut, above 0 and below 1")
    _add_several(parser, "--cycles", "N", [1], "numbers of cycles")
    _add_several(parser, "--seeds", "SEED", [0], "one run each, one after another")
    parser.add_argument("--quick", action="store_true", help="60 optimizer steps per run, 4 batches of validation")
    parser.add_argument("--save-model", action="store_true", help="write each model with its closed heads cut out")
    _add_folder(parser, "everything goes", "plasticity")
    parser.set_defaults(run=_plasticity)


def _plasticity(options: argparse.Namespace) -> None:
    # Brings torch and Lightning, which other commands need not wait for.
    from lightning_goldy.commands.plasticity import Sweep, run_sweep

    settings = _settings(options.config or [find_recipe("head_plasticity_sweep").path], ())
    if options.model is not None:
        settings += [f"--model.model={options.model}"]
    if options.data is not None:
        settings += [f"--data.source={options.data}"]
    sweep = Sweep(**{name: tuple(getattr(options, name)) for name in ("strategies", "levels", "cycles", "seeds")})
    settings += options.more
    run_sweep(sweep, settings, quick=options.quick, save_model=options.save_model, output=options.output)


def _add_coupling(parser: argparse.ArgumentParser) -> None:
    _describe(
        parser,
        "Cosines between the gradients of answers, their statistics and figures, and with --edits what "
        "edits do to other answers. Nothing is trained.",
    )
    parser.add_argument("--model", metavar="MODEL", required=True, help="a folder of save_pretrained, or a hub name")
    parser.add_argument("--tokenizer", metavar="NAME", help="a folder, a hub name, or bytes (default: the model's)")
    _add_choice(parser, "--dtype", ("float32", "bfloat16", "float16", "auto"), "of the weights")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--out", metavar="DIR", help="an empty folder (default: runs/coupling/version_N, the next one)")
    _add_seed(parser, "pieces, edits, projection")
    _add_pieces(parser.add_argument_group("pieces"))
    _add_method(parser.add_argument_group("coupling"))
    _add_editing(parser.add_argument_group("ripple effects"))
    parser.set_defaults(run=_coupling)


def _add_pieces(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data", metavar="SOURCE", required=True, help="a file, a dataset's folder or name, or atlas")
    group.add_argument("--format", default="auto", metavar="NAME", help="as for goldy data (default: %(default)s)")
    _add_form(group)
    group.add_argument("--n-pieces", type=int, metavar="N", help="draw N pieces, groups together (default: all)")
    group.add_argument(
        "--template",
        metavar="TEXT",
        help=r"the prompt, with {question}; \n is a new line (default: 'Question: {question}\nAnswer:'; of the atlas "
        "and of clozes '{question}')",
    )


def _add_method(group: argparse._ArgumentGroup) -> None:
    words = "mlp_output, attention_output, or patterns of parameter names"
    _add_several(group, "--select", "NAME", ["mlp_output"], words)
    group.add_argument("--layers", metavar="RANGE", help="a:b without b, or last:4 (default: all)")
    words = "of an answer that count: answer, answer_with_end (the end of the text too), first_token"
    group.add_argument("--tokens", default="answer", metavar="WHICH", help=f"{words} (default: %(default)s)")
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


def _coupling(options: argparse.Namespace) -> None:
    if options.edits is None and (options.learning_rate is not None or options.steps is not None):
        raise ValueError("--learning-rate and --steps belong to the editor; say with --edits what to edit")
    # Brings torch, which other commands need not wait for.
    from lightning_goldy.commands.coupling.options import Editing, Method, Model, Options, Pieces, parsed_layers
    from lightning_goldy.commands.coupling.summary import run_coupling

    def told(*names: str) -> dict[str, Any]:
        return {name: getattr(options, name) for name in names}

    words = options.select
    select: Any = words[0] if len(words) == 1 and not set("*.?[") & set(words[0]) else words
    method = told("tokens", "center", "projection", "workspace", "activation", "moderate", "high", "seed")
    # A shell hands over a backslash and an n.
    template = None if options.template is None else str(options.template).replace("\\n", "\n")
    editing = None
    if options.edits is not None:
        edits = int(options.edits) if options.edits.lstrip("-").isdecimal() else options.edits
        editing = Editing(edits, **told("editor", "learning_rate", "steps"))
    run_coupling(
        Options(
            Model(options.model, **told("tokenizer", "dtype", "device")),
            Pieces(options.data, count=options.n_pieces, template=template, **told("format", "form", "seed")),
            Method(select=select, layers=parsed_layers(options.layers), **method),
            editing,
            out=options.out,
        )
    )


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    _describe(
        parser,
        "Versions and devices, which analyses work on a model and why others do not, and what each callback will cost: "
        "passes, time, memory, disk. With --meta or --shape nothing is allocated.",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a folder of save_pretrained, or a hub name")
    whose = "whose callbacks are planned (default: all that only look)"
    parser.add_argument("--config", "--recipe", metavar="FILE", action="append", default=[], help=whose)
    parser.add_argument("--shape", metavar="NAME", help="in the place of a model: 1b, 8b or 70b of the Llama family")
    parser.add_argument("--meta", action="store_true", help="read the model's configuration alone")
    parser.add_argument("--steps", type=int, metavar="N", help="of the run (default: 1000)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="samples of a batch (default: 4)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a sample (default: 512)")
    _add_choice(parser, "--dtype", ("float32", "bfloat16", "float16"), "of the weights")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="ranks that share each parameter (FSDP2)")
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="ranks that share the samples (DDP)")
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> None:
    # Brings torch, which other commands need not wait for.
    from lightning_goldy.commands.doctor import Question, print_installation, run_doctor

    if options.model is None and options.shape is None:
        print_installation()
        if not options.config and options.steps is options.batch_size is options.length is None and not options.meta:
            print("goldy doctor MODEL (a folder, or a name on the hub) tells what works on it and what it will cost")
            return
    names = ("model", "shape", "meta", "steps", "batch_size", "length", "dtype", "shards", "replicas")
    run_doctor(Question(configs=tuple(options.config), **{name: getattr(options, name) for name in names}))


def _add_data(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, dest="action")
    convert = actions.add_parser("convert", help="write a source's pieces as JSON lines", allow_abbrev=False)
    _add_source(convert)
    _add_file(convert, "file of JSON lines")
    convert.add_argument("--limit", type=int, metavar="N", help="stop after N records that gave pieces (default: all)")
    show = actions.add_parser("show", help="print the first pieces of a source", allow_abbrev=False)
    _add_source(show)
    show.add_argument("--n", type=int, default=5, metavar="N", help="pieces to print (default: %(default)s)")
    parser.set_defaults(run=_data)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="a file, a saved dataset's folder, a dataset's name on the hub, or atlas"
    )
    # The names are the registry's to check: it brings torch, which other commands need not wait for.
    parser.add_argument(
        "--format",
        default="auto",
        metavar="NAME",
        help="jsonl, csv, qa, bamboogle, wikihop, hotpotqa, 2wikimultihopqa, musique, atlas; auto tells it from the"
        " first record (default: %(default)s)",
    )
    parser.add_argument("--split", metavar="NAME", help="of a dataset (default: train, or the only one)")
    _add_form(parser)
    parser.add_argument(
        "--whole-questions",
        action=argparse.BooleanOptionalAction,
        help="whether composed questions stand beside their facts (default: as the format has it)",
    )
    _add_choice(parser, "--on-malformed", ("error", "skip"), "stop at a faulty record, or leave it out and count it")


def _data(options: argparse.Namespace) -> None:
    from lightning_goldy.commands.files import convert_pieces, show_pieces

    {"convert": convert_pieces, "show": show_pieces}[options.action](options)


def _add_masks(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, dest="action")
    show = actions.add_parser("show", help="density of each block")
    compare = actions.add_parser("compare", help="how much every two share, and how much of that is chance")
    combine = actions.add_parser("combine", help="one mask of several")
    combine.add_argument(
        "operation",
        choices=("and", "or", "minus", "not"),
        help="in all; in any; in the first but no other; not in the only one",
    )
    for action in (show, compare, combine):
        action.add_argument("files", metavar="FILE", nargs="+")
    scope = "what chance keeps: the number of elements of each tensor, or only of all"
    _add_choice(compare, "--scope", ("tensor", "global"), scope)
    _add_file(combine, "mask file")
    parser.set_defaults(run=_masks)


def _masks(options: argparse.Namespace) -> None:
    from lightning_goldy.commands.files import combine_masks, compare_masks, show_masks

    {"show": show_masks, "compare": compare_masks, "combine": combine_masks}[options.action](options)


def _add_recipes(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action")
    actions.add_parser("list", help="all names (the default)")
    actions.add_parser("show", help="print one").add_argument("name", metavar="NAME")
    copy = actions.add_parser("copy", help="copy one, to change it or to run it")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("directory", metavar="DIR", nargs="?", help="default: recipes or callbacks, as its kind is")
    _add_force(copy)
    parser.set_defaults(run=_recipes)


def _recipes(options: argparse.Namespace) -> None:
    if options.action == "show":
        print(find_recipe(options.name).text, end="")
    elif options.action == "copy":
        recipe = find_recipe(options.name)
        print(f"{copy_recipe(recipe, options.directory, force=options.force)}\nrun it: {recipe.first_line}")
    else:
        recipes = all_recipes()
        width = max(len(recipe.name) for recipe in recipes)
        titles = {"recipes": "Recipes: whole runs", "callbacks": "Overlays: one callback each, added to a recipe"}
        for kind, title in titles.items():
            print(title)
            for recipe in recipes:
                if recipe.kind == kind:
                    print(f"  {recipe.name:{width}}  {recipe.first_line}")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", metavar="RUN", help="a run's log directory, or a folder with several runs")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="RUN", help="other runs: one page with a column for each"
    )
    written = parser.add_mutually_exclusive_group()
    written.add_argument("--output", metavar="FILE", help="default: report.html in the run directory")
    written.add_argument(
        "--json", action="store_true", help="print answers, headlines, differences as JSON, and write no page"
    )
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    from lightning_goldy.report.comparison import comparison_json, write_comparison
    from lightning_goldy.report.page import answers_json, write_report

    if options.compare:
        runs = [options.run_directory, *options.compare]
        print(comparison_json(runs) if options.json else write_comparison(runs, options.output))
        return
    print(answers_json(options.run_directory) if options.json else write_report(options.run_directory, options.output))


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fast", action="store_true", help="a reduced form: fewer facts, a smaller model")
    parser.add_argument("--directory", default="runs/demo", help="where the runs go (default: %(default)s)")
    _add_seed(parser, "weights, edits and order")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    from lightning_goldy.commands.demo import run_demo

    run_demo(options.directory, fast=options.fast, seed=options.seed)


def _add_completion(parser: argparse.ArgumentParser) -> None:
    _describe(
        parser, 'In ~/.bashrc: eval "$(goldy completion bash)"; ~/.zshrc: zsh; fish: goldy completion fish | source.'
    )
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])
    parser.set_defaults(run=_completion)


def _completion(options: argparse.Namespace) -> None:
    from lightning_goldy.commands.output import completion_script

    configured = [f"--{section}." for section in _CONFIGURATION[:-1]]
    words = ["--config", "--ckpt_path", "--print_config", "--help", "--debug", "--callbacks.", *configured]
    print(completion_script(command_parser(), options.shell, {"fit": words, "validate": words, "test": words}), end="")


class Command(NamedTuple):
    """A command: its group and what the list says of it, and what adds its options; None where LightningCLI parses."""

    group: str
    help: str
    add: Callable[[argparse.ArgumentParser], None] | None


_TRAIN, _LOOK, _MEASURE = "Train", "Look at what a run found", "Measure checkpoints and models"
_BEFORE = "Find out what is there"
COMMANDS = {
    "demo": Command(_TRAIN, "pretrain and finetune a small model with every callback", _add_demo),
    "fit": Command(_TRAIN, "--config recipes/NAME.yaml --config callbacks/NAME.yaml", None),
    "validate": Command(_TRAIN, "evaluate on the validation set: --config FILE --ckpt_path FILE", None),
    "test": Command(_TRAIN, "evaluate on the test set", None),
    "report": Command(_LOOK, "a run as one HTML page; several by --compare; --json", _add_report),
    "masks": Command(_LOOK, "show, compare or combine mask files", _add_masks),
    "analyze": Command(_MEASURE, "a checkpoint against its base: CHECKPOINT --config FILE", _add_analyze),
    "graft": Command(_MEASURE, "write the part of a finetune that carries it: --keep 0.1", _add_graft),
    "basin": Command(_MEASURE, "basin volumes of checkpoints: CHECKPOINT... --config FILE", _add_basin),
    "coupling": Command(_MEASURE, "which answers learn together: --model MODEL --data FILE", _add_coupling),
    "plasticity": Command(_MEASURE, "compare strategies of head pruning: --data FILE", _add_plasticity),
    "doctor": Command(_BEFORE, "what works on a model, what each callback will cost: MODEL", _add_doctor),
    "recipes": Command(_BEFORE, "list, show or copy recipes and callback overlays", _add_recipes),
    "data": Command(_BEFORE, "convert question sets to knowledge pieces, or show them", _add_data),
    "completion": Command(_BEFORE, "a script that completes commands and options in the shell", _add_completion),
}
"""The commands by name, as the list has them."""


if __name__ == "__main__":
    raise SystemExit(main())
