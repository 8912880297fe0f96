"""The ``goldy`` command; torch is imported only when a sub-command runs."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning_goldy
from lightning_goldy.commands.data import add_data
from lightning_goldy.commands.masks import add_masks
from lightning_goldy.training.recipes import all_recipes, copy_recipe, find_recipe


def add_analyze(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to those of ``goldy``.

    Args:
        commands: The sub-commands.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_analyze(parser.add_subparsers())
        >>> parser.parse_args(["analyze", "a.ckpt", "--config", "run.yaml", "--prompt", "1+1="]).prompt
        ['1+1=']
    """
    parser = commands.add_parser(
        "analyze",
        help="analyse a checkpoint against its base: goldy analyze CHECKPOINT --config FILE",
        description="Attention, Taylor expansion, shape of the change and generations of one checkpoint against its "
        "base. Further options change the configuration, as in --data.source=text.txt.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a Lightning .ckpt, or a folder of save_pretrained")
    parser.add_argument(
        "--config", metavar="FILE", action="append", required=True, help="as for goldy fit; may be repeated"
    )
    parser.add_argument(
        "--base",
        metavar="PATH",
        help="what the model was before: a .ckpt, a folder of save_pretrained, a vector file, a run with a snapshot "
        "(default: the snapshot of the checkpoint's run, else the pretrained model of the configuration)",
    )
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="to continue; may be repeated")
    parser.add_argument("--prompts", metavar="FILE", help="more of them, one per line; empty lines are passed over")
    parser.add_argument(
        "--max-new-tokens", type=int, default=50, help="longest continuation, tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, help="draw tokens at this temperature (default: take the most probable token)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides the draws (default: %(default)s)")
    parser.add_argument("--n-samples", type=int, help="samples of the probe (default: at most 16)")
    parser.add_argument(
        "--output", metavar="DIR", help="where everything goes (default: runs/analyze/version_N, the next free one)"
    )
    parser.set_defaults(run=_analyze, configured=parser)


def read_prompts(path: str | Path) -> list[str]:
    r"""The prompts of a file, one per line.

    Args:
        path: UTF-8 text; empty lines are passed over.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not text, or has no line.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "prompts.txt").write_text("To be\n\nor not\n")
        ...     read_prompts(Path(folder, "prompts.txt"))
        ['To be', 'or not']
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file of prompts at {path}")
    try:
        # Only at line breaks: str.splitlines also cuts at characters that a prompt may hold.
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; one per line")
    return prompts


def _analyze(options: argparse.Namespace) -> int:
    # Brings torch and Lightning, which other commands need not wait for.
    from lightning_goldy.commands.analyze import Writing, analyze_checkpoint

    prompts = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else ())]
    analyze_checkpoint(
        options.checkpoint,
        [word for path in options.config for word in ("--config", path)] + options.more,
        base=options.base,
        writing=Writing(tuple(prompts), options.max_new_tokens, options.temperature, options.seed),
        n_samples=options.n_samples,
        output=options.output,
    )
    return 0


def add_basin(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to those of ``goldy``.

    Args:
        commands: The sub-commands.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_basin(parser.add_subparsers())
        >>> parser.parse_args(["basin", "a.ckpt", "b.ckpt", "--config", "run.yaml"]).checkpoints
        ['a.ckpt', 'b.ckpt']
    """
    parser = commands.add_parser(
        "basin",
        help="measure the basin volume of checkpoints: goldy basin CHECKPOINT... --config FILE",
        description="The log-volume of the region around each checkpoint in which the model says the same. Further "
        "options change the configuration, as in --data.edits=20.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "checkpoints", metavar="CHECKPOINT", nargs="+", help="a Lightning .ckpt, or a folder of save_pretrained"
    )
    parser.add_argument(
        "--config", metavar="FILE", action="append", required=True, help="as for goldy fit; may be repeated"
    )
    parser.add_argument("--n-directions", type=int, default=10, help="directions per volume (default: %(default)s)")
    parser.add_argument(
        "--cutoff",
        type=float,
        action="append",
        help="mean divergence at the boundary, nats per target; may be repeated (default: 0.01)",
    )
    parser.add_argument(
        "--preconditioner",
        choices=("none", "adam", "best", "kronecker"),
        default="none",
        help="adam: from the checkpoint's optimizer; best: the better of both; kronecker: from the samples' Fisher "
        "information (default: %(default)s)",
    )
    parser.add_argument(
        "--sigma", type=float, help="of the Gaussian measure (default: the root mean square of the earliest checkpoint)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides the directions (default: %(default)s)")
    parser.add_argument("--n-samples", type=int, help="samples of the probe, or of each split (default: all)")
    parser.add_argument(
        "--splits", action="store_true", help="measure the data module's analysis splits instead of the probe"
    )
    parser.add_argument(
        "--output", metavar="DIR", help="where rows and report go (default: runs/basin/version_N, the next free one)"
    )
    parser.set_defaults(run=_basin, configured=parser)


def _basin(options: argparse.Namespace) -> int:
    # Brings torch and Lightning, which other commands need not wait for.
    from lightning_goldy.analysis.basin import Estimator, VolumeSurvey
    from lightning_goldy.commands.basin import measure_checkpoints

    survey = VolumeSurvey(
        n_directions=options.n_directions,
        cutoffs=options.cutoff or (1e-2,),
        preconditioner=options.preconditioner,
        sigma="first" if options.sigma is None else options.sigma,
        n_samples=options.n_samples,
        estimator=Estimator(seed=options.seed),
    )
    settings = [word for path in options.config for word in ("--config", path)] + options.more
    measure_checkpoints(options.checkpoints, settings, survey, splits=options.splits, output=options.output)
    return 0


def add_plasticity(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to those of ``goldy``.

    Args:
        commands: The sub-commands.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_plasticity(parser.add_subparsers())
        >>> parser.parse_args(["plasticity", "--levels", "0.1", "0.3"]).levels
        [0.1, 0.3]
    """
    parser = commands.add_parser(
        "plasticity",
        help="compare strategies of head pruning: goldy plasticity --data FILE --strategies taylor random",
        description="Trains once without pruning and once for each strategy, level and number of cycles, and compares "
        "the losses on the validation set. Further options change the configuration, as in --trainer.max_steps=200.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", action="append", help="as for goldy fit; may be repeated (default: a small model)"
    )
    parser.add_argument("--model", metavar="NAME", help="a hub name or a folder, with its tokenizer")
    parser.add_argument("--data", metavar="FILE", help="a text file or a folder of them")
    parser.add_argument(
        "--strategies",
        metavar="NAME",
        nargs="+",
        default=["entropy", "magnitude", "combined", "random"],
        help="scores of heads, also taylor, ablation and your own (default: entropy magnitude combined random)",
    )
    parser.add_argument(
        "--levels",
        metavar="SHARE",
        nargs="+",
        type=float,
        default=[0.1, 0.3, 0.5],
        help="shares of all heads to cut, above 0 and below 1 (default: 0.1 0.3 0.5)",
    )
    parser.add_argument(
        "--cycles", metavar="N", nargs="+", type=int, default=[1], help="numbers of cycles (default: 1)"
    )
    parser.add_argument(
        "--seeds", metavar="SEED", nargs="+", type=int, default=[0], help="one run each, one after another (default: 0)"
    )
    parser.add_argument("--quick", action="store_true", help="60 optimizer steps per run, 4 batches of validation")
    parser.add_argument("--save-model", action="store_true", help="write each model with its closed heads cut out")
    parser.add_argument(
        "--output", metavar="DIR", help="where everything goes (default: runs/plasticity/version_N, the next free one)"
    )
    parser.set_defaults(run=_plasticity, configured=parser)


def _plasticity(options: argparse.Namespace) -> int:
    # Brings torch and Lightning, which other commands need not wait for.
    from lightning_goldy.commands.plasticity import Sweep, run_sweep
    from lightning_goldy.training.recipes import find_recipe

    configs = options.config or [str(find_recipe("head_plasticity_sweep").path)]
    settings = [word for path in configs for word in ("--config", path)]
    if options.model is not None:
        settings += [f"--model.model={options.model}", f"--data.tokenizer={options.model}"]
    if options.data is not None:
        settings += [f"--data.source={options.data}"]
    sweep = Sweep(
        strategies=tuple(options.strategies),
        levels=tuple(options.levels),
        cycles=tuple(options.cycles),
        seeds=tuple(options.seeds),
    )
    run_sweep(
        sweep, [*settings, *options.more], quick=options.quick, save_model=options.save_model, output=options.output
    )
    return 0


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


_METHOD = ("center", "projection", "workspace", "activation", "moderate", "high", "seed")


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
    from lightning_goldy.commands.coupling.options import Editing, Method, Model, Options, Pieces
    from lightning_goldy.commands.coupling.summary import run_coupling

    words = options.select
    select: Any = words[0] if len(words) == 1 and not set("*.?[") & set(words[0]) else words
    editing = None
    if options.edits is not None:
        edits = int(options.edits) if options.edits.lstrip("-").isdecimal() else options.edits
        editing = Editing(edits, editor=options.editor, learning_rate=options.learning_rate, steps=options.steps)
    run_coupling(
        Options(
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
                **{name: getattr(options, name) for name in _METHOD},
            ),
            editing,
            out=options.out,
        )
    )
    return 0


def _template(options: argparse.Namespace) -> str | None:
    # A shell hands over a backslash and an n.
    return None if options.template is None else str(options.template).replace("\\n", "\n")


_TRAINER_COMMANDS = {
    "fit": "train: goldy fit --config recipes/NAME.yaml --config callbacks/NAME.yaml",
    "validate": "evaluate on the validation set: goldy validate --config ... --ckpt_path FILE",
    "test": "evaluate on the test set",
}
# What LightningCLI takes beside --config.
_CONFIGURATION = ("data", "model", "trainer", "optimizer", "lr_scheduler", "seed_everything")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Words after the program's name; those of this process by default.

    Returns:
        The exit code: 0, or 2 when a command other than training failed for a reason that its message tells.

    Example:
        >>> main(["recipes", "show", "no_such_recipe"])
        2
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0] in _TRAINER_COMMANDS:
        from lightning_goldy.commands.fit import run_trainer

        return run_trainer(arguments)
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    _check_more(parser, getattr(options, "configured", None), more)
    options.more = more
    try:
        return int(options.run(options))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"goldy: {error}", file=sys.stderr)
        return 2


def _check_more(parser: argparse.ArgumentParser, configured: argparse.ArgumentParser | None, more: list[str]) -> None:
    """Exits when words are neither the command's nor, for a ``configured`` one, changes of its configuration."""
    if configured is None:
        if more:
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        return
    own = [option for action in configured._actions for option in action.option_strings]
    for word in more:
        option = word.partition("=")[0]
        if option.startswith("--") and option[2:].partition(".")[0] not in _CONFIGURATION:
            close = difflib.get_close_matches(option, own, n=1)
            meant = f"did you mean {close[0]}? " if close else ""
            sections = ", ".join(f"--{section}" for section in _CONFIGURATION)
            configured.error(f"unrecognized option {option}; {meant}Options of the configuration: {sections}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="goldy", description=lightning_goldy.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"lightning_goldy {lightning_goldy.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, purpose in _TRAINER_COMMANDS.items():
        commands.add_parser(name, help=purpose)  # for the list only: these are LightningCLI's to parse
    _add_recipes(commands)
    add_analyze(commands)
    add_basin(commands)
    add_coupling(commands)
    add_data(commands)
    add_masks(commands)
    add_plasticity(commands)
    report = commands.add_parser("report", help="turn a run directory into one HTML page")
    report.add_argument("run_directory", metavar="RUN", help="a run's log directory, or a folder with several runs")
    report.add_argument("--output", metavar="FILE", help="default: report.html in the run directory")
    report.set_defaults(run=_report)
    demo = commands.add_parser("demo", help="pretrain a small model, finetune it with every callback, write the report")
    demo.add_argument("--fast", action="store_true", help="a reduced form: fewer facts, a smaller model")
    demo.add_argument("--directory", default="runs/demo", help="where the runs go (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="decides weights, edits and order (default: %(default)s)")
    demo.set_defaults(run=_demo)
    return parser


def _add_recipes(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("recipes", help="list, show or copy recipes and callback overlays")
    parser.set_defaults(run=_list_recipes)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    actions.add_parser("list", help="all names (the default)").set_defaults(run=_list_recipes)
    show = actions.add_parser("show", help="print one")
    show.add_argument("name", metavar="NAME")
    show.set_defaults(run=_show_recipe)
    copy = actions.add_parser("copy", help="copy one, to change it or to run it")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("directory", metavar="DIR", nargs="?", help="default: recipes or callbacks, as its kind is")
    copy.add_argument("--force", action="store_true", help="replace an existing file")
    copy.set_defaults(run=_copy_recipe)


def _list_recipes(options: argparse.Namespace) -> int:
    recipes = all_recipes()
    width = max(len(recipe.name) for recipe in recipes)
    titles = {"recipes": "Recipes: whole runs", "callbacks": "Overlays: one callback each, added to a recipe"}
    for kind, title in titles.items():
        print(title)
        for recipe in recipes:
            if recipe.kind == kind:
                print(f"  {recipe.name:{width}}  {recipe.first_line}")
    return 0


def _show_recipe(options: argparse.Namespace) -> int:
    print(find_recipe(options.name).text, end="")
    return 0


def _copy_recipe(options: argparse.Namespace) -> int:
    recipe = find_recipe(options.name)
    print(f"{copy_recipe(recipe, options.directory, force=options.force)}\nrun it: {recipe.first_line}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from lightning_goldy.report.page import write_report

    print(write_report(options.run_directory, options.output))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from lightning_goldy.commands.demo import run_demo

    run_demo(Path(options.directory), fast=options.fast, seed=options.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
