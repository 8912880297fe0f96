"""Runs change attribution and grafting on a schedule: which parameters carry what the finetune did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from lightning_goldy.analysis.attribution.attribution import AUTO_NODES, SHARES, Metric, check_attribution
from lightning_goldy.analysis.attribution.graft import BASELINES, FACTORS, Baseline, Pieces, check_graft
from lightning_goldy.analysis.forecast import Forecast, Plan, Run
from lightning_goldy.analysis.forecast.analyses import forecast_attribution
from lightning_goldy.analysis.result import AnalysisResult, Cost, Row
from lightning_goldy.callbacks.base import AnalysisCallback, AnalysisContext, try_gradients
from lightning_goldy.callbacks.golden_snapshot import find_snapshot
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.naming import require_at_least
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import Kind
from lightning_goldy.core.vector import ParameterVector
from lightning_goldy.training.subject import find_collateral, find_tokenizer


@dataclass(frozen=True)
class AttributedChange(AnalysisResult):
    """What carries a change, and what grafts of it recover.

    Args:
        attribution: Of the samples that scored.
        curve: Of the held-out ones; None where no graft was tried.
    """

    analysis: ClassVar[str] = "change_attribution"

    attribution: ChangeAttributionResult
    curve: GraftCurve | None

    @property
    def cost(self) -> Cost:
        """Passes of both."""
        return self.attribution.cost + (self.curve.cost if self.curve is not None else Cost())

    @property
    def kept_share(self) -> float | None:
        """The share whose mask is kept: the smallest that recovers 95 %, or the one that recovers most."""
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
        details = {**self.attribution.details(), "kept_share": self.kept_share}
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
    Logs the share of each kind of parameter and the smallest shares that recover half and 95 %. Saves the mask of that
    share. A ``GoldenSnapshot`` must be among the callbacks.

    Args:
        metric: ``loss``, ``log_prob`` or ``kl``.
        nodes: Of the quadrature, or ``auto``: until the sum is complete.
        tolerance: Relative gap at which ``auto`` stops, a fraction.
        shares: Shares of all elements that are grafted, fractions in (0, 1]; none for no grafts.
        pieces: What is grafted: ``elements``, ``units``, ``tensors`` or ``blocks``.
        baselines: What stands beside it.
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

    dials: Mapping[str, Any] = {"n_samples": 4}

    def __init__(
        self,
        metric: Literal["loss", "log_prob", "kl"] = "loss",
        *,
        nodes: int | Literal["auto"] = "auto",
        tolerance: float = 0.01,
        shares: Sequence[float] = SHARES,
        pieces: Pieces = "elements",
        baselines: Sequence[Baseline] = BASELINES,  # type: ignore[assignment]
        n_samples: int = 32,
        samples_per_pass: int | None = None,
        collateral: Iterable[Any] | None = None,
        n_collateral: int = 16,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.metric: Metric = metric
        self.shares = check_attribution(metric, nodes, tolerance, shares, samples_per_pass)
        if self.shares:
            check_graft(metric, self.shares, baselines, pieces)
        require_at_least("n_samples", n_samples, 2 if self.shares else 1)
        require_at_least("n_collateral", n_collateral, 1)
        self.nodes, self.tolerance, self.pieces, self.baselines = nodes, tolerance, pieces, tuple(baselines)
        self.n_samples, self.samples_per_pass = n_samples, samples_per_pass
        self.collateral, self.n_collateral = collateral, n_collateral

    def forget(self) -> None:
        """Drops the other text."""
        super().forget()
        self._collateral: list[Any] = []

    def estimate(self, plan: Plan, run: Run) -> Forecast:
        """The nodes of the quadrature, and a graft for each share, method and factor."""
        elementwise = self.pieces == "elements"
        named = [name for name in self.baselines if name != "interpolation"]
        masked = [name for name in named if elementwise or name in ("random", "drop_and_rescale")]
        return forecast_attribution(
            plan,
            n_samples=self.n_samples,
            nodes=AUTO_NODES[0] if self.nodes == "auto" else int(self.nodes),
            n_shares=len(self.shares),
            masked=1 + len(masked),
            factors=len(FACTORS) if "interpolation" in self.baselines else 0,
            first="gradient" in masked,
            n_collateral=self.n_collateral,
        )

    def probe_samples(self) -> int | None:
        """The samples that score, and those that are held out."""
        return self.n_samples

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Finds the base and the other text."""
        if find_snapshot(trainer) is None:
            raise ValueError(
                f"{self.name} attributes the change since the golden snapshot: add GoldenSnapshot() to the callbacks"
            )
        if self.shares:
            self._collateral = find_collateral(trainer, self.collateral, self.n_collateral)

    def try_route(self, model: nn.Module, objective: Objective, sample: Any) -> None:
        """One backward pass, and a forward pass of the other text."""
        try_gradients(model, ParameterSpace.of(model).resolve(model), objective, sample)

    def compute(self, context: AnalysisContext) -> AttributedChange:
        """Attributes, and grafts."""
        assert context.objective is not None
        snapshot = find_snapshot(context.trainer)
        assert snapshot is not None
        used = self.used_samples or 0
        whole: tuple[list[Any], list[Any]] = (list(context.probe), [])
        scored, held_out = interleaved(context.probe, used) if self.shares else whole
        attribution = change_attribution(
            context.model,
            snapshot.base,
            scored,
            context.objective,
            metric=self.metric,
            nodes=self.nodes,
            tolerance=self.tolerance,
            samples_per_pass=self.samples_per_pass,
            shares=self.shares,
            progress=context.progress,
        )
        if not self.shares or attribution.levels is None:
            return AttributedChange(attribution, None)
        curve = graft_curve(
            context.model,
            snapshot.base,
            attribution,
            scored,
            held_out,
            self._collateral or None,
            objective=context.objective,
            pieces=self.pieces,
            baselines=self.baselines,
            factors=FACTORS,
            progress=context.progress,
        )
        return AttributedChange(attribution, curve)

    def describe(self, result: AttributedChange, context: AnalysisContext) -> Row:
        """The row, with the tokens of embedding rows in words where there is a tokenizer."""
        row, tokenizer = result.row(), find_tokenizer(context.trainer)
        if tokenizer is None:
            return row
        units = [
            {**unit, "words": [tokenizer.decode([place]) for place, _ in unit["top"]]}
            if unit["kind"] == "row"
            else unit
            for unit in row.result["units"]
        ]
        return row.extended(result={"units": units})
