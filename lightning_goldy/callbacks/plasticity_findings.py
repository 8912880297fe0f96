"""What head plasticity did, as metrics and as a row that can be redrawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_goldy.analysis.result import Cost, Row
from lightning_goldy.callbacks.plasticity_run import PlasticityRun

_EVENT_METRICS = {
    "cut": ("loss_before", "loss_after"),
    "regrow": ("loss_before", "loss_after"),
    "finish": ("loss_before", "loss"),
}


def plasticity_findings(
    run: PlasticityRun, events: Sequence[Mapping[str, Any]], *, loss: float, step: int, after: int, cost: Cost
) -> Row:
    """What to log and to save at a step.

    Args:
        run: The run so far.
        events: What was done at this step.
        loss: Of the probe, after it; nats.
        step: Optimizer steps so far.
        after: Step of the row before, from which on gates and losses are told; -1 in the first.
        cost: Passes made.
    """
    gates = run.gates
    metrics = running_metrics(run, loss, step)
    metrics["recovery_steps"] = run.state.recovery_steps
    for event in events:
        for name in _EVENT_METRICS.get(event["kind"], ()):
            value = event[name]
            metrics[f"{event['kind']}/{name}"] = value
            metrics[f"{event['kind']}/{name.replace('loss', 'perplexity')}"] = perplexity(value)
        if event["kind"] == "finish":
            metrics["recovery_steps"] = event["recovery_steps"]
            metrics["rolled_back"] = float(event["verdict"] == "roll_back")
    data = {
        "strategy": run.settings.strategy,
        "pruning_level": run.settings.pruning_level,
        "cycles": run.settings.cycles,
        "cycle": run.state.cycle,
        "phase": run.state.phase,
        "heads_per_layer": list(gates.heads_per_layer),
        "closed": [list(head) for head in gates.closed],
        "events": list(events),
        "scores": run.scored,
        "timeline": [{"step": at, "closed": closed} for at, closed in run.timeline if at > after],
        "curve": _curve([point for point in run.curve if point[0] > after]),
        "attention": _attention(run.shown),
        "last_step": run.plan.last_step,
    }
    return Row("head_plasticity", metrics, data, cost=cost)


def running_metrics(run: PlasticityRun, loss: float, step: int) -> dict[str, float | None]:
    """What is logged at every measurement.

    Args:
        run: The run so far.
        loss: Of the probe, nats.
        step: Optimizer steps so far.
    """
    opened, heads = len(run.gates.opened), len(run.gates.heads)
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "active_heads": float(opened),
        "closed_share": 1 - opened / heads,
        "learning_rate_multiplier": max(run.multipliers(step).values(), default=1.0),
        "cycle": float(run.state.cycle),
    }


def perplexity(loss: float) -> float | None:
    """The exponential of a loss in nats; None where no number is large enough.

    Example:
        >>> perplexity(0.0), perplexity(1e6)
        (1.0, None)
    """
    return math.exp(loss) if loss < 700 else None


def _curve(points: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    names = ("steps", "loss", "multiplier", "active_heads")
    return {name: [point[column] for point in points] for column, name in enumerate(names)}


def _attention(shown: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if shown is None:
        return None
    maps = {moment: np.round(maps.float().numpy(), 3).tolist() for moment, maps in shown["maps"].items()}
    return {"step": shown["step"], "heads": shown["heads"], "n_cut": shown["n_cut"], "maps": maps}
