"""``goldy basin``: the volume around checkpoints, after the fact."""

from __future__ import annotations

import argparse


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
        choices=("none", "adam", "best"),
        default="none",
        help="adam: from the checkpoint's optimizer; best: the better of both (default: %(default)s)",
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
    from lightning_goldy.callbacks.volume_settings import Estimator, Selection
    from lightning_goldy.callbacks.volume_survey import VolumeSurvey
    from lightning_goldy.checkpoint_volumes import measure_checkpoints

    survey = VolumeSurvey(
        n_directions=options.n_directions,
        cutoffs=options.cutoff or (1e-2,),
        preconditioner=options.preconditioner,
        sigma="first" if options.sigma is None else options.sigma,
        n_samples=options.n_samples,
        selection=Selection(),
        estimator=Estimator(seed=options.seed),
    )
    settings = [word for path in options.config for word in ("--config", path)] + options.more
    measure_checkpoints(options.checkpoints, settings, survey, splits=options.splits, output=options.output)
    return 0
