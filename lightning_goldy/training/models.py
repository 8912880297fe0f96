"""Models by name: how they are built, adapted, sharded over processes, and written as Hugging Face folders."""

from __future__ import annotations

import difflib
import inspect
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as L
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from lightning_goldy.analysis.heads import gated_state, gates_card
from lightning_goldy.core.architecture import HeadGates, UnsupportedArchitectureError
from lightning_goldy.core.base import read_checkpoint
from lightning_goldy.core.files import atomic_path, atomic_write
from lightning_goldy.core.naming import require_choice, require_kinds, require_number, suggestion
from lightning_goldy.core.sharding import gather, is_sharded
from lightning_goldy.training.quiet import without_transformers_bars

Head = Literal[
    "causal_lm", "sequence_classification", "seq2seq_lm", "masked_lm", "token_classification", "question_answering"
]
WeightDtype = Literal["float32", "bfloat16", "float16", "auto"]

AUTO_CLASSES: dict[str, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "seq2seq_lm": AutoModelForSeq2SeqLM,
    "masked_lm": AutoModelForMaskedLM,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "sequence_classification": AutoModelForSequenceClassification,
}
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Accepted by every configuration, though not among the parameters of its class.
_COMMON_KEYS = (
    "attn_implementation",
    "decoder_start_token_id",
    "num_labels",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
)


@dataclass(frozen=True)
class LoraOptions:
    r"""Low-rank adapters: :math:`W x + \frac{\alpha}{r} B A x`, of which only A and B train.

    Args:
        rank: r, the inner dimension of the adapters, >= 1.
        alpha: The scale's numerator.
        dropout: Dropout on the adapters' input, in [0, 1).
        target_modules: Names of the layers to adapt, ``"all-linear"``, or None for the family's default.

    Raises:
        ValueError: A value is out of its range.

    Example:
        >>> LoraOptions(rank=4).alpha
        16.0
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "dropout"):
            require_number(f"lora.{name}", getattr(self, name), whole=name == "rank")
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1; got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha must be positive; got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must lie in [0, 1); got {self.dropout}")
        require_kinds(type(self), vars(self))


def load_model(name: str, head: Head = "causal_lm", dtype: WeightDtype = "float32") -> nn.Module:
    """A pretrained model from a local folder or, when there is no such folder, from the Hugging Face hub.

    Args:
        name: A folder, or a name on the hub.
        head: What the model ends in.
        dtype: The weights' type; ``auto`` takes the one they were saved in.

    Returns:
        The model in training mode.

    Raises:
        ValueError: It is neither a folder that holds such a model nor a name that could be loaded.
    """
    folder = Path(name).expanduser()
    weights = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        model = AUTO_CLASSES[head].from_pretrained(str(folder) if folder.is_dir() else name, dtype=weights)
    except (OSError, ValueError, SafetensorError) as error:
        if folder.is_dir():
            raise ValueError(f"the folder {name!r} holds no loadable {head} model: {_one_line(error)}") from error
        # No name on the hub begins so, and what it says of its names is no help to who meant a folder.
        path = name.startswith((".", "/", "~"))
        failed = "" if path else ", and loading it from the Hugging Face hub failed"
        reason = "" if path else f"The hub's reason: {_one_line(error)}"
        raise ValueError(
            f"model {name!r} is no local folder (looked for {folder.absolute()}){failed}; give a folder of "
            f"save_pretrained, or a name on the hub. {_near(folder)}{reason}".rstrip()
        ) from error
    return model.train()  # from_pretrained returns eval mode, in which Lightning would train without dropout


def _one_line(error: Exception) -> str:
    # Of a class that has no such model every one that has is listed.
    return " ".join(str(error).partition("Model type should be one of")[0].split())


def _near(folder: Path) -> str:
    """The folder beside one that is not there whose name is nearest to its, as a question; or nothing."""
    try:
        names = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(folder.name, names, n=1)
    return f"Did you mean {folder.parent / close[0]}? " if close else ""


def complete_config(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Fills the vocabulary size and the special tokens' ids in from a tokenizer.

    Args:
        config: ``model_type`` and any keys of that family's configuration; keys that are there stay.
        tokenizer: Where missing values come from; without one, default ids beyond the vocabulary become None.

    Returns:
        The completed keys; ``vocab_size`` is missing when nobody knows it.

    Example:
        >>> complete_config({"model_type": "gpt2", "vocab_size": 8}, None)["eos_token_id"] is None
        True
    """
    check_config(config)
    completed = dict(config)
    if tokenizer is not None:
        completed.setdefault("vocab_size", len(tokenizer))
        for key in _SPECIAL_IDS:
            completed.setdefault(key, getattr(tokenizer, key))
    elif "vocab_size" in completed:
        default = CONFIG_MAPPING[completed["model_type"]]()
        for key in _SPECIAL_IDS:
            value = getattr(default, key, None)
            if key not in completed and isinstance(value, int) and value >= completed["vocab_size"]:
                completed[key] = None
    return completed


def check_config(config: Mapping[str, Any]) -> None:
    """Refuses what ``AutoConfig`` would take in silence.

    Raises:
        ValueError: ``model_type`` is missing or unknown, or a key is no option of that family.

    Example:
        >>> try:
        ...     check_config({"model_type": "gpt2", "n_layers": 2})
        ... except ValueError as error:
        ...     print(str(error)[:75])
        unknown key 'n_layers' in the gpt2 configuration; did you mean 'n_layer'? V
    """
    model_type = config.get("model_type")
    if model_type is None:
        raise ValueError(
            f"a model configuration needs 'model_type' (gpt2, llama, gpt_neox, ...); got the keys {sorted(config)}"
        )
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"unknown model_type {model_type!r}; {suggestion(str(model_type), CONFIG_MAPPING.keys())}")
    default = CONFIG_MAPPING[model_type]()
    parameters = inspect.signature(type(default).__init__).parameters
    known = {*parameters, *type(default).attribute_map, *_COMMON_KEYS} - {"self", "kwargs"}
    for key in config:
        if key != "model_type" and key not in known and not hasattr(default, key):
            raise ValueError(f"unknown key {key!r} in the {model_type} configuration; {suggestion(key, sorted(known))}")


def build_model(config: Mapping[str, Any], head: Head = "causal_lm", dtype: WeightDtype = "float32") -> nn.Module:
    """A model with random weights.

    Args:
        config: ``model_type`` and any keys of that family's configuration.
        head: What the model ends in.
        dtype: The weights' type; ``auto`` is float32 here.

    Returns:
        The model in training mode.

    Raises:
        ValueError: The configuration is not one that the family can have.

    Example:
        >>> config = {"model_type": "gpt2", "vocab_size": 8, "n_layer": 1, "n_embd": 4, "n_head": 1}
        >>> sum(p.numel() for p in build_model(complete_config(config, None)).parameters()) > 0
        True
    """
    check_config(config)
    options = {key: value for key, value in config.items() if key != "model_type"}
    built = AutoConfig.for_model(config["model_type"], **options)
    auto_class = AUTO_CLASSES[head]
    if type(built) not in auto_class._model_mapping:
        raise ValueError(f"transformers has no {head} model of type {config['model_type']!r}")
    weights = getattr(torch, "float32" if dtype == "auto" else dtype)
    return auto_class.from_config(built, dtype=weights).train()


def add_lora(model: nn.Module, options: LoraOptions) -> nn.Module:
    """Freezes a model and puts trainable low-rank adapters on its layers, through PEFT.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: PEFT finds no layer to adapt.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'lightning-goldy[lora]'") from error
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # any number scales
        lora_dropout=options.dropout,
        target_modules=options.target_modules,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
        raise ValueError(
            f"lora.target_modules={options.target_modules!r} does not fit {type(model).__name__}: {error}; "
            f"its linear layers are named {sorted({name.rpartition('.')[2] for name in layers})}"
        ) from error


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recomputes each block in the backward pass instead of keeping its activations (non-reentrant).

    Raises:
        ValueError: The model does not offer it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"gradient_checkpointing=True, but {type(model).__name__} does not support it")
    if hasattr(model, "activation_checkpointing_enable"):  # the name that transformers 5.2x gave it
        model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Compares the tokenizer's size with the rows of the model's embedding.

    Raises:
        ValueError: The tokenizer has ids that the model has no row for.
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    rows = getattr(embedding, "num_embeddings", None)
    if tokenizer is not None and rows is not None and len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens but {type(model).__name__} only {rows} embeddings; "
            "use the model's own tokenizer, or resize its embeddings"
        )


def position_limit(model: nn.Module) -> int | None:
    """The most tokens that a model with learned positions can take; None when positions are not learned.

    Example:
        >>> config = {"model_type": "gpt2", "vocab_size": 8, "n_layer": 1, "n_embd": 4, "n_head": 1, "n_positions": 6}
        >>> position_limit(build_model(complete_config(config, None)))
        6
    """
    names = ("wpe", "embed_positions", "position_embeddings")
    named = [child for name, child in model.named_modules() if name.rpartition(".")[2] in names]
    tables = [child for child in named if isinstance(child, nn.Embedding)]
    # OPT keeps two rows for padding.
    return min((table.num_embeddings - int(getattr(table, "offset", 0)) for table in tables), default=None)


def check_length(input_ids: torch.Tensor, limit: int) -> None:
    """Refuses a batch that is too long for learned positions.

    Raises:
        ValueError: There are more tokens than positions; torch itself would only say "index out of range".
    """
    if input_ids.shape[1] > limit:
        raise ValueError(
            f"a batch has {input_ids.shape[1]} tokens, but the model has only {limit} positions; use shorter blocks or "
            "samples, or (from random weights) a larger n_positions or max_position_embeddings"
        )


def shard_blocks(model: nn.Module, mesh: Any) -> None:
    """Shards each block, then the rest, over the ``data_parallel`` dimension of a mesh; again is harmless.

    Args:
        model: Changed in place.
        mesh: What Lightning's ``ModelParallelStrategy`` gives, with ``data_parallel`` and ``tensor_parallel``.

    Raises:
        ValueError: The mesh also splits tensors, for which there is no plan here.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    tensor_parallel = mesh["tensor_parallel"].size()
    if tensor_parallel > 1:
        raise ValueError(
            f"the strategy splits tensors over {tensor_parallel} devices, but the model is sharded over data_parallel "
            "only; use ModelParallelStrategy(data_parallel_size=<devices>, tensor_parallel_size=1)"
        )
    if isinstance(model, FSDPModule):
        return
    for block in repeated_blocks(model):
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model declares indivisible, or else the children of its longest list of modules.

    Example:
        >>> [type(block).__name__ for block in repeated_blocks(nn.Sequential(nn.Linear(1, 1), nn.ReLU()))]
        ['Linear']
    """
    declared = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in declared]
    if not blocks:
        lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
        blocks = list(max(lists, key=len).children()) if lists else []
    return [block for block in blocks if block is not model and next(block.parameters(), None) is not None]


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights by name; a collective when the model is sharded.

    Example:
        >>> sorted(full_state_dict(nn.Linear(1, 1)))
        ['bias', 'weight']
    """
    return {name: gather(value) if is_sharded(value) else value for name, value in model.state_dict().items()}


def pretrained_folder(checkpoint: str | os.PathLike[str]) -> Path:
    """The folder in Hugging Face format that belongs to a Lightning checkpoint.

    Example:
        >>> pretrained_folder("run/checkpoints/step=10.ckpt").name, pretrained_folder("run/weights").name
        ('step=10', 'weights-pretrained')
    """
    path = Path(checkpoint)
    return path.with_name(path.name.removesuffix(".ckpt") if path.name.endswith(".ckpt") else f"{path.name}-pretrained")


def write_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    state: Mapping[str, Tensor] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Writes a model, or its PEFT adapter, and a tokenizer so that plain transformers or PEFT loads them.

    The folder is whole or absent: it is written under another name and renamed. Where attention heads are closed, their
    columns of the output projections are written as zeros, and ``README.md`` tells which; an adapter, which is saved
    without the weights that it adapts, cannot close a head, and a warning says so.

    Args:
        model: A transformers or PEFT model.
        folder: Replaced when it exists.
        state: The full weights, by the names of ``model.state_dict()``; by default the model's own.
        tokenizer: Saved beside the model when given.

    Returns:
        The folder.

    Raises:
        TypeError: The model has no ``save_pretrained``.
        UnsupportedArchitectureError: Heads are closed, and which weights are theirs is not known.
    """
    if not hasattr(model, "save_pretrained"):
        raise TypeError(f"{type(model).__name__} has no save_pretrained; only transformers and PEFT models have")
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    weights = model.state_dict() if state is None else state
    gates, is_adapter = HeadGates.of(model), hasattr(model, "peft_config")
    if is_adapter and gates is not None and gates.closed:
        rank_zero_warn(
            f"{folder} holds an adapter, which cannot close the {len(gates.closed)} closed heads: close them again "
            "with HeadGates(model).disable(heads) once it is loaded; its README.md lists them"
        )
    elif not is_adapter:
        weights = gated_state(model, weights)
    options: dict[str, Any] = {"state_dict": _with_ties(model, weights)}
    if is_adapter:
        options["save_embedding_layers"] = False  # its "auto" asks the hub whether the vocabulary has changed
    try:
        with without_transformers_bars():
            model.save_pretrained(str(partial), **options)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
        if (card := gates_card(model, in_weights=not is_adapter)) is not None:
            atomic_write(partial / "README.md", card)
        _replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


Kept = Literal["all", "newest", "none"]


@dataclass(frozen=True)
class CheckpointOptions:
    """What checkpoints hold, and which are written beside those of the trainer's ``ModelCheckpoint``.

    For AdamW in float32 the optimizer's state is twice the weights: a checkpoint takes three times the model's size,
    and the folder in Hugging Face format once more.

    Args:
        pretrained: Beside which checkpoints a folder in Hugging Face format stands: ``all``, the ``newest``, ``none``.
        optimizer: Which checkpoints of a run hold the optimizer's state, with which a training can be resumed: ``all``,
            or the ``newest``; when one is written, older ones of the run become weights alone.
        final: Whether the model is saved when the training ends, before analyses at the end, unless a checkpoint of
            that step exists. It needs a ``ModelCheckpoint``, whose folder and file name it takes.

    Raises:
        ValueError: A value is unknown.

    Example:
        >>> CheckpointOptions(optimizer="newest").pretrained
        'all'
    """

    pretrained: Kept = "all"
    optimizer: Literal["all", "newest"] = "all"
    final: bool = True

    def __post_init__(self) -> None:
        require_choice("checkpoints.pretrained", self.pretrained, get_args(Kept))
        require_choice("checkpoints.optimizer", self.optimizer, ("all", "newest"))
        if not isinstance(self.final, bool):
            raise ValueError(f"checkpoints.final is true or false; got {self.final!r}")


class PretrainedExport(CheckpointIO):
    """Saves, loads and removes checkpoints through another ``CheckpointIO``, and keeps a folder beside each.

    For ``step=10.ckpt`` it writes ``step=10/``, which ``from_pretrained`` loads, and removes it with the checkpoint.
    What is exported is the weights in the checkpoint, so an asynchronous writer underneath changes nothing.

    Args:
        inner: The plugin that does the saving.
        trainer: Whose module is exported: its ``goldy_model``, with its ``export_tokenizer()``.
        options: What older checkpoints keep.
    """

    def __init__(
        self,
        inner: CheckpointIO,
        trainer: L.Trainer,
        options: CheckpointOptions = CheckpointOptions(),
    ) -> None:
        self.inner = inner
        self.trainer = trainer
        self.options = options
        # Local checkpoints of this run that hold more than older ones shall, with their steps.
        self._whole: dict[str, int] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Saves the checkpoint, then the folder, then takes from older ones what only the newest keeps."""
        self.inner.save_checkpoint(checkpoint, path, storage_options=storage_options)
        if "state_dict" not in checkpoint:
            return  # The weights that processes which Lightning spawned or forked hand back: no checkpoint of the run.
        if self.options.pretrained != "none":
            self._export(checkpoint, path)
        if "://" in str(path):
            return
        step = int(checkpoint.get("global_step", 0))
        for older, at in [*self._whole.items()]:
            if at < step:
                del self._whole[older]
                if self.options.pretrained == "newest":
                    _remove_folder(pretrained_folder(older))
                if self.options.optimizer == "newest" and Path(older).is_file():
                    keep_weights_alone(older)
        self._whole[str(path)] = step

    def _export(self, checkpoint: Mapping[str, Any], path: Any) -> None:
        module = self.trainer.lightning_module
        if not getattr(module, "exports_pretrained", False):
            return
        if "://" in str(path):
            rank_zero_warn(f"no pretrained folder is written beside {path}: only local folders can hold one")
            return
        state = {
            name.removeprefix("model."): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith("model.")
        }
        folder, tokenizer = pretrained_folder(path), module.export_tokenizer()  # type: ignore[operator]
        try:
            write_pretrained(module.model, folder, state=state, tokenizer=tokenizer)  # type: ignore[arg-type]
        except UnsupportedArchitectureError as error:
            rank_zero_warn(f"no pretrained folder is written beside {path}, it would open the closed heads: {error}")

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads through the inner plugin."""
        return self.inner.load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes the folder, then the checkpoint."""
        if "://" not in str(path):
            _remove_folder(pretrained_folder(path))
        self._whole.pop(str(path), None)
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """Lets the inner plugin finish."""
        self.inner.teardown()


def _remove_folder(folder: Path) -> None:
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        shutil.rmtree(folder)


def keep_weights_alone(path: str | os.PathLike[str]) -> None:
    """Takes the optimizer's state out of a Lightning checkpoint, which then loads as one of ``save_weights_only``.

    Args:
        path: The file; it is replaced at once.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": {}, "optimizer_states": [1], "lr_schedulers": []}, f"{folder}/a.ckpt")
        ...     keep_weights_alone(f"{folder}/a.ckpt")
        ...     sorted(torch.load(f"{folder}/a.ckpt"))
        ['state_dict']
    """
    checkpoint = read_checkpoint(Path(path))
    for name in ("optimizer_states", "lr_schedulers"):
        checkpoint.pop(name, None)
    with atomic_path(Path(path)) as temporary:
        torch.save(checkpoint, temporary)


def save_final(trainer: L.Trainer) -> None:
    """Has the trainer's first ``ModelCheckpoint`` save the model as training leaves it; every rank calls.

    Nothing happens where there is none, where nothing was trained, or where one of them saved at this step.
    """
    savers: list[Any] = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    step = trainer.global_step
    trial = trainer.fast_dev_run  # type: ignore[attr-defined]
    if not savers or trial or not step or any(each._last_global_step_saved == step for each in savers):
        return
    saver = savers[0]
    name = saver._get_metric_interpolated_filepath_name(saver._monitor_candidates(trainer), trainer)
    saver._save_checkpoint(trainer, name)


def attach_export(
    trainer: L.Trainer,
    options: CheckpointOptions = CheckpointOptions(),
) -> None:
    """Makes a trainer write a pretrained folder beside each checkpoint; again on the same trainer is harmless.

    Sharded checkpoints, which are folders with one part per process, get none: a warning says so.

    Args:
        trainer: Whose checkpoints they are.
        options: What older checkpoints keep.
    """
    strategy = trainer.strategy
    if options.pretrained == "none" and options.optimizer == "all":
        return
    if getattr(strategy, "_save_distributed_checkpoint", False):
        rank_zero_warn(
            f"{type(strategy).__name__} saves sharded checkpoints, beside which no pretrained folder is written; use "
            "save_distributed_checkpoint=False, or call GoldyModule.save_pretrained(folder) on every process"
        )
    elif not isinstance(strategy.checkpoint_io, PretrainedExport):
        strategy.checkpoint_io = PretrainedExport(strategy.checkpoint_io, trainer, options)


def _with_ties(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Gathering and asynchronous copying give tied weights storages of their own; transformers knows ties by storage.
    first: dict[int, str] = {}
    tied = dict(state)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        original = first.setdefault(id(parameter), name)
        if original != name and original in tied and name in tied:
            tied[name] = tied[original]
    return tied


def _replace(source: Path, target: Path) -> None:
    if not target.exists():
        source.rename(target)
        return
    # A folder cannot be renamed over another; for an instant there is none, never half of one.
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
    target.rename(old)
    source.rename(target)
    shutil.rmtree(old)
