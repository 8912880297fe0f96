"""What the callbacks of a run will cost, told before its first step, and settings derived from a budget."""

from __future__ import annotations

import math
import operator
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_goldy.analysis.forecast import Forecast, Plan, Run, Speeds
from lightning_goldy.analysis.forecast.timing import arithmetic_speeds, graph_bytes, measure_speeds, shape_rows
from lightning_goldy.callbacks.engine.run_folder import run_directory
from lightning_goldy.callbacks.engine.store import training_length
from lightning_goldy.core.architecture import UnsupportedArchitectureError, describe_architecture
from lightning_goldy.core.batches import move_batch
from lightning_goldy.core.isolation import undisturbed
from lightning_goldy.core.objective import CausalLMObjective, ClassifierObjective, FunctionObjective, TokenObjective
from lightning_goldy.core.sharding import Replicas, is_sharded, local, unshard_guard
from lightning_goldy.core.space import trainable_parameters
from lightning_goldy.core.store import available_memory
from lightning_goldy.training.subject import find_model, find_objective

if TYPE_CHECKING:
    from lightning_goldy.callbacks.base import AnalysisCallback

LARGE = 100_000_000
"""Trainable parameters from which on the longest analyses are opt-in."""
_SHARE, _WORTH_TELLING = 0.05, 30.0
# Optimizer steps read and write each parameter and its moments; in elements of the timed arithmetic.
_OPTIMIZER = 6.0
_SHRINK = 0.85
# Samples that are timed where no probe is needed.
_FEW = 4


@dataclass(frozen=True)
class Budget:
    """What an analysis may take.

    Args:
        share: Of the run's time, a fraction in (0, 1).
        seconds: Of one firing.

    Example:
        >>> Budget.of(0.01), Budget.of("20s"), Budget.of(None)
        (Budget(share=0.01, seconds=None), Budget(share=None, seconds=20.0), None)
    """

    share: float | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, given: float | str | None) -> Budget | None:
        """From a fraction of the run's time, or a text of seconds per firing.

        Raises:
            ValueError: It is neither.

        Example:
            >>> Budget.of(5)
            Traceback (most recent call last):
            ValueError: budget is a fraction of the run's time in (0, 1), or seconds per firing such as '20s'; got 5
        """
        if given is None:
            return None
        try:
            if isinstance(given, str) and given.strip().endswith("s"):
                seconds = float(given.strip()[:-1])
                if 0 < seconds < math.inf:
                    return cls(seconds=seconds)
            elif not isinstance(given, bool) and 0 < float(given) < 1:
                return cls(share=float(given))
        except (TypeError, ValueError):
            pass
        raise ValueError(
            f"budget is a fraction of the run's time in (0, 1), or seconds per firing such as '20s'; got {given!r}"
        )

    def holds(self, forecast: Forecast, plan: Plan, speeds: Speeds, run: Run) -> bool | None:
        """Whether a forecast keeps to it; None where the length of the run is not known."""
        firing = forecast.seconds(speeds, plan.replicas)
        if math.isnan(firing):
            return None
        if self.seconds is not None:
            return firing <= self.seconds
        if not run.step_seconds or not run.steps:
            return None
        assert self.share is not None
        return forecast.seconds_total(speeds, plan.replicas) <= self.share * run.steps * run.step_seconds


def read_setting(callback: Any, path: str) -> Any:
    """A setting by its dotted name."""
    for name in path.split("."):
        callback = getattr(callback, name)
    return callback


def apply_settings(callback: AnalysisCallback[Any], values: Mapping[str, Any]) -> None:
    """Puts settings in the place of those that were given, which are remembered; in frozen options the whole is new."""
    for path, value in values.items():
        callback.explicit.setdefault(path, read_setting(callback, path))
        _replaced(callback, path, value)


def restore_settings(callback: AnalysisCallback[Any]) -> None:
    """Takes the settings back to what was given."""
    for path, value in callback.explicit.items():
        _replaced(callback, path, value)
    callback.explicit, callback.derived = {}, {}


def _replaced(owner: Any, path: str, value: Any) -> Any:
    head, _, tail = path.partition(".")
    new = _replaced(getattr(owner, head), tail, value) if tail else value
    if getattr(getattr(type(owner), "__dataclass_params__", None), "frozen", False):
        return replace(owner, **{head: new})
    setattr(owner, head, new)
    return owner


def dialled(dials: Mapping[str, int], share: float, given: Mapping[str, Any], n_samples: int) -> dict[str, Any]:
    """Dials at a share of what was given, each at least its least and at most what was given, which stays as it is.

    Args:
        dials: The least of each.
        share: In (0, 1].
        given: Explicit settings; None is all samples of the probe.
        n_samples: That the probe has.

    Example:
        >>> dialled({"n_samples": 2}, 0.3, {"n_samples": 16}, 64), dialled({"n_samples": 2}, 0.1, {"n_samples": 4}, 64)
        ({'n_samples': 4}, {'n_samples': 2})
    """
    dials_at = {}
    for path, least in dials.items():
        most = n_samples if given[path] is None else given[path]
        value = min(most, max(least, int(share * most)))
        dials_at[path] = given[path] if value == most else value
    return dials_at


def derive(callback: AnalysisCallback[Any], plan: Plan, speeds: Speeds, run: Run) -> dict[str, Any]:
    """The largest settings that keep to a callback's budget, never above the explicit ones; they are set.

    Sampling goes down first, each of the callback's ``dials`` by the same share, to its least; then firings become
    rarer. What cannot be met is warned about.

    Args:
        callback: With a budget.
        plan: The shapes.
        speeds: Of the machine.
        run: The steps.

    Returns:
        What is other than asked for, by name.
    """
    budget = callback.budget
    assert budget is not None
    given = {path: read_setting(callback, path) for path in callback.dials}
    given["every_n_steps"] = callback.every_n_steps
    share, values = 1.0, dict(given)
    fits = budget.holds(callback.forecast(plan, run), plan, speeds, run)
    if fits is None:
        rank_zero_warn(
            f"{callback.name}: its budget cannot be kept, for the time of the run or of a pass is not known: give "
            "the sampling itself, or, where the run has no end, seconds per firing such as '20s'"
        )
        return {}
    while not fits and share > 1e-3:
        share *= _SHRINK
        values = {**values, **callback.dialled(share, {path: given[path] for path in callback.dials}, plan)}
        apply_settings(callback, {path: values[path] for path in callback.dials})
        fits = budget.holds(callback.forecast(plan, run), plan, speeds, run)
    while not fits and budget.share is not None and callback.every_n_steps and callback.every_n_steps < run.steps:
        values["every_n_steps"] = min(run.steps, 2 * callback.every_n_steps)
        apply_settings(callback, {"every_n_steps": values["every_n_steps"]})
        fits = budget.holds(callback.forecast(plan, run), plan, speeds, run)
    if not fits:
        forecast = callback.forecast(plan, run)
        least, whole = forecast.seconds(speeds, plan.replicas), forecast.seconds_total(speeds, plan.replicas)
        turned = settings_in_words({path: values[path] for path in callback.dials}) or "the whole of it"
        # A run of seconds is not worth a warning.
        tell = rank_zero_warn if whole > _WORTH_TELLING else rank_zero_info
        tell(
            f"{callback.name}: even {turned} takes {time_in_words(least)} a firing, more than budget= allows: raise "
            "it, or let it fire more rarely"
        )
    return {path: value for path, value in values.items() if value != given[path]}


def limit_large(callback: AnalysisCallback[Any], numel: int) -> dict[str, Any]:
    """Takes what is opt-in above 100 M parameters out of a callback's settings; what it has been changed to.

    Raises:
        ValueError: Nothing is left of it.
    """
    if numel <= LARGE or callback.large or callback.budget is not None:
        return {}
    changed = callback.limited()
    if changed is None:
        raise ValueError(
            f"{callback.name}: {type(callback).__name__} takes about a hundred training steps and several copies of "
            f"the model, which has {numel / 1e6:.0f} M trainable parameters: large=True opts in above 100 M, and "
            "budget= (such as 0.01) lets it take a share of the run's time"
        )
    apply_settings(callback, changed)
    if changed:
        rank_zero_warn(
            f"{callback.name}: with {numel / 1e6:.0f} M trainable parameters {settings_in_words(changed)} here; "
            "large=True opts into what was asked for, and budget= into what a share of the run's time allows"
        )
    return changed


def run_of(trainer: L.Trainer, step_seconds: float | None = None) -> Run:
    """The steps of a run, and after which of them checkpoints are written, at most."""
    length = training_length(trainer)
    batches, accumulated = trainer.num_training_batches, max(1, trainer.accumulate_grad_batches)
    run = Run(
        int(length) if math.isfinite(length) else 0,
        epoch_steps=math.ceil(batches / accumulated) if math.isfinite(batches) and batches else None,
        first_step=trainer.global_step,
        step_seconds=step_seconds,
    )
    written: set[int] = set()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Checkpoint):
            written |= set(_written(callback, trainer, run, accumulated))
    return replace(run, checkpoint_steps=tuple(sorted(step for step in written if step > trainer.global_step)))


def _written(callback: Checkpoint, trainer: L.Trainer, run: Run, accumulated: int) -> Sequence[int]:
    """The steps after which a callback writes a checkpoint."""
    every, epochs = (getattr(callback, name, 0) or 0 for name in ("_every_n_train_steps", "_every_n_epochs"))
    if isinstance(callback, ModelCheckpoint) and callback.save_top_k == 0 and not callback.save_last:
        return ()
    if every:
        return range(every, run.steps + 1, every)
    check = getattr(trainer, "val_check_batch", None) if trainer.enable_validation else None
    asked = getattr(callback, "_save_on_train_epoch_end", None)
    if asked or not check or math.isinf(check) or check >= trainer.num_training_batches or not run.epoch_steps:
        return run.epoch_ends[max(1, epochs) - 1 :: max(1, epochs)]
    starts = range(0, run.steps, run.epoch_steps)
    batches = range(int(check), run.epoch_steps * accumulated + 1, int(check))
    within = [start + min(run.epoch_steps, batch // accumulated) for start in starts for batch in batches]
    return [step for step in within if step <= run.steps]


def plan_of(
    trainer: L.Trainer, model: nn.Module, objective: Any, batches: Sequence[Any], activations: float = 0.0
) -> Plan:
    """The shapes of a model in a trainer and of a probe.

    Args:
        trainer: Its callbacks and data module are asked.
        model: The analysed module.
        objective: Of it; None where there is no probe.
        batches: The probe.
        activations: Bytes that a graph keeps per token.
    """
    parameters = list(model.parameters())
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    shards = 1
    for parameter in sharded[:1]:
        part = sum(piece.to_local().numel() for piece in sharded)  # type: ignore[attr-defined]
        shards = max(1, round(sum(piece.numel() for piece in sharded) / max(1, part)))
        del parameter
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    pieces = getattr(data, "pieces", None)
    return Plan(
        model,
        shape_rows(batches),
        activations=activations,
        shards=shards,
        replicas=Replicas.of(model).size,
        own_loss=isinstance(objective, FunctionObjective),
        divisible=isinstance(objective, (CausalLMObjective, ClassifierObjective, TokenObjective)),
        pieces=len(pieces) if isinstance(pieces, Sequence) and pieces else None,
        base=any(getattr(callback, "keeps_base", False) for callback in trainer.callbacks),  # type: ignore[attr-defined]
        variants=len(getattr(trainer.lightning_module, "variants", ())) or 1,
        **shape_of(model),
    )


def shape_of(model: nn.Module) -> dict[str, Any]:
    """Classes of a model's logits, its blocks with attention, and their heads, as far as its configuration tells.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> shape_of(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=11)))
        {'vocabulary': 11, 'n_layers': 3, 'n_heads': 2}
    """
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None) or 2
    if "Classification" in type(model).__name__:
        vocabulary = getattr(config, "num_labels", None) or vocabulary
    try:
        blocks = [block for block in describe_architecture(model).blocks if block.n_heads]
        layers, heads = len(blocks), max(block.n_heads for block in blocks)
    except (UnsupportedArchitectureError, ValueError, RuntimeError, NotImplementedError):
        layers, heads = (getattr(config, name, None) or 1 for name in ("num_hidden_layers", "num_attention_heads"))
    return {"vocabulary": int(vocabulary), "n_layers": max(1, layers), "n_heads": max(1, heads)}


@dataclass(frozen=True)
class Outlook:
    """The forecasts of a run.

    Args:
        forecasts: Of each callback.
        speeds: Of the machine; passes have no known time where the model could not be timed.
        run: The steps.
        replicas: Ranks that share the work.
    """

    forecasts: tuple[Forecast, ...]
    speeds: Speeds
    run: Run
    replicas: int = 1

    @property
    def seconds(self) -> float | None:
        """All analyses of the run; None where that of one is not known."""
        found = [forecast.seconds_total(self.speeds, self.replicas) for forecast in self.forecasts]
        return None if any(map(math.isnan, found)) else math.fsum(found)

    @property
    def run_seconds(self) -> float | None:
        """The training itself."""
        steps = self.run.steps - self.run.first_step
        return steps * self.run.step_seconds if self.run.step_seconds and steps > 0 else None

    @property
    def peak(self) -> int:
        """Bytes beside the training at most: what all keep, and the largest of what one needs while it fires."""
        kept = sum(forecast.kept for forecast in self.forecasts)
        return kept + max((forecast.memory for forecast in self.forecasts), default=0)

    def lines(self) -> list[str]:
        """A line per callback, and one of all."""
        callbacks = [self._line(forecast) for forecast in self.forecasts]
        seconds, whole = self.seconds, self.run_seconds
        disk = sum(forecast.disk_total for forecast in self.forecasts)
        told = "" if seconds is None else f"{time_in_words(seconds)} in all"
        if seconds is not None and whole:
            percent = 100 * seconds / whole
            told += f", {percent:{'.0f' if percent >= 10 else '.2g'}} % of the run's {time_in_words(whole)}"
        told = f"{told}; " if told else ""
        return [*callbacks, f"analyses: {told}memory {size_in_words(self.peak)}, disk {size_in_words(disk)}"]

    def _line(self, forecast: Forecast) -> str:
        if not forecast.stated:
            return f"{forecast.name}: states no cost; {forecast.firings} x"
        firing, whole = (f(self.speeds, self.replicas) for f in (forecast.seconds, forecast.seconds_total))
        cost, told, total = forecast.cost, time_in_words(firing), f" = {time_in_words(whole)}"
        if math.isnan(whole):
            told, total = f"{cost.forwards} forward and {cost.backwards} backward passes of samples", ""
        most = "at most " if forecast.bounded else ""
        disk = f"disk {most}{size_in_words(forecast.disk)} a firing"
        if forecast.disk_checkpoint:
            disk += f" and {size_in_words(forecast.disk_checkpoint)} a checkpoint"
        return (
            f"{forecast.name}: {told} x {forecast.firings}{total}; memory {size_in_words(forecast.peak)}; {disk}, "
            f"{most}{size_in_words(forecast.disk_total)} in all"
        )

    def excess(self) -> str | None:
        """What to say of analyses that take more than a twentieth of the run, and half a minute; else None."""
        seconds, whole = self.seconds, self.run_seconds
        if seconds is None or not whole or seconds <= max(_WORTH_TELLING, _SHARE * whole):
            return None
        return (
            f"the analyses take about {time_in_words(seconds)}, {100 * seconds / whole:.0f} % of the run's "
            f"{time_in_words(whole)}: budget= of each callback limits it, and callbacks/light.yaml keeps all below 5 %"
        )

    def faults(self, *, free_disk: int, free_memory: int, free_device: int | None) -> str | None:
        """What disk or memory cannot hold, the callback that needs most of it, and what to set; None where all fits.

        Args:
            free_disk: Bytes.
            free_memory: Of the host, bytes, without what the training is still to take.
            free_device: Of an accelerator; None where the model is in the host's memory.
        """
        if not self.forecasts:
            return None
        written, kept = (sum(getattr(forecast, name) for forecast in self.forecasts) for name in ("disk_total", "kept"))
        on_disk, keeping, firing = (
            max(self.forecasts, key=operator.attrgetter(name)) for name in ("disk_total", "kept", "memory")
        )
        if written > free_disk:
            needed, free, most = map(size_in_words, (written, free_disk, on_disk.disk_total))
            return (
                f"the analyses need {needed} of disk and {free} are free; most of it is {on_disk.name}'s, {most}: "
                f"{_less_disk(on_disk)}"
            )
        apart = free_device is not None
        host = kept if apart else kept + firing.memory
        for worst, bytes_needed, bytes_free, where in (
            (keeping if apart else firing, host, free_memory, "memory"),
            (firing, firing.memory, free_device, "the device's memory"),
        ):
            if bytes_free is not None and bytes_needed > bytes_free:
                needed, free = size_in_words(bytes_needed), size_in_words(max(0, bytes_free))
                return (
                    f"beside the training {worst.name} needs {needed} of {where}, with what all keep there, and {free} "
                    f"are free: {_LESS}"
                )
        return None


_LESS = (
    "set fewer n_samples or a selection of parameters (last_layers=, include=), shard the model, analyse a checkpoint "
    "afterwards, or set check=False to try all the same"
)


def _less_disk(forecast: Forecast) -> str:
    if forecast.disk_checkpoint * forecast.checkpoints >= forecast.disk * forecast.firings:
        return "write fewer checkpoints, set track_updates=False where it has that, or check=False to try all the same"
    return "let it fire more rarely (every_n_steps=, at=), or set check=False to try all the same"


def preflight(trainer: L.Trainer, pl_module: L.LightningModule, callbacks: Sequence[AnalysisCallback[Any]]) -> None:
    """Derives settings, tells what the callbacks will cost, and refuses what cannot be held; all ranks call.

    Called once, before the first callback begins. Callbacks with ``check=False`` and no budget are left out.

    Args:
        trainer: The trainer.
        pl_module: Its LightningModule.
        callbacks: All that analyse.

    Raises:
        ValueError: Disk or memory cannot hold an analysis, or one is opt-in for so large a model.
    """
    unshard_guard(pl_module)
    for callback in callbacks:
        if not callback.goes_on_with(trainer):
            restore_settings(callback)
            model = find_model(pl_module, callback.model_attribute)
            sizes = (parameter.numel() for _, parameter in trainable_parameters(model))
            callback.derived = limit_large(callback, sum(sizes))
    told = [callback for callback in callbacks if callback.check or callback.budget is not None]
    if not told:
        return
    plans, speeds, step_seconds = _measured(trainer, pl_module, told)
    run = run_of(trainer, step_seconds)
    forecasts = []
    for callback, plan in zip(told, plans, strict=True):
        if callback.budget is not None and not callback.goes_on_with(trainer):
            callback.derived = {**callback.derived, **derive(callback, plan, speeds, run)}
        if callback.derived:
            rank_zero_info(f"{callback.name}: {settings_in_words(callback.derived)}, by its budget or the model's size")
        forecasts.append(callback.forecast(plan, run))
    outlook = Outlook(tuple(forecasts), speeds, run, plans[0].replicas)
    for line in outlook.lines():
        rank_zero_info(line)
    if (excess := outlook.excess()) is not None:
        rank_zero_warn(excess)
    tokens = max((plan.widest(None) for plan in plans), default=0)
    _refuse(trainer, pl_module, told, outlook, max(plan.graph(tokens) for plan in plans))


def training_bytes(optimizers: Sequence[Any]) -> int:
    """Bytes of gradients and moments on this rank that a training takes in its first step and does not have yet.

    Args:
        optimizers: Of the training.

    Example:
        >>> layer = nn.Linear(3, 5, bias=False)
        >>> training_bytes([torch.optim.AdamW(layer.parameters())])
        180
    """
    total = 0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            moments = 2 if "betas" in group else int(bool(group.get("momentum")))
            for parameter in group["params"]:
                size = local(parameter).numel() * parameter.element_size()
                missing = 0 if optimizer.state.get(parameter) else moments
                total += parameter.requires_grad * size * (missing + (parameter.grad is None))
    return total


def _refuse(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    callbacks: Sequence[AnalysisCallback[Any]],
    outlook: Outlook,
    graph: int,
) -> None:
    folder = next(path for path in [run_directory(trainer), *run_directory(trainer).parents] if path.exists())
    device = pl_module.device
    free_device = None
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free_device = torch.cuda.mem_get_info(device)[0] + reserved
    # What an analysis takes lies above all that a training step does, which comes first.
    coming, free_memory = training_bytes(trainer.optimizers) + graph, available_memory()
    if free_device is None:
        free_memory -= coming
    else:
        free_device -= coming
    fault = outlook.faults(
        free_disk=shutil.disk_usage(folder.absolute()).free, free_memory=free_memory, free_device=free_device
    )
    first = next((found for found in Replicas.world().gather_objects(fault) if found is not None), None)
    if first is None:
        return
    if all(callback.on_error == "warn" for callback in callbacks):
        rank_zero_warn(first)
    else:
        raise ValueError(first)


def _measured(
    trainer: L.Trainer, pl_module: L.LightningModule, callbacks: Sequence[AnalysisCallback[Any]]
) -> tuple[list[Plan], Speeds, float | None]:
    """The plan of each callback, what one sample took, the slowest rank's, and what a training step takes."""
    timed: dict[int, tuple[Speeds, float]] = {}
    plans: list[Plan] = []
    # A probe is read for those that need none, too, where they run the model on something else.
    anyhow = not any(callback.needs_probe for callback in callbacks)
    for callback in callbacks:
        model = find_model(pl_module, callback.model_attribute)
        objective, batches = None, []
        if callback.needs_probe or (anyhow and callback.runs_model):
            try:
                with Replicas.world().together("the forecast"):
                    probe = callback.read_probe(trainer, pl_module, None if callback.needs_probe else _FEW)
                    objective = find_objective(pl_module, model, callback.objective, probe)
                    batches = probe if callback.needs_probe else []
                    if id(model) not in timed and probe:
                        timed[id(model)] = _timed(trainer, pl_module, model, objective, probe[0])
            except Exception as error:  # noqa: BLE001 - the callback's own checks raise it, where it is an error
                rank_zero_info(f"{callback.name}: no forecast of its seconds: {error}")
        activations = timed[id(model)][1] if id(model) in timed else 0.0
        plan = plan_of(trainer, model, objective, batches, activations)
        told = getattr(callback, "piece_tokens", None)
        plan = replace(plan, piece_tokens=told(trainer) or plan.piece_tokens) if told else plan
        plans.append(replace(plan, texts=_texts(callback, trainer)))
    if not timed:
        return plans, arithmetic_speeds(pl_module.device), None
    found = Replicas.world().gather_objects(next(iter(timed.values()))[0])
    slowest = max(found, key=lambda one: (one.backward[0] + one.backward[1], one.forward))
    return plans, slowest, _step_seconds(trainer, plans, slowest)


def _texts(callback: AnalysisCallback[Any], trainer: L.Trainer) -> tuple[tuple[int, int], ...]:
    """Shapes of what a callback reads beside the probe."""
    read = getattr(callback, "other_text", None)
    try:
        return shape_rows(read(trainer)) if read else ()
    except Exception as error:  # noqa: BLE001 - the callback's own checks raise it, where it is an error
        rank_zero_info(f"{callback.name}: the forecast is without its other text: {error}")
        return ()


def _timed(
    trainer: L.Trainer, pl_module: L.LightningModule, model: nn.Module, objective: Any, batch: Any
) -> tuple[Speeds, float]:
    with undisturbed(trainer, pl_module):
        placed = move_batch(batch, next(model.parameters()).device)
        sample = next(iter(objective.samples(placed)))
        kept = graph_bytes(model, lambda: objective.log_probs(model, sample))
        unshard_guard(model)
        (rows,) = shape_rows([sample])
        return measure_speeds(model, objective, placed), kept / max(1, math.prod(rows))


def _step_seconds(trainer: L.Trainer, plans: Sequence[Plan], speeds: Speeds) -> float | None:
    """What a training step takes on one rank, if its samples are as long as those of the probe."""
    plan = next((plan for plan in plans if plan.rows), None)
    if plan is None:
        return None
    loader = trainer.train_dataloader
    rows = getattr(loader, "batch_size", None) or plan.rows[0][0]
    call, token = speeds.backward
    passes = max(1, trainer.accumulate_grad_batches) * (call + token * rows * plan.rows[0][1])
    return passes + _OPTIMIZER * speeds.element * plan.elements()


def settings_in_words(values: Mapping[str, Any]) -> str:
    """Settings by the last part of their names, with their values."""
    return ", ".join(f"{path.rpartition('.')[2]}={value}" for path, value in values.items())


def time_in_words(seconds: float) -> str:
    """Seconds in words.

    Example:
        >>> time_in_words(0.25), time_in_words(1500)
        ('0.25 s', '25 min')
    """
    if seconds < 1:
        return f"{seconds:.2g} s"
    return (
        f"{seconds:.3g} s"
        if seconds < 600
        else f"{seconds / 60:.3g} min"
        if seconds < 36000
        else f"{seconds / 3600:.3g} h"
    )


def size_in_words(count: float) -> str:
    """Bytes in words.

    Example:
        >>> size_in_words(0), size_in_words(1_500_000_000), size_in_words(300_000)
        ('0', '1.5 GB', '0.3 MB')
    """
    if not count:
        return "0"
    unit, word = next((pair for pair in ((1e12, "TB"), (1e9, "GB")) if count >= pair[0]), (1e6, "MB"))
    return f"{count / unit:.3g} {word}"
