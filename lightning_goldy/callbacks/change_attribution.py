"""Runs change attribution and grafting on a schedule: which parameters carry what the finetune did."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as L
from torch import nn

from lightning_goldy.analysis.attribution import (
    ChangeAttributionResult,
    GraftCurve,
    change_attribution,
    graft_curve,
    interleaved,
)
from lightning_goldy.analysis.attribution.attribution import AUTO_NODES, SHARES, check_attribution
from lightning_goldy.analysis.attribution.graft import BASELINES, CANDIDATES, FACTORS, Baseline, check_graft
from lightning_goldy.analysis.attribution.learned import LearnOptions
from lightning_goldy.analysis.attribution.path import Metric, tells_distributions, try_metric
from lightning_goldy.analysis.attribution.units import Pieces, rows_in_words
from lightning_goldy.analysis.forecast import Forecast, Plan, Run
from lightning_goldy.analysis.forecast.analyses import forecast_attribution
from lightning_goldy.analysis.result import AnalysisResult, Cost, Row
from lightning_goldy.callbacks.base import AnalysisCallback, AnalysisContext, try_gradients
from lightning_goldy.callbacks.golden_parameters import MaskCallback
from lightning_goldy.callbacks.golden_snapshot import find_snapshot
from lightning_goldy.callbacks.preflight import dialled
from lightning_goldy.core.architecture.adapters import (
    WeightSpace,
    check_space,
    chosen_space,
    merged_names,
    require_merged_parameters,
)
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.batches import sample_count
from lightning_goldy.core.files import StoreError
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.naming import block_of, options_of, require_at_least, require_kinds, require_number
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import Kind, read_header
from lightning_goldy.core.vector import ParameterVector
from lightning_goldy.training.subject import find_collateral, find_tokenizer

# Shares of what was asked for below which every other share is grafted, and none.
_FEW_GRAFTS, _NO_GRAFTS = 0.15, 0.05


@dataclass(frozen=True)
class AttributedChange(AnalysisResult):
    """What carries a change, and what grafts of it recover.

    Args:
        attribution: Of the samples that scored.
        curve: Of the held-out ones; None where no graft was tried.
        keep: The share whose mask is kept, where it is not left to the curve.
        left_out: Why masks of the run are not among the links, by name.
    """

    analysis: ClassVar[str] = "change_attribution"

    attribution: ChangeAttributionResult
    curve: GraftCurve | None
    keep: float | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def cost(self) -> Cost:
        """Passes of both."""
        return self.attribution.cost + (self.curve.cost if self.curve is not None else Cost())

    @property
    def kept_share(self) -> float | None:
        """The share whose mask is kept: by default the smallest that recovers 95 %, or the one that recovers most."""
        if self.keep is not None:
            return self.keep if self.attribution.shares else None
        if self.curve is None or self.curve.pieces != "elements":
            return self.attribution.shares[-1] if self.attribution.shares else None
        points = self.curve.of("attribution")
        best = max(points, key=lambda point: point.recovered or 0.0, default=None)
        return self.curve.share_for(0.95) or (best.share if best is not None else None)

    def metrics(self) -> dict[str, float | None]:
        """Those of both."""
        return {**self.attribution.metrics(), **(self.curve.metrics() if self.curve is not None else {})}

    def details(self) -> dict[str, Any]:
        """Those of the attribution, and of the grafts under ``graft``."""
        details = {**self.attribution.details(), "kept_share": self.kept_share, "left_out": dict(self.left_out)}
        return details if self.curve is None else {**details, "graft": self.curve.details()}

    def headline(self) -> str:
        """Where the effect sits, and what a part of the change recovers."""
        told = self.attribution.headline()
        return told if self.curve is None else f"{told}; {self.curve.headline()}"

    def vectors(self) -> dict[str, tuple[ParameterVector, Kind]]:
        """The mask of :attr:`kept_share`."""
        if self.kept_share is None or self.attribution.levels is None:
            return {}
        mask: ParameterMask = self.attribution.mask(self.kept_share)
        return {"mask": (mask, "mask")}


class ChangeAttribution(AnalysisCallback[AttributedChange]):
    """Which parameters carry what the finetune did, found by integrating the gradient, and tested by grafting them.

    Every other sample scores, those between tell what the strongest elements recover when they alone are changed,
    beside the largest and random changes, interpolation and drop-and-rescale; on ``collateral`` text what each harms.
    Logs the share of each kind of parameter and the smallest shares that recover half and 95 %, and where other
    callbacks have found masks, such as golden ones, how much of the effect lies inside. Saves the mask of that share. A
    ``GoldenSnapshot`` must be among the callbacks.

    Args:
        metric: ``loss``, ``log_prob`` or ``kl``.
        nodes: Of the quadrature; ``auto``: until the sum is complete; ``base``: the gradient at the base alone, the
            first order.
        tolerance: Relative gap at which ``auto`` stops, a fraction.
        shares: Shares of all elements that are grafted, fractions in (0, 1]; none for no grafts.
        pieces: What is grafted: ``elements``, ``units``, ``tensors`` or ``blocks``.
        baselines: What stands beside it; ``learned`` too, which costs backward passes for each share.
        learn: How masks are learned.
        n_draws: Draws of random elements; a further one costs a forward pass of the held-out samples for each share.
        keep: The share whose mask is saved; by default the smallest that recovers 95 %.
        interactions: Whether to measure each block's change alone, and all others' without it.
        masks: Mask files that the contributions are compared with, by name, beside the masks of the run.
        space: Of a model with adapters ``merged``, the weights that they come to, or ``adapters``.
        n_samples: Probe samples used, every other one of them held out from scoring.
        samples_per_pass: Samples that go through the model together while scoring; by default so many that there are 8
            passages.
        collateral: Batches that have nothing to do with the finetune; by default a ``collateral_dataloader()`` of the
            LightningModule or the data module, else harm is not measured.
        n_collateral: Samples of them.
        **options: Of :class:`AnalysisCallback`.

    Example:
        >>> ChangeAttribution(shares=[2.0])
        Traceback (most recent call last):
        ValueError: shares lie in (0, 1]; got 2.0
    """

    compares = True
    dials: Mapping[str, Any] = {"n_samples": 4, "n_collateral": 4, "n_draws": 1, "shares": ()}

    def __init__(
        self,
        metric: Literal["loss", "log_prob", "kl"] = "loss",
        *,
        nodes: int | Literal["auto", "base"] = "auto",
        tolerance: float = 0.01,
        shares: Sequence[float] = SHARES,
        pieces: Pieces = "elements",
        baselines: Sequence[Baseline] = BASELINES,
        learn: LearnOptions = LearnOptions(),  # noqa: B008 - frozen
        n_draws: int = 5,
        keep: float | None = None,
        interactions: bool = False,
        masks: Mapping[str, str] | None = None,
        space: WeightSpace = "merged",
        n_samples: int = 32,
        samples_per_pass: int | None = None,
        collateral: Iterable[Any] | None = None,
        n_collateral: int = 16,
        **options: Any,
    ) -> None:
        told = {"baselines": baselines, "interactions": interactions, "masks": masks, "collateral": collateral}
        require_kinds(ChangeAttribution.__init__, told)
        super().__init__(**options)
        self.metric: Metric = metric
        self.shares = check_attribution(metric, nodes, tolerance, shares, samples_per_pass)
        if self.shares:
            check_graft(metric, self.shares, baselines, pieces)
        check_space(space)
        if keep is not None:
            require_number("keep", keep)
            if not 0 < keep <= 1:
                raise ValueError(f"keep must lie in (0, 1]; got {keep}")
        self.learn = options_of(LearnOptions, "learn", learn)
        self.keep, self.interactions, self.masks, self.space = keep, interactions, dict(masks or {}), space
        require_at_least("n_samples", n_samples, 2 if self.shares else 1)
        require_at_least("n_collateral", n_collateral, 1)
        require_at_least("n_draws", n_draws, 1)
        self.n_draws = n_draws
        self.nodes, self.tolerance, self.pieces, self.baselines = nodes, tolerance, pieces, tuple(baselines)
        self.n_samples, self.samples_per_pass = n_samples, samples_per_pass
        self.collateral, self.n_collateral = collateral, n_collateral

    def forget(self) -> None:
        """Drops the other text."""
        super().forget()
        self._collateral: list[Any] = []

    def dialled(self, share: float, given: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
        """Random elements are drawn once below half of the samples; of few samples two shares are grafted, or none."""
        samples = dialled({"n_samples": 4, "n_collateral": 4}, share, given, plan.n_samples)
        shares: tuple[float, ...] = given["shares"]
        if share < _FEW_GRAFTS:
            shares = shares[1::2] if share > _NO_GRAFTS else ()
        return {**samples, "n_draws": given["n_draws"] if share > 0.5 else 1, "shares": shares}

    def estimate(self, plan: Plan, run: Run) -> Forecast:
        """The nodes of the quadrature, and a graft for each share, method and factor."""
        elementwise, n_blocks = self.pieces == "elements", len({block_of(name) for name in plan.space})
        named = [name for name in self.baselines if name != "interpolation"]
        # Of whole pieces those methods that take as many elements, whatever their number.
        sized = [name for name in named if name in ("random", "drop_and_rescale")]
        masked = [name for name in named if elementwise or name in (*sized, "learned")]
        found = self._blocks_that_fit(plan) if self.pieces == "blocks" and self.shares else 0
        return forecast_attribution(
            plan,
            n_samples=self.n_samples,
            nodes={"auto": AUTO_NODES[0], "base": 1}.get(str(self.nodes)) or int(self.nodes),
            n_shares=len(self.shares),
            masked=1 + len(masked),
            learned=self.learn.steps if "learned" in masked else 0,
            blocks=n_blocks if self.interactions else 0,
            searched=sum(min(CANDIDATES, n_blocks - step) for step in range(found)),
            found=found,
            beside=len(sized),
            factors=len(FACTORS) if "interpolation" in self.baselines else 0,
            first="gradient" in masked,
            draws=self.n_draws - 1 if "random" in masked else 0,
            n_collateral=self.n_collateral,
        )

    def _blocks_that_fit(self, plan: Plan) -> int:
        """Steps of the greedy search of blocks, at most: so many of the smallest fit into the largest share."""
        numel: dict[str, int] = {}
        for name in plan.space:
            numel[block_of(name)] = numel.get(block_of(name), 0) + math.prod(plan.space.shape(name))
        room = self.shares[-1] * plan.space.numel
        return max(1, sum(size <= room for size in itertools.accumulate(sorted(numel.values()))))

    def probe_samples(self) -> int | None:
        """The samples that score, and those that are held out."""
        return self.n_samples

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Finds the base and the other text."""
        if find_snapshot(trainer) is None:
            raise ValueError(
                f"{self.name} attributes the change since the golden snapshot: add GoldenSnapshot() to the callbacks"
            )
        require_merged_parameters(model, self.space)
        merged = chosen_space(model, self.space) == "merged"
        for path in self.masks.values():
            if not Path(path).is_file():
                raise FileNotFoundError(f"{self.name}: there is no mask file at {path}")
            if (kind := read_header(path).kind) != "mask":
                raise StoreError(f"{path}: holds {kind}, not a mask")
            names = ParameterMask.load(path, None if merged else model).space.names
            unknown = next((name for name in names if merged and name not in merged_names(model)), None)
            if unknown is not None:
                raise StoreError(
                    f"{path}: its mask is of {unknown!r}, which is no merged weight of the model's adapters"
                )
        held = sum(map(sample_count, self._batches))
        if self.shares and held < 2:
            raise ValueError(
                f"{self.name}: the probe has {held} sample, and grafts need 2, for every other one is held out from "
                "scoring; give more, or shares=[] for no grafts"
            )
        if self.shares:
            self._collateral = find_collateral(trainer, self.collateral, self.n_collateral)

    def try_route(self, model: nn.Module, objective: Objective, sample: Any) -> None:
        """One backward pass, the metric of the sample, and the loss and divergence of the other text."""
        try_gradients(model, ParameterSpace.of(model).resolve(model), objective, sample)
        try_metric(self.metric, model, objective, [sample], "probe")
        try_metric("loss", model, objective, self._collateral, "collateral")
        if tells_distributions(objective) or "learned" in self.baselines:
            try_metric("kl", model, objective, self._collateral[:1], "collateral")

    def compute(self, context: AnalysisContext) -> AttributedChange:
        """Attributes, and grafts."""
        assert context.objective is not None
        snapshot = find_snapshot(context.trainer)
        assert snapshot is not None
        used = self.used_samples or 0
        whole: tuple[list[Any], list[Any]] = (list(context.probe), [])
        scored, held_out = interleaved(context.probe, used) if self.shares else whole
        masks, left_out = self._find_masks(context)
        attribution = self._attribute(context, snapshot.base, scored, masks)
        if not self.shares or attribution.levels is None:
            return AttributedChange(attribution, None, self.keep, left_out)
        curve = graft_curve(
            context.model,
            snapshot.base,
            attribution,
            scored,
            held_out,
            self._collateral or None,
            objective=context.objective,
            pieces=self.pieces,
            shares=self.shares,
            baselines=self.baselines,
            factors=FACTORS,
            learn=self.learn,
            n_draws=self.n_draws,
            progress=context.progress,
        )
        return AttributedChange(attribution, curve, self.keep, left_out)

    def _attribute(
        self, context: AnalysisContext, base: BaseParameters, scored: list[Any], masks: Mapping[str, ParameterMask]
    ) -> ChangeAttributionResult:
        return change_attribution(
            context.model,
            base,
            scored,
            context.objective,
            metric=self.metric,
            nodes=self.nodes,
            tolerance=self.tolerance,
            space=self.space,
            samples_per_pass=self.samples_per_pass,
            shares=self.shares if self.keep is None else sorted({*self.shares, self.keep}),
            interactions=self.interactions,
            masks=masks,
            progress=context.progress,
        )

    def _find_masks(self, context: AnalysisContext) -> tuple[dict[str, ParameterMask], dict[str, str]]:
        """The masks of files and the last ones of the run's callbacks, and why others of these are left out."""
        masks = {name: ParameterMask.load(path) for name, path in self.masks.items()}
        snapshot, left_out = find_snapshot(context.trainer), {}
        assert snapshot is not None
        for callback in context.trainer.callbacks:  # type: ignore[attr-defined]
            mask = callback.last_mask(context.weights) if isinstance(callback, MaskCallback) else None
            if mask is None or callback.name in masks:
                continue
            if chosen_space(context.model, self.space) == "merged":
                left_out[callback.name] = "its mask is of adapters, the contributions of merged weights"
            elif any(name not in snapshot.base.space for name in mask.space):
                left_out[callback.name] = "its mask is of parameters that the snapshot has not"
            else:
                masks[callback.name] = mask
        return masks, left_out

    def describe(self, result: AttributedChange, context: AnalysisContext) -> Row:
        """The row, with the tokens of embedding rows in words where there is a tokenizer."""
        row, tokenizer = result.row(), find_tokenizer(context.trainer)
        return row if tokenizer is None else rows_in_words(row, tokenizer)
