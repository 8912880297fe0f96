"""The ``goldy`` command."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

import lightning_goldy
from lightning_goldy.commands.data import add_data
from lightning_goldy.commands.masks import add_masks
from lightning_goldy.commands.parsers import add_analyze, add_basin, add_coupling, add_plasticity
from lightning_goldy.training.recipes import all_recipes, copy_recipe, find_recipe

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
