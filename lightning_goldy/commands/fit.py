"""``goldy fit``, ``validate`` and ``test``, and what a configuration describes set up without training."""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn, TypeVar

import lightning.pytorch as L
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_goldy.commands.output import trainer_words
from lightning_goldy.core.files import PlainError, atomic_write, printable
from lightning_goldy.core.naming import suggestion
from lightning_goldy.training.quiet import progress_only, without_known_warnings
from lightning_goldy.training.recipes import all_recipes


class SaveRunConfig(SaveConfigCallback):
    """Saves the run's configuration in its log directory, beside earlier ones: config.yaml, config-1.yaml, ..."""

    began = False
    """Whether a batch was trained on."""

    def on_train_batch_start(self, *_: Any) -> None:
        """Notes that the run was not refused."""
        self.began = True

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Picks a free name. Runs with a logger have directories of their own; those without share one."""
        folder = trainer.log_dir
        if folder is not None and not self.already_saved:
            number = 0
            while trainer.is_global_zero and Path(folder, self.config_filename).exists():
                number += 1
                self.config_filename = f"config-{number}.yaml"
        super().setup(trainer, pl_module, stage)


# What loggers and the saving of the configuration write before the first step.
_BEFORE_TRAINING = ("config*.yaml", "hparams.yaml", "events.out.tfevents.*", "metrics.csv")


class Traces:
    """What a run writes before its callbacks have checked anything, to be taken back where one of them refuses."""

    def __init__(self) -> None:
        self._trainer: L.Trainer | None = None
        self._made: list[Path] = []

    def note(self, trainer: L.Trainer) -> None:
        """Notes which folders of loggers are not there yet, those that they lie in among them; rank 0 alone does."""
        if getattr(rank_zero_only, "rank", 0):
            return
        self._trainer = trainer
        for logger in trainer.loggers:
            folder = getattr(logger, "log_dir", None)
            if folder and "://" not in str(folder) and not Path(folder).exists():
                self._made += [each for each in (Path(folder), *Path(folder).parents) if not each.exists()]

    def withdraw(self) -> None:
        """Removes them, unless a batch was trained on or anything else lies there, such as a result."""
        savers = [each for each in self._trainer.callbacks if isinstance(each, SaveRunConfig)] if self._trainer else []  # type: ignore[attr-defined]
        if self._trainer is None or any(saver.began for saver in savers):
            return
        for saver in savers:
            if saver.already_saved and not self._trainer.loggers:
                Path(self._trainer.default_root_dir, saver.config_filename).unlink(missing_ok=True)
        for folder in self._made:
            found = list(folder.iterdir()) if folder.is_dir() else []
            if all(any(map(path.match, _BEFORE_TRAINING)) and path.is_file() for path in found):
                for path in found:
                    path.unlink()
            with suppress(OSError):
                folder.rmdir()
        # That of results, where there is no logger.
        unlogged: Path | None = getattr(self._trainer, "_goldy_run_directory", None)
        with suppress(OSError):
            for folder in (unlogged, unlogged.parent) if unlogged else ():
                folder.rmdir()


class _PlainParser(LightningArgumentParser):
    """Tells an error in one line: what is wrong, of all that was tried to read a value."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            # Of a parser that tries one of several types.
            super().error(message, ex)
        if os.environ.get("GOLDY_TRACEBACK") and ex is not None:
            traceback.print_exception(ex)
        print(f"goldy: {plain_reason(message)}{self._meant(message)}", file=sys.stderr)
        self.exit(2)

    def _meant(self, message: str) -> str:
        """The option that is nearest to one that is not known, or what gives a model where there is none."""
        if plain_reason(message).endswith("arguments are required: model"):
            return "; give --config recipes/NAME.yaml (`goldy recipes` lists them), or --model CLASS"
        unknown = re.match(r"unrecognized arguments: (--[\w.]+)", message, re.IGNORECASE)
        known = [option for action in self._actions for option in action.option_strings]
        for action in self._actions:
            for below in (action.choices or {}).values() if isinstance(action, argparse._SubParsersAction) else ():
                known += [option for inner in below._actions for option in inner.option_strings]
        close = difflib.get_close_matches(unknown[1], known, n=1) if unknown else []
        return f"; did you mean {close[0]}?" if close else ""


# What jsonargparse says around the reasons: types that were tried, and the value again, whole.
_AROUND = (
    "Does not validate against any of the Union subtypes",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Expected a <class 'NoneType'>",
    "Problem with given class_path",
    "Parser key",
)


def plain_reason(message: str) -> str:
    r"""The line of a parser's message that tells what to do, with the option that it is about.

    Args:
        message: Of several lines: for a value that may be of several types one says what is wrong with each.

    Example:
        >>> lines = ['Parser key "model":', '  Problem with given class_path \'A\':', "  Errors:", "    - no folder x"]
        >>> plain_reason("\n".join([*lines, "    - Expected a <class 'NoneType'>", "  Given value: Namespace(a=1)"]))
        'model: no folder x'
        >>> plain_reason("Unrecognized arguments: --trainr")
        'Unrecognized arguments: --trainr'
    """
    for kind, option in re.findall(r"class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted", message):
        message = message.replace(
            f"Option {option!r} is not accepted",
            f"unknown {option!r}; {suggestion(option, accepted_options(resolve_name(kind)))}",
        )
    for kind, words, option in re.findall(
        r"class_path '([\w.]+)':\s+(?:Errors:\s+- )?(unrecognized arguments: --(\w+)\S*)", message, re.IGNORECASE
    ):
        meant = f"unknown {option!r}; {suggestion(option, accepted_options(resolve_name(kind)))}"
        message = message.replace(words, meant)
    for place, name in re.findall(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        classes = getattr(resolve_name(place), "__all__", ())
        below = difflib.get_close_matches(name, _callbacks(), n=1) if place == "lightning_goldy" else []
        meant = f"did you mean lightning_goldy.callbacks.{below[0]}?" if below else suggestion(name, classes)
        message = message.replace(f"module {place!r} has no attribute {name!r}", f"{place} has no {name!r}; {meant}")
    for name in re.findall(r"Expected a dot import path string: (\w+)\s", message):
        close = difflib.get_close_matches(name, _callbacks(), n=1)
        meant = f"{name} is no path of a class; did you mean lightning_goldy.callbacks.{''.join(close)}?"
        message = message.replace(f"Expected a dot import path string: {name}", meant) if close else message
    # How a class can be written, after every value that is none.
    message = re.sub(r"\n\s*Subclass types expect one of:(?:\n\s*- a (?:class path|dict) .*)*", "", message)
    lines = [line.strip().removeprefix("- ").strip() for line in message.split("\n")]
    nested = re.findall(r"NestedArg\(key='([\w.]+)'", message)
    key = next(iter(re.findall(r'(?:Parser key|Validation failed: Key) "([\w.\[\]]+)"', message)), "")
    reasons = [line for line in lines if line and not line.startswith(_AROUND)]
    # The most specific reason stands deepest; a plain mismatch of types says least.
    told = [line for line in reasons if not line.startswith(("Expected ", "Not a valid subclass"))] or reasons or lines
    where = ".".join([key, *nested[:1]]) if nested and not key.endswith(nested[0]) else key
    keys = re.findall(r'Parser key "([\w.]+)":', message)
    if len(keys) > 1 and told[0].startswith("Expected "):
        # The option within the value, and what it was given.
        where, given = ".".join(keys), re.search(r"Given value: (.*)", message)
        told = [told[0] if "Got value" in told[0] or not given else f"{told[0]}. Got value: {given[1]}"]
    reason = printable(" ".join(told[:1] if len(told) > 1 and "Errors:" in message else told))
    return f"{where}: {reason}" if where and where not in reason else reason


def _callbacks() -> Sequence[str]:
    return getattr(resolve_name("lightning_goldy.callbacks"), "__all__", ())


def accepted_options(kind: type) -> list[str]:
    """The options of a class, its own first; where it hands on others by ``**``, those of what it inherits, too.

    Example:
        >>> from lightning_goldy.callbacks import GoldenParameters
        >>> options = accepted_options(GoldenParameters)
        >>> options.index("top_k_percent") < options.index("every_n_steps")
        True
    """
    found: dict[str, None] = {}
    for inherited in kind.__mro__:
        if "__init__" not in vars(inherited):
            continue
        parameters = [*inspect.signature(vars(inherited)["__init__"]).parameters.values()][1:]
        found |= {p.name: None for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return [*found]


class GoldyCLI(LightningCLI):
    """LightningCLI for :class:`lightning_goldy.GoldyModule`, or any other LightningModule given as ``class_path``."""

    def __init__(self, *, traces: Traces | None = None, **options: Any) -> None:
        self.traces = traces
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

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Takes ``--callbacks.NAME.OPTION VALUE``, too, which changes one option of one of the callbacks."""
        words, changes = callback_changes(sys.argv[1:] if args is None else args)
        with command_line(words):
            super().parse_arguments(parser, None if args is None else words)
        config = self.config[self.config["subcommand"]] if "subcommand" in self.config else self.config
        if isinstance(listed := config["trainer"].get("callbacks"), list):
            config["trainer"]["callbacks"] = arranged_callbacks(listed, _meant_twice(config.get("config") or ()))
        if changes:
            change_callbacks(config["trainer"].get("callbacks") or [], changes)
            self.config = parser.parse_object(self.config)

    def before_fit(self) -> None:
        """Notes what is there before anything is written."""
        if self.traces is not None:
            self.traces.note(self.trainer)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Makes GoldyModule what ``--model`` is unless a class path says otherwise."""
        parser.set_defaults({"model": {"class_path": "lightning_goldy.GoldyModule"}})


def callback_changes(words: Sequence[str]) -> tuple[list[str], list[tuple[str, str, Any]]]:
    """Takes the options of single callbacks out of a command line.

    Args:
        words: ``--callbacks.NAME.OPTION VALUE`` or ``--callbacks.NAME.OPTION=VALUE`` among others.

    Returns:
        The other words, and name, option and value, as YAML reads it, of each change.

    Raises:
        ValueError: A name, an option or a value is missing.

    Example:
        >>> callback_changes(["fit", "--callbacks.taylor_diff.orders=[1]", "--trainer.max_steps", "3"])
        (['fit', '--trainer.max_steps', '3'], [('taylor_diff', 'orders', [1])])
    """
    rest, changes, following = [], [], iter(words)
    for word in following:
        if not word.startswith("--callbacks."):
            rest.append(word)
            continue
        path, equals, value = word.removeprefix("--callbacks.").partition("=")
        name, _, option = path.partition(".")
        given = value if equals else next(following, None)
        if not name or not option or given is None:
            raise ValueError(f"{word}: write --callbacks.NAME.OPTION VALUE, as in --callbacks.taylor_diff.n_samples 4")
        changes.append((name, option, yaml.safe_load(given)))
    return rest, changes


def change_callbacks(callbacks: Sequence[Any], changes: Iterable[tuple[str, str, Any]]) -> None:
    """Changes options of single callbacks of a configuration.

    Args:
        callbacks: Each with ``class_path`` and ``init_args``.
        changes: Name of the callback (its ``name``, class name, or class name in snake case), option, value.

    Raises:
        ValueError: No callback has that name, or several have.
    """
    for name, option, value in changes:
        known = [_names_of(callback) for callback in callbacks]
        found = [callback for callback, names in zip(callbacks, known, strict=True) if name in names]
        if len(found) != 1:
            told = ", ".join(names[0] for names in known) or "none"
            close = difflib.get_close_matches(name, [one for names in known for one in names], n=1)
            meant = f"did you mean {close[0]}? There are" if close and not found else "there are"
            raise ValueError(
                f"--callbacks.{name}.{option}: {len(found) or 'no'} callbacks are called {name!r}; {meant}: {told}"
            )
        found[0][f"init_args.{option}"] = value


def _meant_twice(files: Iterable[Any]) -> set[str]:
    """Classes of callbacks of which one file by itself attaches two without a name: no preset came between."""
    meant: set[str] = set()
    for file in files:
        read = yaml.safe_load(file.get_content())
        trainer = read.get("trainer") if isinstance(read, dict) else None
        lists = [trainer.get(key) or [] for key in ("callbacks", "callbacks+")] if isinstance(trainer, dict) else []
        callbacks = [each for listed in lists for each in listed if isinstance(each, dict) and "class_path" in each]
        nameless = Counter(_names_of(each)[1] for each in callbacks if not (each.get("init_args") or {}).get("name"))
        meant |= {kind for kind, count in nameless.items() if count > 1}
    return meant


def arranged_callbacks(callbacks: Sequence[Any], meant_twice: Collection[str] = ()) -> list[Any]:
    """The callbacks of several configurations, so that a preset goes with a recipe that attaches some of its own.

    Of two of one class without a name, which could not be told apart, the first stays; the snapshot goes before those
    that compare with it.

    Args:
        callbacks: Each with ``class_path`` and ``init_args``, in the order that they are given.
        meant_twice: Classes of which all stay, to be refused until they are named.

    Example:
        >>> listed = ["lightning.Timer", *(f"lightning_goldy.{kind}" for kind in ("A", "A", "GoldenSnapshot"))]
        >>> [each["class_path"].rpartition(".")[2] for each in arranged_callbacks([{"class_path": x} for x in listed])]
        ['Timer', 'GoldenSnapshot', 'A']
    """
    kept: dict[Any, Any] = {}
    for place, callback in enumerate(callbacks):
        own = callback["class_path"].startswith("lightning_goldy.")
        name, *_, kind = _names_of(callback)
        nameless = own and kind not in meant_twice and not (callback.get("init_args") or {}).get("name")
        if nameless and kind in kept:
            rank_zero_info(f"{name}: two configurations attach it; the options of the first stay")
        kept.setdefault(kind if nameless else place, callback)
    ordered = list(kept.values())
    first = next((place for place, each in enumerate(ordered) if each["class_path"].startswith("lightning_goldy.")), 0)
    snapshots = [each for each in ordered[first:] if each["class_path"].endswith(".GoldenSnapshot")]
    others = [each for each in ordered[first:] if not each["class_path"].endswith(".GoldenSnapshot")]
    return [*ordered[:first], *snapshots, *others]


def _names_of(callback: Any) -> list[str]:
    kind = callback["class_path"].rpartition(".")[2]
    snake = re.sub(r"(?<!^)(?=[A-Z])", "_", kind).lower()
    given = (callback.get("init_args") or {}).get("name")
    return [given, kind] if given else [snake, kind]


# What is told in a line before the training begins; a fault of the code shows where it is.
_TOLD = (ValueError, OSError, ImportError, RuntimeError, MisconfigurationException)


def _in_training(error: BaseException) -> bool:
    """Whether an error comes from within the training itself."""
    frames = (frame.filename for frame in traceback.extract_tb(error.__traceback__))
    return any(name.endswith("training_epoch_loop.py") for name in frames)


def run_trainer(arguments: Sequence[str]) -> int:
    """Runs a trainer command.

    Args:
        arguments: Words after the program's name, the command first.

    Returns:
        0, or 2 when it failed before its first batch for a reason that one line tells; ``goldy --debug``, or the
        environment's ``GOLDY_TRACEBACK=1``, shows its trace, too. What goes wrong later is raised, and argument errors
        exit.
    """
    traces = Traces()
    # LightningCLI takes sys.argv: distributed strategies start their other processes from it.
    with command_line(arguments), without_known_warnings():
        try:
            check_configs(arguments)
            GoldyCLI(traces=traces)
        except _TOLD as error:
            if _in_training(error):
                raise
            traces.withdraw()
            if os.environ.get("GOLDY_TRACEBACK"):
                traceback.print_exc()
            print(f"goldy: {plain_reason(str(error))}", file=sys.stderr)
            return 2
    return 0


def check_configs(arguments: Sequence[str]) -> None:
    """Refuses files that cannot be what they were named as, and says how to get a configuration of the package.

    Raises:
        FileNotFoundError: A configuration that the package carries, or one like it, was named, and is not there.
        ValueError: A configuration is empty, not UTF-8 or not YAML, or the checkpoint is empty.
    """
    for path in _named_by(arguments, "--ckpt_path"):
        if Path(path).is_file() and not Path(path).stat().st_size:
            raise ValueError(f"--ckpt_path {path}: an empty file, of 0 bytes, is no checkpoint")
    for path in [*_named_by(arguments, "-c"), *_named_by(arguments, "--config")]:
        if Path(path).is_file():
            _check_text(Path(path))
        if Path(path).exists():
            continue
        name, known = Path(path).stem, [recipe.name for recipe in all_recipes()]
        if name in known:
            raise FileNotFoundError(f"{path} is not here ({Path.cwd()}); bring it with: goldy recipes copy {name}")
        if close := difflib.get_close_matches(name, known, n=1):
            raise FileNotFoundError(f"{path} does not exist; did you mean {close[0]}? `goldy recipes` lists them")


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


class ConfiguredCallback(L.Callback):
    """What :func:`run_configured` calls; it keeps the configuration once nothing more will be refused."""

    keep_configuration: Callable[[], object] = staticmethod(lambda: None)
    """Writes ``config.yaml``, before the first result, so that what is refused leaves no folder behind."""


CallbackT = TypeVar("CallbackT", bound=ConfiguredCallback)

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
        folder: Takes the whole configuration, as ``config.yaml``, when the callback keeps it.
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
        callback = make()
        if cli.trainer.is_global_zero:
            text = cli.parser.dump(cli.config, skip_none=False)
            callback.keep_configuration = partial(atomic_write, folder / "config.yaml", text)
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
