"""A run of cutting and regrowing: where it stands, what it does to the model, and what a resume needs of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.head_freeze import HeadFreeze
from lightning_goldy.analysis.head_surgery import prune_heads, regrow_heads
from lightning_goldy.analysis.heads import HeadScores
from lightning_goldy.analysis.plasticity import Event, PlasticityPlan, PlasticityState
from lightning_goldy.analysis.pruning_schedule import rate_multiplier
from lightning_goldy.callbacks.plasticity_plan import PlasticitySettings, plan_from
from lightning_goldy.callbacks.plasticity_rate import AttentionRate
from lightning_goldy.callbacks.plasticity_rollback import CycleCopy
from lightning_goldy.callbacks.plasticity_subject import PlasticitySubject
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.gates import Head, HeadGates

_SHOWN = 3


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
        """Does everything that is due, and says what was done."""
        done = []
        while (event := self.due(step)) is not None:
            act = {"begin": self._begin, "cut": self._cut, "regrow": self._regrow, "finish": self._finish}[event.kind]
            record, loss = act(event, subject, step, progress)
            cycle = self.state.cycle
            self.state = self.plan.after(self.state, event, step, closed=len(self.gates.closed), loss=loss)
            done.append({"kind": event.kind, "cycle": cycle, "closed": len(self.gates.closed), **record})
        if done:
            self._note(step)
        return done

    def _begin(self, event: Event, subject: PlasticitySubject, step: int, progress: Any) -> tuple[dict, float]:
        loss = subject.loss()
        self._point(step, loss)
        self.shown = None
        if self.settings.recovery.copies:
            self._copy = CycleCopy.take(self._module, self._optimizers, step=step)
            self._copied_closing = self.gates.closing.tolist()
        return {"loss": loss}, loss

    def _cut(self, event: Event, subject: PlasticitySubject, step: int, progress: Any) -> tuple[dict, float]:
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
        if self.shown is not None and "cut" not in self.shown["maps"]:
            self.shown["maps"]["cut"] = _small(subject.maps(_heads(self.shown["heads"])))
        self.cut_steps.update({layer: step for layer, _ in heads})
        self._point(step, after)
        self.scored = _scored(scores, heads, step)
        cut = [float(scores.scores[head]) for head in heads]
        return {"heads": _pairs(heads), "scores": cut, "loss_before": before, "loss_after": after}, after

    def _regrow(self, event: Event, subject: PlasticitySubject, step: int, progress: Any) -> tuple[dict, float]:
        before, regrowth = subject.loss(), self.settings.regrowth
        self.state = self.plan.observed(self.state, step, before)
        self._point(step, before)
        self._show_recovered(subject)
        wanted = len(self.gates.closed) - event.closed
        heads = subject.to_regrow(wanted, regrowth, self.state.cycle)
        if heads:
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

    def _finish(self, event: Event, subject: PlasticitySubject, step: int, progress: Any) -> tuple[dict, float]:
        loss = subject.loss()
        self.state = self.plan.observed(self.state, step, loss)
        self._show_recovered(subject)
        self._point(step, loss)
        verdict = self.plan.verdict(self.state, loss)
        record: dict[str, Any] = {
            "verdict": verdict,
            "loss": loss,
            "loss_before": self.state.loss_before,
            "recovery_steps": self.state.recovery_steps,
        }
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
        self.shown["maps"]["before"] = _small(subject.maps(heads))

    def _show_recovered(self, subject: PlasticitySubject) -> None:
        if self.shown is not None and "recovered" not in self.shown["maps"]:
            self.shown["maps"]["recovered"] = _small(subject.maps(_heads(self.shown["heads"])))

    def _note(self, step: int) -> None:
        closed = _pairs(self.gates.closed)
        if closed != self.timeline[-1][1]:
            self.timeline.append([step, closed])

    def _point(self, step: int, loss: float) -> None:
        point = [step, loss, max(self.multipliers(step).values(), default=1.0), len(self.gates.opened)]
        # Of events at one step the one's end is the next one's beginning.
        if not self.curve or self.curve[-1] != point:
            self.curve.append(point)

    @property
    def copied_kinds(self) -> tuple[str, ...]:
        """What there are files of, to roll the cycle back with."""
        return () if self._copied is None else tuple(self._copied["files"])

    def save_files(self, folder: Path, *, write: bool) -> None:
        """Writes the copy of the cycle, if one is held; every process must call."""
        if self._copy is not None:
            self._copied = self._copy.save(folder, self._module, write=write)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, text, and small tensors."""
        return {
            "settings": self.settings.to_dict(),
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
        self.plan = plan_from(saved["plan"])
        self.state = PlasticityState.from_dict(saved["state"])
        self.cut_steps = dict(saved["cut_steps"])
        self.timeline, self.curve = [list(entry) for entry in saved["timeline"]], [list(p) for p in saved["curve"]]
        self.scored, self.shown = saved["scored"], saved["shown"]
        self._copied, self._copied_closing = saved["copied"], saved["copied_closing"]
        if self._copied is not None:
            self._copy = CycleCopy.load(folder, self._module, self._copied)


def load_gates(gates: HeadGates, saved: Mapping[str, Any]) -> None:
    """Closes the heads that were closed in an interrupted run.

    Raises:
        HeadError: The model has other heads.
    """
    gates.load_state_dict({"closing": torch.tensor(saved["closing"])})


def _scored(scores: HeadScores, cut: Sequence[Head], step: int) -> dict[str, Any]:
    return {
        "step": step,
        "strategy": scores.strategy,
        "n_samples": scores.n_samples,
        "values": scores.scores.tolist(),
        "closed_before": _pairs(scores.closed),
        "cut": _pairs(cut),
    }


def _pairs(heads: Sequence[Head]) -> list[list[int]]:
    return [list(head) for head in heads]


def _heads(pairs: Sequence[Sequence[int]]) -> list[Head]:
    return [(layer, head) for layer, head in pairs]


def _small(maps: Tensor) -> Tensor:
    """Half precision is more than a picture shows."""
    return maps.half()
