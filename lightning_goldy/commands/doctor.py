"""``goldy doctor``: what is installed, which analyses work on a model, and what each callback will cost."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
import yaml
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from lightning_goldy.analysis.attention import attention_statistics
from lightning_goldy.analysis.circuits import CircuitGraph
from lightning_goldy.analysis.coupling.pieces import selected_parameters
from lightning_goldy.analysis.forecast import Plan, Run, Speeds
from lightning_goldy.analysis.forecast.timing import graph_bytes, measure_speeds
from lightning_goldy.analysis.taylor import expansion_route
from lightning_goldy.callbacks import (
    ActivationDifferences,
    AnalysisCallback,
    AttentionTracker,
    BasinVolume,
    ChangeAttribution,
    CircuitTracker,
    GoldenParameters,
    GoldenSnapshot,
    KnowledgeCoupling,
    ParameterDistribution,
    ReverseGoldenParameters,
    TaylorDiff,
)
from lightning_goldy.callbacks.base import try_gradients
from lightning_goldy.callbacks.preflight import (
    Outlook,
    derive,
    limit_large,
    settings_in_words,
    shape_of,
    size_in_words,
    time_in_words,
    training_bytes,
)
from lightning_goldy.commands.fit import check_configs, plain_reason
from lightning_goldy.core.architecture import HeadGates, UnsupportedArchitectureError, describe_architecture
from lightning_goldy.core.files import printable
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import require_at_least, require_choice
from lightning_goldy.core.objective import CausalLMObjective, Objective, objective_for
from lightning_goldy.core.space import ParameterSpace, trainable_parameters
from lightning_goldy.core.store import available_memory
from lightning_goldy.training.models import AUTO_CLASSES, Head, load_model

SHAPES: Mapping[str, Mapping[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""Shapes of the Llama family that can be planned by name."""
_PACKAGES = (
    "lightning-goldy",
    "torch",
    "lightning",
    "transformers",
    "peft",
    "deepspeed",
    "altair",
    "vl-convert-python",
)
_STRATEGIES = (
    ("single device, DDP", "every analysis; samples, directions and pieces are shared out"),
    ("FSDP2, HSDP (ModelParallelStrategy)", "every analysis; Taylor by differences, up to order 2"),
    ("FSDP1 (FSDPStrategy)", "refused: flat parameters merge weights across layers"),
)

# What a row begins with that says why not, and which row tells it of a callback.
_REFUSED = "does not"
_NEEDS = {
    "golden_parameters": "golden, reverse golden",
    "reverse_golden_parameters": "golden, reverse golden",
    "attention_tracker": "attention",
    "circuit_tracker": "circuits",
    "knowledge_coupling": "coupling",
    "taylor_diff": "taylor",
    "basin_volume": "basin",
}
# By the end of a class's name what a model's samples of tokens are loaded for.
_HEADS: Mapping[str, Head] = {
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForMaskedLM": "masked_lm",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
}
# Letters of a line in a pipe or a file.
_PIPE_WIDTH = 130


@dataclass(frozen=True)
class Question:
    """What is asked.

    Args:
        model: A folder or a name on the hub; None for a shape.
        configs: Whose callbacks are planned; by default every one that only looks.
        shape: A shape by name, which is planned without being allocated.
        meta: Whether to read the model's configuration alone, and allocate nothing.
        steps: Of the run.
        batch_size: Of the probe and of the training.
        length: Tokens of a sample.
        dtype: Of the weights that are planned.
        shards: Ranks that share each parameter.
        replicas: Ranks that share the samples.

    Raises:
        ValueError: A value is out of range, or neither a model nor a shape is given.

    Example:
        >>> Question(shape="9b")
        Traceback (most recent call last):
        ValueError: unknown shape '9b'; Valid: 1b, 8b, 70b
    """

    model: str | None = None
    configs: tuple[str, ...] = ()
    shape: str | None = None
    meta: bool = False
    steps: int | None = None
    batch_size: int | None = None
    length: int | None = None
    dtype: str = "float32"
    shards: int = 1
    replicas: int = 1

    def __post_init__(self) -> None:
        if (self.model is None) == (self.shape is None):
            raise ValueError("name a model (a folder, or a name on the hub), or a shape with --shape 8b; one of both")
        if self.shape is not None:
            require_choice("shape", self.shape, tuple(SHAPES))
        for name in ("steps", "batch_size", "length", "shards", "replicas"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)


def run_doctor(question: Question) -> None:
    """Prints what is installed, what works on the model, and what the callbacks will cost.

    Args:
        question: What is asked.

    Raises:
        ValueError: The model cannot be loaded, or a configuration is malformed.
    """
    console = _console()
    callbacks, asked = _configured(question)
    console.print(_installation())
    with _plain_init():
        model = _model(question)
    model.eval()
    objective = objective_for(model)
    works = works_on(model, objective, meta=question.meta or question.shape is not None)
    console.print(_works(model, works))
    if not question.configs:
        # Nobody asked for those that a run would refuse.
        needed = {callback: works.get(_NEEDS.get(callback.name, ""), "") for callback in callbacks}
        callbacks = [callback for callback, told in needed.items() if not told.startswith(_REFUSED)]
    plan, speeds = planned(model, objective, asked)
    run = Run(asked.steps or 1000, step_seconds=None if speeds is None else _step(speeds, plan))
    # A training step is a forward and a backward pass of a batch, and a forward pass a third of it.
    unit = 1.0 / math.prod(plan.rows[0])
    steps = Speeds((0.0, unit / 3), (0.0, unit))
    if asked.configs:
        paced = run if speeds else replace(run, step_seconds=1.0)
        for line in _turned_down(callbacks, plan, speeds=speeds or steps, run=paced, timed=speeds is not None):
            console.print(line)
    told = []
    for callback in callbacks:
        try:
            told.append(callback.forecast(plan, run))
        except (ValueError, UnsupportedArchitectureError) as error:
            console.print(f"{callback.name}: no forecast: {printable(' '.join(str(error).split()))}")
    outlook = Outlook(tuple(told), speeds or steps, run, plan.replicas)
    _print_forecasts(console, outlook, plan, timed=speeds is not None)
    if speeds is not None and question.shards == 1:
        _judge(console, outlook, plan)


def _judge(console: Console, outlook: Outlook, plan: Plan) -> None:
    """The warning and the error that a run on this machine, whose optimizer is AdamW, would begin with."""
    if (excess := outlook.excess()) is not None:
        console.print(f"warning: {excess}")
    coming = training_bytes([torch.optim.AdamW(plan.space.resolve(plan.model).values())]) + plan.graph(
        plan.widest(None)
    )
    free_memory, free_device = available_memory() - coming, None
    if torch.cuda.is_available():
        free_memory += coming
        # There the weights will lie, too.
        free_device = torch.cuda.mem_get_info()[0] - coming - plan.bytes()
    fault = outlook.faults(
        free_disk=shutil.disk_usage(Path.cwd()).free, free_memory=free_memory, free_device=free_device
    )
    if fault is not None:
        raise ValueError(f"a run would be refused: {fault}")


def _turned_down(
    callbacks: Sequence[AnalysisCallback[Any]], plan: Plan, *, speeds: Speeds, run: Run, timed: bool
) -> Iterator[str]:
    """What the model's size or a budget will change before the first step, as :func:`preflight` does; it is set."""
    numel = sum(parameter.numel() for _, parameter in trainable_parameters(plan.model))
    for callback in callbacks:
        try:
            changed = limit_large(callback, numel)
            # Without a timed pass the unit is a training step, of which a budget in seconds says nothing.
            if callback.budget is not None and (timed or callback.budget.seconds is None):
                changed |= derive(callback, plan, speeds, run)
        except (ValueError, UnsupportedArchitectureError) as error:
            yield f"refused: {' '.join(str(error).split())}"
            continue
        if changed:
            yield f"{callback.name}: {settings_in_words(changed)}, by its budget or the model's size"


def print_installation() -> None:
    """Prints the versions and the devices, for which no model is needed."""
    _console().print(_installation())


def _console() -> Console:
    """A console that is wide enough for the table of costs where nobody says how wide it is."""
    told = sys.stdout.isatty() or os.environ.get("COLUMNS")
    return Console(highlight=False, soft_wrap=True, width=None if told else _PIPE_WIDTH)


def build_shape(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A Llama of a shape on ``meta``: names, shapes and dtypes, and no memory.

    Example:
        >>> round(sum(parameter.numel() for parameter in build_shape("8b").parameters()) / 1e9, 2)
        8.03
    """
    sizes: dict[str, Any] = {**SHAPES[name], "num_key_value_heads": 8, "vocab_size": 128256}
    config = LlamaConfig(**sizes, tie_word_embeddings=name == "1b", max_position_embeddings=8192)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def planned(model: nn.Module, objective: Objective | None, question: Question) -> tuple[Plan, Speeds | None]:
    """The shapes of a model and of a probe of 64 samples, and how fast it is; None where it has no values.

    Args:
        model: In evaluation mode, on any device.
        objective: Of it.
        question: The probe's batch size and length, and the ranks.

    Raises:
        ValueError: The samples are longer than the model's positions.
    """
    device = next(model.parameters()).device
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    rows, length = question.batch_size or 4, question.length or min(512, longest or 512)
    if longest and length > longest:
        raise ValueError(f"samples of {length} tokens do not fit {type(model).__name__}, which has {longest} positions")
    one = {"input_ids": torch.zeros(1, length, dtype=torch.long, device=device)}
    with _unpadded(model):
        kept, speeds = graph_bytes(model, lambda: model(**one).logits), None
    if device.type != "meta" and objective is not None:
        config: Any = model.config
        ids = torch.randint(0, config.vocab_size, (rows, length), device=device)
        with preserved(model):
            speeds = measure_speeds(model, objective, _with_labels(model, ids))
    plan = Plan(
        model,
        ((rows, length),) * -(-64 // rows),
        activations=kept / length,
        shards=question.shards,
        replicas=question.replicas,
        base=True,
        **shape_of(model),
    )
    return plan, speeds


@contextmanager
def _unpadded(model: nn.Module) -> Iterator[None]:
    """No padding token meanwhile: models look for it among the tokens, which have no values on ``meta``."""
    config = getattr(model, "config", None)
    token = getattr(config, "pad_token_id", None)
    if config is None or token is None:
        yield
        return
    config.pad_token_id = None
    try:
        yield
    finally:
        config.pad_token_id = token


def readers() -> list[AnalysisCallback[Any]]:
    """Every callback that only looks, with its defaults."""
    kinds = (GoldenSnapshot, AttentionTracker, GoldenParameters, ParameterDistribution, BasinVolume, TaylorDiff)
    others = (KnowledgeCoupling, ReverseGoldenParameters, ChangeAttribution, ActivationDifferences, CircuitTracker)
    return [*(kind() for kind in kinds), *(kind() for kind in others)]


def works_on(model: nn.Module, objective: Objective, *, meta: bool) -> dict[str, str]:
    """By analysis ``works``, or why not; by one sample, or, without values, by the model's architecture.

    Args:
        model: In evaluation mode.
        objective: Of it.
        meta: Whether the model has no values.
    """
    length = 8
    batch = _with_labels(model, torch.arange(3, 3 + length, device=next(model.parameters()).device)[None])
    routes = _structure(model, objective) if meta else _trials(model, objective, batch)
    found = {}
    for name, act in routes.items():
        try:
            told = act()
            found[name] = f"works: {told}" if told else "works"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is why it does not work
            found[name] = f"{_REFUSED}: {' '.join(str(error).split())}"
    return found


def _trials(model: nn.Module, objective: Objective, batch: Any) -> dict[str, Callable[[], str]]:
    """What the callbacks try before the first step, on one sample."""

    def gradients() -> str:
        with preserved(model):
            try_gradients(model, ParameterSpace.of(model).resolve(model), objective, batch)
        return ""

    def attention() -> str:
        attention_statistics(model, [batch], objective)
        return ""

    def heads() -> str:
        with preserved(model):
            HeadGates(model).remove()
        return ""

    def circuits() -> str:
        graph = CircuitGraph.of(model)
        return f"{graph.n_edges} edges between {len(graph.writers)} nodes"

    return {
        "golden, reverse golden": gradients,
        "change, distribution": lambda: f"{len(ParameterSpace.of(model))} trainable tensors",
        "taylor": lambda: expansion_route(model, batch, objective)[1],
        "attention": attention,
        "basin": lambda: f"{objective.logits_and_targets(model, batch).logits.shape[-1]} classes",
        "coupling": lambda: _coupled(model, objective),
        "heads": heads,
        "circuits": circuits,
    }


def _require_next_tokens(model: nn.Module, objective: Objective, what: str) -> None:
    if not isinstance(objective, CausalLMObjective):
        raise ValueError(
            f"{what} asks a causal language model; the objective of {type(model).__name__} is "
            f"{type(objective).__name__}"
        )


def _coupled(model: nn.Module, objective: Objective) -> str:
    _require_next_tokens(model, objective, "coupling")
    return f"{len(selected_parameters(model, 'mlp_output'))} MLP output projections"


def _structure(model: nn.Module, objective: Objective) -> dict[str, Callable[[], str]]:
    def heads() -> str:
        blocks = describe_architecture(model).blocks
        return f"{sum(block.n_heads for block in blocks)} heads in {len(blocks)} blocks"

    def circuits() -> str:
        _require_next_tokens(model, objective, "circuits")
        return f"{heads()}; the rest shows with values"

    return {
        "golden, reverse golden, taylor, basin, change, distribution": lambda: (
            f"{len(ParameterSpace.of(model))} trainable tensors; the rest shows with values"
        ),
        "attention": heads,
        "heads": heads,
        "coupling": lambda: _coupled(model, objective),
        "circuits": circuits,
    }


def _works(model: nn.Module, works: Mapping[str, str]) -> Table:
    numel = ParameterSpace.of(model).numel
    table = Table(
        "analysis", "on this model", title=f"{type(model).__name__}, {numel / 1e6:,.1f} M trainable", box=None
    )
    for name, told in works.items():
        table.add_row(name, printable(told))
    for name, told in _STRATEGIES:
        table.add_row(name, told)
    return table


def _installation() -> Table:
    table = Table("installed", "", box=None)
    table.add_row("python", f"{platform.python_version()} on {platform.machine()}")
    for name in _PACKAGES:
        try:
            table.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, "not installed")
    table.add_row("cpu", f"{os.cpu_count()} cores, {size_in_words(available_memory())} of memory free")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        table.add_row(f"cuda:{index}", f"{name}, {size_in_words(free)} of {size_in_words(total)} free")
    table.add_row("disk", f"{size_in_words(shutil.disk_usage(Path.cwd()).free)} free here")
    return table


@contextmanager
def _plain_init() -> Iterator[None]:
    """Without the bars of a library that loads weights."""
    from lightning_goldy.training.quiet import without_transformers_bars

    with without_transformers_bars():
        yield


def _model(question: Question) -> nn.Module:
    if question.shape is not None:
        return build_shape(question.shape, getattr(torch, question.dtype))
    assert question.model is not None
    try:
        config: Any = AutoConfig.from_pretrained(str(Path(question.model).expanduser()))
    except (OSError, ValueError) as error:
        if not question.meta:
            # Tells what is wrong with the name.
            return load_model(question.model)
        raise ValueError(
            f"{question.model!r} has no configuration to plan with: {' '.join(str(error).split())}"
        ) from error
    kind = next(iter(getattr(config, "architectures", None) or ()), "ForCausalLM")
    head = next((head for end, head in _HEADS.items() if kind.endswith(end)), None)
    if head is None:
        ends = ", ".join(_HEADS)
        raise ValueError(
            f"{question.model!r} is a {kind}; models are planned here whose names end in {ends}. A run tells what its "
            "callbacks will cost before the first step of any model"
        )
    if not question.meta:
        return load_model(question.model, head, question.dtype)  # type: ignore[arg-type]
    with torch.device("meta"):
        return AUTO_CLASSES[head].from_config(config).to(getattr(torch, question.dtype))


def _with_labels(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """A batch of tokens with labels that the model's class can have."""
    name, labels = type(model).__name__, ids
    if name.endswith("ForTokenClassification"):
        labels = torch.zeros_like(ids)
    elif name.endswith("ForSequenceClassification"):
        labels = ids.new_zeros(len(ids))
    return {"input_ids": ids, "labels": labels}


def _configured(question: Question) -> tuple[list[AnalysisCallback[Any]], Question]:
    """The callbacks of the configurations, and what these say of steps, batch size and length."""
    if not question.configs:
        return readers(), question
    check_configs([f"--config={path}" for path in question.configs])
    specs: list[Any] = []
    told: dict[str, Any] = {}
    for path in question.configs:
        if not Path(path).expanduser().exists():
            raise FileNotFoundError(f"--config {path} does not exist; `goldy recipes` lists those of the package")
        try:
            config = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8")) or {}
            trainer, data = (config.get(name) or {} for name in ("trainer", "data"))
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
            raise ValueError(f"{path} is no configuration: {' '.join(str(error).split())}") from error
        specs = _listed(trainer["callbacks"]) if trainer.get("callbacks") else specs
        specs = [*specs, *_listed(trainer.get("callbacks+") or [])]
        options = data.get("init_args", data)
        read = {"steps": trainer.get("max_steps"), "batch_size": options.get("batch_size")}
        read["length"] = options.get("block_size") or options.get("max_length")
        told |= {name: value for name, value in read.items() if isinstance(value, int) and value > 0}
    # As in a run, the first of two that could not be told apart stays.
    named = {found.name: found for found in map(_instance, reversed(specs)) if found is not None}
    callbacks = list(reversed(named.values()))
    if not callbacks:
        files = ", ".join(question.configs)
        raise ValueError(f"{files}: no analysis callback is attached; leave --config out to plan them all")
    given = {name: getattr(question, name) or value for name, value in told.items()}
    return callbacks, replace(question, **given)


def _listed(callbacks: Any) -> list[Any]:
    return callbacks if isinstance(callbacks, list) else [callbacks]


def _instance(spec: Any) -> AnalysisCallback[Any] | None:
    """A callback of a configuration; None where it is not one that analyses."""
    spec = {"class_path": spec} if isinstance(spec, str) else spec
    if not isinstance(spec, Mapping) or not isinstance(spec.get("class_path"), str):
        raise ValueError(f"trainer.callbacks holds {spec!r}; a callback is its class_path, with init_args beside it")
    path = spec["class_path"]
    foreign = not path.startswith("lightning_goldy.") if "." in path else hasattr(lightning.pytorch.callbacks, path)
    if foreign or path.rpartition(".")[2] in ("ExactResume", "RunReport"):
        return None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(AnalysisCallback, "callback")
    try:
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
        callback: AnalysisCallback[Any] = instantiate(parser.parse_object({"callback": dict(spec)})).callback
    except Exception as error:
        raise ValueError(f"{path}: {plain_reason(str(error)).removeprefix('callback: ')}") from error
    return callback


def _step(speeds: Speeds, plan: Plan) -> float:
    rows, length = plan.rows[0]
    call, token = speeds.backward
    return call + token * rows * length + 6.0 * speeds.element * plan.elements()


def _print_forecasts(console: Console, outlook: Outlook, plan: Plan, *, timed: bool) -> None:
    rows, length = plan.rows[0]
    amounts = {
        "memory": [forecast.memory for forecast in outlook.forecasts],
        "host": [forecast.kept for forecast in outlook.forecasts],
        "disk": [forecast.disk_total for forecast in outlook.forecasts],
        "sent": [forecast.communicated for forecast in outlook.forecasts],
    }
    # What no callback takes needs no column.
    amounts = {name: column for name, column in amounts.items() if any(column) or name == "memory"}
    table = Table(
        Column("callback", no_wrap=True),
        *("forwards", "backwards", "a firing" if timed else "training steps", "x", "in all"),
        *amounts,
        title=f"forecast: {outlook.run.steps} steps, batches of {rows} x {length} tokens",
        box=None,
    )
    for place, forecast in enumerate(outlook.forecasts):
        one, whole = (f(outlook.speeds, outlook.replicas) for f in (forecast.seconds, forecast.seconds_total))
        told = [time_in_words(one), time_in_words(whole)] if timed else [f"{one:.3g}", f"{whole:.3g}"]
        typical = "" if forecast.exact else "about "
        table.add_row(
            forecast.name,
            f"{typical}{forecast.cost.forwards}",
            f"{typical}{forecast.cost.backwards}",
            told[0],
            str(forecast.firings),
            told[1],
            *(size_in_words(column[place]) for column in amounts.values()),
        )
    console.print(table)
    if timed:
        console.print(outlook.lines()[-1])
    else:
        console.print(f"memory beside the training: {size_in_words(outlook.peak)} on each of {plan.shards} shards")
