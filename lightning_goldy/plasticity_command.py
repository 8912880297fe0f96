"""``goldy plasticity``: strategies of head pruning compared."""

from __future__ import annotations

import argparse


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
    from lightning_goldy.bundle import find_recipe
    from lightning_goldy.plasticity_sweep import Sweep, run_sweep

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
