"""A run of cutting and regrowing heads: where it stands, what it does to the model, what a resume needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lightning_goldy.analysis.attention.patterns import show_patterns
from lightning_goldy.analysis.heads.importance import HeadProbe, HeadScores, head_importance, unmeasured_choice
from lightning_goldy.analysis.heads.optimizer import AttentionRate, CycleCopy, HeadFreeze
from lightning_goldy.analysis.heads.schedule import (
    Event,
    PlasticityPlan,
    PlasticitySettings,
    PlasticityState,
    Regrowth,
    Scoring,
    plan_from,
    rate_multiplier,
)
from lightning_goldy.analysis.heads.surgery import prune_heads, regrow_heads
from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.core.architecture import Head, HeadGates
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.batches import batch_length, move_batch, take_samples
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.sharding import Replicas

T = TypeVar("T")
# Heads that are cut, and as many that are kept, whose attention a cycle shows.
_SHOWN = 3

_Done = tuple[dict[str, Any], float]
"""What an event tells of itself, and the loss after it, nats."""


class PlasticityRun:
    """Carries out the plan on a model that is being trained.

    Args:
        settings: What was told.
        plan: What that means in steps and heads.
        gates: Of the model.
        module: What the optimizers train; contains the model.
        model: Whose heads are cut.
        optimizers: Those of the training.
        base: Where regrown heads take their weights from, if anywhere.
    """

    def __init__(
        self,
        settings: PlasticitySettings,
        plan: PlasticityPlan,
        gates: HeadGates,
        *,
        module: nn.Module,
        model: nn.Module,
        optimizers: Sequence[Any],
        base: BaseParameters | None,
    ) -> None:
        self.settings, self.plan, self.gates, self.base = settings, plan, gates, base
        self._module, self._model, self._optimizers = module, model, optimizers
        self._freeze = HeadFreeze(model, optimizers)
        self._rate = AttentionRate(model, gates.architecture, optimizers)
        self.shows_maps = settings.scoring.attention_maps
        self.state = PlasticityState(closed=len(gates.closed))
        self.cut_steps: dict[int, int] = {}
        self.timeline: list[list[Any]] = [[0, _pairs(gates.closed)]]
        self.curve: list[list[float]] = []
        self.shown: dict[str, Any] | None = None
        self.scored: dict[str, Any] | None = None
        self._copy: CycleCopy | None = None
        self._copied_closing: list[list[int]] = []
        self._copied: dict[str, Any] | None = None
        self._regrown_from: tuple[nn.Module, CycleCopy] | None = None

    def due(self, step: int) -> Event | None:
        """What is to be done at this step, if anything."""
        return self.plan.due(self.state, step)

    def measures(self, step: int) -> bool:
        """Whether the loss is to be measured now."""
        return self.plan.measures(self.state, step)

    def observe(self, step: int, loss: float) -> None:
        """Takes note of the loss, nats."""
        self.state = self.plan.observed(self.state, step, loss)
        self._point(step, loss)

    def multipliers(self, step: int) -> dict[int, float]:
        """What the update after this step is multiplied by, for each layer that was cut."""
        recovery = self.settings.recovery
        ramp = 0 if self.plan.ramp.shape == "one_shot" else self.plan.ramp.steps
        decay = recovery.multiplier_decay_steps or max(1, self.plan.regrow_at - ramp)
        return {
            layer: rate_multiplier(step - cut, recovery.learning_rate_multiplier, decay)
            for layer, cut in self.cut_steps.items()
        }

    def prepare_step(self, step: int) -> None:
        """Sets the multipliers of the coming optimizer step."""
        self._rate.multiply(self.multipliers(step))

    def zero_gradients(self) -> None:
        """Keeps closed heads out of the gradient's norm."""
        self._freeze.zero_gradients()

    def remove(self) -> None:
        """Lets the optimizers go; closed heads stay closed."""
        self._freeze.remove()
        self._rate.remove()

    def carry_out(self, subject: PlasticitySubject, step: int, progress: Any = None) -> list[dict[str, Any]]:
        """Does everything that is due, and says what was done; where it fails, heads and plan are as before."""
        before, self._regrown_from = self._standing(), None
        try:
            return self._carry_out(subject, step, progress)
        except BaseException:
            self._go_back(before)
            raise
        finally:
            self._regrown_from = None

    def _standing(self) -> dict[str, Any]:
        shown = None if self.shown is None else {**self.shown, "maps": dict(self.shown["maps"])}
        kept = {name: getattr(self, name) for name in ("state", "scored", "_copy", "_copied", "_copied_closing")}
        lists = {"cut_steps": dict(self.cut_steps), "timeline": list(self.timeline), "curve": list(self.curve)}
        return {**kept, **lists, "shown": shown, "closing": self.gates.closing.tolist()}

    def _go_back(self, before: dict[str, Any]) -> None:
        closing = before.pop("closing")
        vars(self).update(before)
        if self._regrown_from is not None:
            layers, weights = self._regrown_from
            weights.restore(layers, self._optimizers)
        self.gates.load_state_dict({"closing": torch.tensor(closing)})

    def _carry_out(self, subject: PlasticitySubject, step: int, progress: Any) -> list[dict[str, Any]]:
        done = []
        while (event := self.due(step)) is not None:
            act = {"begin": self._begin, "cut": self._cut, "regrow": self._regrow, "finish": self._finish}[event.kind]
            record, loss = act(event, subject, step, progress)
            cycle = self.state.cycle
            self.state = self.plan.after(self.state, event, step, closed=len(self.gates.closed), loss=loss)
            done.append({"kind": event.kind, "cycle": cycle, "closed": len(self.gates.closed), **record})
        closed = _pairs(self.gates.closed)
        if done and closed != self.timeline[-1][1]:
            self.timeline.append([step, closed])
        return done

    def _begin(self, event: Event, subject: PlasticitySubject, step: int, progress: Any) -> _Done:
        loss = subject.loss()
        self._point(step, loss)
        self.shown = None
        if self.settings.recovery.copies:
            self._copy = CycleCopy.take(self._module, self._optimizers, step=step)
            self._copied_closing = self.gates.closing.tolist()
        return {"loss": loss}, loss

    def _cut(self, event: Event, subject: PlasticitySubject, step: int, progress: Any) -> _Done:
        before = subject.loss()
        self._point(step, before)
        scores = subject.scores(self.settings.strategy, self.state.cycle, progress)
        count = event.closed - len(self.gates.closed)
        heads = subject.to_cut(scores, count, self.settings.min_heads_per_layer) if count > 0 else ()
        if self.shows_maps and self.shown is None and heads:
            self._show(subject, heads, scores, step)
        if heads:
            prune_heads(self._model, heads, min_heads_per_layer=self.settings.min_heads_per_layer)
            subject.changed()
        after = subject.loss()
        self._show_again(subject, "cut")
        self.cut_steps.update({layer: step for layer, _ in heads})
        self._point(step, after)
        self.scored = {
            "step": step,
            "strategy": scores.strategy,
            "n_samples": scores.n_samples,
            "values": scores.scores.tolist(),
            "errors": None if scores.errors is None else scores.errors.tolist(),
            "closed_before": _pairs(scores.closed),
            "cut": _pairs(heads),
        }
        cut = [float(scores.scores[head]) for head in heads]
        return {"heads": _pairs(heads), "scores": cut, "loss_before": before, "loss_after": after}, after

    def _regrow(self, event: Event, subject: PlasticitySubject, step: int, progress: Any) -> _Done:
        before, regrowth = subject.loss(), self.settings.regrowth
        self.state = self.plan.observed(self.state, step, before)
        self._point(step, before)
        self._show_again(subject, "recovered")
        wanted = len(self.gates.closed) - event.closed
        heads = subject.to_regrow(wanted, regrowth, self.state.cycle)
        if heads:
            blocks = self.gates.architecture.blocks
            layers = nn.ModuleList(blocks[layer].attention for layer in sorted({layer for layer, _ in heads}))
            self._regrown_from = layers, CycleCopy.take(layers, self._optimizers, step=step)
            regrow_heads(
                self._model,
                heads,
                initialisation=regrowth.initialisation,
                base=self.base,
                optimizer=self._optimizers,
                moments=regrowth.moments,
                noise_scale=regrowth.noise_scale,
                seed=self.settings.scoring.seed + step,
            )
            subject.changed()
        after = subject.loss()
        self._point(step, after)
        return {"heads": _pairs(heads), "wanted": wanted, "loss_before": before, "loss_after": after}, after

    def _finish(self, event: Event, subject: PlasticitySubject, step: int, progress: Any) -> _Done:
        loss = subject.loss()
        self.state = self.plan.observed(self.state, step, loss)
        self._show_again(subject, "recovered")
        self._point(step, loss)
        verdict = self.plan.verdict(self.state, loss)
        record: dict[str, Any] = {"verdict": verdict, "loss": loss}
        record |= {"loss_before": self.state.loss_before, "recovery_steps": self.state.recovery_steps}
        if verdict == "roll_back":
            assert self._copy is not None
            self._copy.restore(self._module, self._optimizers)
            self.gates.load_state_dict({"closing": torch.tensor(self._copied_closing)})
            self.cut_steps.clear()
            subject.changed()
            record["loss_after"] = subject.loss()
            self._point(step, record["loss_after"])
        self._copy = self._copied = None
        return record, loss

    def _show(self, subject: PlasticitySubject, cut: Sequence[Head], scores: HeadScores, step: int) -> None:
        """Chooses the heads whose maps are shown in this cycle: the first that are cut, the last that would be."""
        kept = [head for head in reversed(scores.ranking()) if head in self.gates.opened and head not in cut]
        heads = [*cut[:_SHOWN], *kept[:_SHOWN]]
        self.shown = {"step": step, "heads": _pairs(heads), "n_cut": len(cut[:_SHOWN]), "maps": {}}
        self.shown["maps"]["before"] = _maps(subject, heads)

    def _show_again(self, subject: PlasticitySubject, moment: str) -> None:
        if self.shown is not None and moment not in self.shown["maps"]:
            self.shown["maps"][moment] = _maps(subject, self.shown["heads"])

    def _point(self, step: int, loss: float) -> None:
        point = [step, loss, max(self.multipliers(step).values(), default=1.0), len(self.gates.opened)]
        # Of events at one step the one's end is the next one's beginning.
        if not self.curve or self.curve[-1] != point:
            self.curve.append(point)

    def result(
        self, events: Sequence[dict[str, Any]], *, loss: float, step: int, after: int, cost: Cost
    ) -> PlasticityResult:
        """Where the run stands.

        Args:
            events: What was done at this step.
            loss: Of the probe, after it; nats.
            step: Optimizer steps so far.
            after: Step of the row before, from which on gates and losses are told; -1 in the first.
            cost: Passes made.
        """
        points = [point for point in self.curve if point[0] > after]
        found = {
            "strategy": self.settings.strategy,
            "pruning_level": self.settings.pruning_level,
            "cycles": self.settings.cycles,
            "cycle": self.state.cycle,
            "phase": self.state.phase,
            "heads_per_layer": list(self.gates.heads_per_layer),
            "closed": _pairs(self.gates.closed),
            "events": list(events),
            "scores": self.scored,
            "timeline": [{"step": at, "closed": closed} for at, closed in self.timeline if at > after],
            "curve": {name: [point[column] for point in points] for column, name in enumerate(_CURVE)},
            "attention": None if self.shown is None else {**self.shown, "maps": dict(self.shown["maps"])},
            "last_step": self.plan.last_step,
        }
        multiplier = max(self.multipliers(step).values(), default=1.0)
        return PlasticityResult(loss, multiplier, self.state.recovery_steps, found, cost)

    def save_files(self, folder: Path, *, write: bool) -> tuple[str, ...]:
        """Writes the copy of the cycle, if one is held, and tells what there are files of; every process must call."""
        if self._copy is not None:
            self._copied = self._copy.save(folder, self._module, write=write)
        return () if self._copied is None else tuple(self._copied["files"])

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, text, and small tensors."""
        return {
            "settings": asdict(self.settings),
            "plan": asdict(self.plan),
            "state": self.state.to_dict(),
            "closing": self.gates.closing.tolist(),
            "cut_steps": [[layer, step] for layer, step in self.cut_steps.items()],
            "timeline": [list(entry) for entry in self.timeline],
            "curve": [list(point) for point in self.curve],
            "scored": self.scored,
            "shown": self.shown,
            "copied": self._copied,
            "copied_closing": self._copied_closing,
        }

    def load_state_dict(self, saved: Mapping[str, Any], folder: Path) -> None:
        """Goes on where an interrupted run stood.

        Args:
            saved: What :meth:`state_dict` gave.
            folder: Where the files are.

        Raises:
            ValueError: The settings differ from the interrupted run's.
            HeadError: The model has other heads.
            StoreError: A file is missing or broken.
        """
        self.settings.require_same(saved["settings"])
        load_gates(self.gates, saved)
        self.plan = plan_from(saved["plan"], self.settings.recovery)
        self.state = PlasticityState.from_dict(saved["state"])
        self.cut_steps = dict(saved["cut_steps"])
        self.timeline, self.curve = [list(entry) for entry in saved["timeline"]], [list(p) for p in saved["curve"]]
        self.scored, self.shown = saved["scored"], saved["shown"]
        self._copied, self._copied_closing = saved["copied"], saved["copied_closing"]
        if self._copied is not None:
            self._copy = CycleCopy.load(folder, self._module, self._copied)


_EVENT_METRICS = {
    "cut": ("loss_before", "loss_after"),
    "regrow": ("loss_before", "loss_after"),
    "finish": ("loss_before", "loss"),
}
_CURVE = ("steps", "loss", "multiplier", "active_heads")


@dataclass(frozen=True)
class PlasticityResult(AnalysisResult):
    """What was done at a step of a run, and where the run stands since.

    Args:
        loss: Of the probe, nats.
        multiplier: Of the learning rate, the largest of the layers.
        recovery_steps: Optimizer steps from the last cut until the loss was back; None as long as it is not.
        found: Settings, phase and heads; ``events`` (what was done at this step), the ``scores`` of the last cut, the
            ``attention`` of some heads of the cycle; of what came since the row before, the changes of gates
            (``timeline``) and the losses (``curve``).
        cost: Passes made.
    """

    analysis = "head_plasticity"

    loss: float
    multiplier: float
    recovery_steps: int | None
    found: dict[str, Any]
    cost: Cost = field(default=Cost(), compare=False)

    @property
    def heads(self) -> tuple[int, int]:
        """Open heads, and all."""
        every = sum(self.found["heads_per_layer"])
        return every - len(self.found["closed"]), every

    def running(self) -> dict[str, float | None]:
        """What is logged at every measurement."""
        opened, heads = self.heads
        return {
            "loss": self.loss,
            "perplexity": perplexity(self.loss),
            "active_heads": float(opened),
            "closed_share": 1 - opened / heads,
            "learning_rate_multiplier": self.multiplier,
            "cycle": float(self.found["cycle"]),
        }

    def metrics(self) -> dict[str, float | None]:
        """Losses and heads, and the losses around what was done."""
        metrics = {**self.running(), "recovery_steps": self.recovery_steps}
        for event in self.found["events"]:
            kind = event["kind"]
            for name in _EVENT_METRICS.get(kind, ()):
                metrics[f"{kind}/{name}"] = event[name]
                metrics[f"{kind}/{name.replace('loss', 'perplexity')}"] = perplexity(event[name])
            if kind == "finish":
                metrics["recovery_steps"] = event["recovery_steps"]
                metrics["rolled_back"] = float(event["verdict"] == "roll_back")
        return metrics

    def details(self) -> dict[str, Any]:
        """Decisions, scores, maps, and what changed since the row before."""
        shown = self.found["attention"]
        if shown is not None:
            maps = {moment: np.round(maps.float().numpy(), 3).tolist() for moment, maps in shown["maps"].items()}
            shown = {**shown, "maps": maps}
        return {**self.found, "attention": shown}

    def headline(self) -> str:
        """How many heads are open, at what loss, and what the last event did to it."""
        opened, heads = self.heads
        told = f"{opened} of {heads} heads are open at a loss of {self.loss:.4g} nats"
        event = next((event for event in reversed(self.found["events"]) if event["kind"] in _EVENT_METRICS), None)
        if event is None:
            return told
        before, after = (event[name] for name in _EVENT_METRICS[event["kind"]])
        return f"{told}; {event['kind']}: {before:.4g} before, {after:.4g} after"


def perplexity(loss: float) -> float | None:
    """The exponential of a loss in nats; None where no number is large enough.

    Example:
        >>> perplexity(0.0), perplexity(1e6)
        (1.0, None)
    """
    return math.exp(loss) if loss < 700 else None


@dataclass
class PlasticitySubject:
    """A gated model, its probe, and what has been spent on them.

    Every answer is the same on all ranks to the last bit: rank 0's counts.

    Args:
        model: In evaluation mode, isolated from the training.
        gates: Its gates.
        batches: The probe, on the CPU.
        objective: How a batch becomes a loss.
        scoring: How heads are scored.
        cost: Passes made so far.
    """

    model: nn.Module
    gates: HeadGates
    batches: Sequence[Any]
    objective: Objective
    scoring: Scoring
    cost: Cost = field(default_factory=Cost)
    _loss: float | None = None

    def changed(self) -> None:
        """Says that gates or weights have changed, so that the loss must be measured anew."""
        self._loss = None

    def loss(self) -> float:
        """Mean loss of the probe's samples, nats.

        Raises:
            ValueError: It is not finite.
        """
        if self._loss is not None:
            return self._loss
        replicas = Replicas.of(self.model)
        probe = HeadProbe(self.model, self.batches, self.objective, gates=self.gates, replicas=replicas)
        loss = agreed(probe.loss())
        self.cost += probe.cost
        if not math.isfinite(loss):
            raise ValueError(f"the loss of the probe is {loss}, not finite")
        self._loss = loss
        return loss

    def scores(self, strategy: str, cycle: int, progress: Any = None) -> HeadScores:
        """How important each head is now."""
        weights, seed = self.scoring.weights, self.scoring.seed + cycle
        return self._scored(strategy, weights=weights, seed=seed, progress=progress)

    def to_cut(self, scores: HeadScores, count: int, min_heads_per_layer: int) -> tuple[Head, ...]:
        """The heads to cut now, the least important first."""
        level = count / len(self.gates.heads)
        return agreed(scores.least_important(level, min_heads_per_layer=min_heads_per_layer, unit=self.scoring.unit))

    def to_regrow(self, count: int, regrowth: Regrowth, cycle: int) -> tuple[Head, ...]:
        """The closed heads to open now, the most wanted first.

        With ``copy`` a layer regrows no more heads than it has open ones to copy, so there may be fewer.
        """
        if regrowth.choice == "gradient" and self.gates.closed:
            ranking = self._scored("magnitude").most_wanted()
        else:
            ranking = unmeasured_choice(self.gates, regrowth.choice, self.scoring.seed + cycle)
        if self.scoring.unit == "group":
            ranking = self._whole_groups(ranking)
        if regrowth.initialisation == "copy":
            ranking = self._with_donors(ranking)
        return agreed(ranking[:count])

    def maps(self, heads: Sequence[Head], *, length: int = 24) -> Tensor:
        """What heads attend to in the first sample: softmax weights, also those of a head whose gate is closed.

        Args:
            heads: (layer, head) pairs.
            length: Tokens shown, from the first on.

        Returns:
            Shape ``[heads, T, T]``, rows are queries, float32, on the CPU.

        Raises:
            UnsupportedArchitectureError: The family's attention patterns cannot be read.
        """
        device = next(self.model.parameters()).device
        sample = move_batch(take_samples(self.batches[0], slice(1)), device)
        weights: dict[int, Tensor] = {}

        def sink(layer: int, found: Tensor, mask: Tensor | None) -> None:
            weights[layer] = found[0, :, :length, :length].float().cpu()

        layers = {layer for layer, _ in heads}
        show_patterns(self.model, self.gates.architecture, sample, self.objective, sink, layers=layers)
        self.cost += Cost(forwards=1)
        return torch.stack([weights[layer][head] for layer, head in heads])

    def _scored(self, strategy: str, **options: Any) -> HeadScores:
        scores = head_importance(self.model, self.batches, self.objective, strategy=strategy, **options)
        self.cost += scores.cost
        return scores

    def _whole_groups(self, ranking: Iterable[Head]) -> tuple[Head, ...]:
        blocks, closed = self.gates.architecture.blocks, set(self.gates.closed)
        order: dict[Head, None] = {}
        for layer, head in ranking:
            group = blocks[layer].query_heads(blocks[layer].key_value_head(head))
            order |= dict.fromkeys((layer, other) for other in group if (layer, other) in closed)
        return tuple(order)

    def _with_donors(self, ranking: Iterable[Head]) -> tuple[Head, ...]:
        donors = [sum(layer == at for at, _ in self.gates.opened) for layer in range(len(self.gates.heads_per_layer))]
        kept = []
        for layer, head in ranking:
            if donors[layer]:
                donors[layer] -= 1
                kept.append((layer, head))
        return tuple(kept)


def agreed(value: T) -> T:
    """Rank 0's value, on every rank: sums of several ranks may differ in their last bit.

    Example:
        >>> agreed(3)
        3
    """
    return Replicas.world().gather_objects(value)[0]


def first_samples(batches: Sequence[Any], n_samples: int | None) -> list[Any]:
    """The batches that hold the first samples, the last one cut to fit.

    Example:
        >>> import torch
        >>> batches = [{"input_ids": torch.zeros(3, 2)}, {"input_ids": torch.zeros(3, 2)}]
        >>> [len(batch["input_ids"]) for batch in first_samples(batches, 4)]
        [3, 1]
    """
    if n_samples is None:
        return list(batches)
    kept, left = [], n_samples
    for batch in batches:
        size = batch_length(batch)
        if left <= 0:
            break
        kept.append(batch if size <= left else take_samples(batch, slice(left)))
        left -= size
    return kept


def load_gates(gates: HeadGates, saved: Mapping[str, Any]) -> None:
    """Closes the heads that were closed in an interrupted run.

    Raises:
        HeadError: The model has other heads.
    """
    gates.load_state_dict({"closing": torch.tensor(saved["closing"])})


def _pairs(heads: Sequence[Head]) -> list[list[int]]:
    return [list(head) for head in heads]


def _maps(subject: PlasticitySubject, heads: Sequence[Sequence[int]]) -> Tensor:
    """Attention maps; half precision is more than a picture shows."""
    return subject.maps([(layer, head) for layer, head in heads]).half()
