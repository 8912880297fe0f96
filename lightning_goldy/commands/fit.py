"""``goldy fit``, ``validate`` and ``test``, and what a configuration describes set up without training."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import lightning.pytorch as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_goldy.commands.ranks import trainer_words
from lightning_goldy.core.files import PlainError, atomic_write, printable
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


class _PlainParser(LightningArgumentParser):
    """Spells out control characters of the values that its errors quote."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error("\n".join(map(printable, message.split("\n"))), ex)


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
            parser_class=_PlainParser,
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
    """Refuses files that cannot be what they were named as, and says how to get a configuration of the package.

    Raises:
        FileNotFoundError: A configuration that the package carries was named, and is not in this folder.
        ValueError: A configuration is empty, not UTF-8 or not YAML, or the checkpoint is empty.
    """
    for path in _named_by(arguments, "--ckpt_path"):
        if Path(path).is_file() and not Path(path).stat().st_size:
            raise ValueError(f"--ckpt_path {path}: an empty file, of 0 bytes, is no checkpoint")
    for path in [*_named_by(arguments, "-c"), *_named_by(arguments, "--config")]:
        if Path(path).is_file():
            _check_text(Path(path))
        name = Path(path).stem
        if not Path(path).exists() and any(recipe.name == name for recipe in all_recipes()):
            raise FileNotFoundError(f"{path} is not here ({Path.cwd()}); bring it with: goldy recipes copy {name}")


def _named_by(arguments: Sequence[str], option: str) -> list[str]:
    following = [value for word, value in pairwise(arguments) if word == option]
    return following + [word.partition("=")[2] for word in arguments if word.startswith(f"{option}=")]


def _check_text(path: Path) -> None:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        fault = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise ValueError(f"the configuration {path} is not UTF-8 text: {fault}; save it as UTF-8") from error
    if not text.strip():
        raise ValueError(f"the configuration {path} is empty")
    try:
        yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PlainError(f"the configuration {path} is not YAML: {error}") from error


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

# Nothing that belongs to a training, whatever the configuration says.
_UNTRAINED = (
    "--trainer.logger=false",
    "--trainer.callbacks=null",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)


def run_configured(
    make: Callable[[], CallbackT], settings: Sequence[str], folder: Path, *, shard: bool = False
) -> CallbackT:
    """Sets up model and data and calls a callback's ``on_validation_start``; what is evaluated after it is ignored.

    On one device, or on those of the processes that torchrun started, whatever the configuration says.

    Args:
        make: Gives the callback that does the work, once the configuration has been read.
        settings: The words that ``goldy fit`` would be given: ``--config FILE`` and changes to it.
        folder: Takes the whole configuration, as ``config.yaml``.
        shard: Whether each process holds a part of the model.

    Returns:
        The callback.

    Raises:
        ValueError: The configuration names no data, or a module that cannot be set up this way.
    """
    with command_line([*settings, *trainer_words(shard=shard), *_UNTRAINED]), without_known_warnings(), progress_only():
        cli = _SetupCLI(run=False)
        if cli.datamodule is None:
            raise ValueError("the configuration names no data module, so there is nothing to compare predictions on")
        if not is_overridden("validation_step", cli.model):
            raise ValueError(f"{type(cli.model).__name__} has no validation_step, without which it cannot be set up")
        if cli.trainer.is_global_zero:
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
