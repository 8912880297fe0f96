"""What a configuration describes, set up on one device without training, for commands that look at checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as L
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_goldy.core.files import atomic_write
from lightning_goldy.quiet import progress_only, without_known_warnings
from lightning_goldy.training import GoldyCLI, command_line

CallbackT = TypeVar("CallbackT", bound=L.Callback)

# One device and nothing that belongs to a training, whatever the configuration says.
_ALONE = (
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
    "--trainer.logger=false",
    "--trainer.limit_val_batches=1",
    "--trainer.callbacks=null",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)


def run_configured(make: Callable[[], CallbackT], settings: Sequence[str], folder: Path) -> CallbackT:
    """Sets up model and data and calls a callback's ``on_validation_start``; what is evaluated after it is ignored.

    Args:
        make: Gives the callback that does the work, once the configuration has been read.
        settings: The words that ``goldy fit`` would be given: ``--config FILE`` and changes to it.
        folder: Takes the whole configuration, as ``config.yaml``.

    Returns:
        The callback.

    Raises:
        ValueError: The configuration names no data, or a module that cannot be set up this way.
    """
    with command_line([*settings, *_ALONE]), without_known_warnings(), progress_only():
        cli = _SetupCLI(run=False)
        if cli.datamodule is None:
            raise ValueError("the configuration names no data module, so there is nothing to compare predictions on")
        if not is_overridden("validation_step", cli.model):
            raise ValueError(f"{type(cli.model).__name__} has no validation_step, without which it cannot be set up")
        atomic_write(folder / "config.yaml", cli.parser.dump(cli.config, skip_none=False))
        callback = make()
        cli.trainer.callbacks = [callback]  # type: ignore[attr-defined]
        cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    return callback


class _SetupCLI(GoldyCLI):
    """Takes the configuration that a run saved, too."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        # Arguments of ``fit``, which a saved configuration holds and nothing here needs.
        for name in ("ckpt_path", "weights_only"):
            parser.add_argument(f"--{name}", type=Any, default=None, help="not used")
