"""``goldy fit``, ``validate`` and ``test``: LightningCLI with this package's defaults."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from lightning_goldy.bundle import all_recipes
from lightning_goldy.quiet import without_known_warnings


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
