"""``goldy fit``, ``validate`` and ``test``, and what a configuration describes set up without training."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_goldy.core.files import atomic_write
from lightning_goldy.training.quiet import progress_only, without_known_warnings
from lightning_goldy.training.recipes import all_recipes


class SaveRunConfig(SaveConfigCallback):
    """Saves the run's configuration in its log directory, beside earlier ones: config.yaml, config-1.yaml, ..."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Picks a free name. Runs with a logger have directories of their own; those without share one."""
        folder = trainer.log_dir
        if folder is not None and not self.already_saved:
            number = 0
            while trainer.is_global_zero and Path(folder, self.config_filename).exists():
                number += 1
                self.config_filename = f"config-{number}.yaml"
        super().setup(trainer, pl_module, stage)


class GoldyCLI(LightningCLI):
    """LightningCLI for :class:`lightning_goldy.GoldyModule`, or any other LightningModule given as ``class_path``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveRunConfig,
            auto_configure_optimizers=False,
            **options,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods that are commands, with the arguments that the command line does not offer."""
        return {name: LightningCLI.subcommands()[name] for name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Makes GoldyModule what ``--model`` is unless a class path says otherwise."""
        parser.set_defaults({"model": {"class_path": "lightning_goldy.GoldyModule"}})


def run_trainer(arguments: Sequence[str]) -> int:
    """Runs a trainer command.

    Args:
        arguments: Words after the program's name, the command first.

    Returns:
        0; what goes wrong is raised, or exits as argument errors do.

    Raises:
        FileNotFoundError: A recipe that the package carries was named but is not in this folder.
    """
    check_configs(arguments)
    # LightningCLI takes sys.argv: distributed strategies start their other processes from it.
    with command_line(arguments), without_known_warnings():
        GoldyCLI()
    return 0


def check_configs(arguments: Sequence[str]) -> None:
    """Says how to get a configuration that the package carries and that is not in this folder.

    Raises:
        FileNotFoundError: Such a one was named.
    """
    paths = [value for option, value in pairwise(arguments) if option in ("-c", "--config")]
    paths += [word.partition("=")[2] for word in arguments if word.startswith("--config=")]
    for path in paths:
        name = Path(path).stem
        if not Path(path).exists() and any(recipe.name == name for recipe in all_recipes()):
            raise FileNotFoundError(f"{path} is not here ({Path.cwd()}); bring it with: goldy recipes copy {name}")


@contextmanager
def command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Puts words in the place of this process's command line."""
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before


CallbackT = TypeVar("CallbackT", bound=L.Callback)

# One device and nothing that belongs to a training, whatever the configuration says.
_ALONE = (
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
    "--trainer.logger=false",
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
        cli.trainer.callbacks = [_OneBatch(cli.trainer), callback]  # type: ignore[attr-defined]
        cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    return callback


class _OneBatch(L.Callback):
    """Lets the ignored evaluation take one batch, and whoever reads the validation set as many as are configured."""

    def __init__(self, trainer: L.Trainer) -> None:
        # A run that validates nothing has a validation set all the same.
        self._configured = trainer.limit_val_batches or 1.0
        trainer.limit_val_batches = 1

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.limit_val_batches = self._configured


class _SetupCLI(GoldyCLI):
    """Takes the configuration that a run saved, too."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        # Arguments of ``fit``, which a saved configuration holds and nothing here needs.
        for name in ("ckpt_path", "weights_only"):
            parser.add_argument(f"--{name}", type=Any, default=None, help="not used")
