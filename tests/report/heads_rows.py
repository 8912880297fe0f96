"""Rows of head plasticity, as the callback writes them."""

from __future__ import annotations

from typing import Any


def plasticity_row(step: int = 9, *, cut: bool = True) -> dict[str, Any]:
    """A run of two layers with two heads each: head 1.0 is cut at step 4, head 0.1 at step 6, and 1.0 opens at 8."""
    timeline = [(0, []), (4, [[1, 0]]), (6, [[0, 1], [1, 0]]), (8, [[0, 1]])]
    half = [[1.0, 0.0], [0.5, 0.5]]
    result = {
        "strategy": "taylor",
        "pruning_level": 0.5,
        "cycles": 1,
        "cycle": 0,
        "phase": "regrown",
        "heads_per_layer": [2, 2],
        "closed": timeline[-1][1] if cut else [],
        "events": [],
        "scores": {
            "step": 6,
            "strategy": "taylor",
            "n_samples": 8,
            "values": [[0.25, -1.0], [3.0, 0.125]],
            "closed_before": [[1, 0]],
            "cut": [[0, 1]],
        }
        if cut
        else None,
        "timeline": [{"step": at, "closed": closed} for at, closed in (timeline if cut else timeline[:1])],
        "curve": {
            "steps": [2, 4, 4, 6, 6, 8] if cut else [],
            "loss": [2.0, 2.0, 2.5, 2.25, 3.0, None] if cut else [],
            "multiplier": [1.0, 1.0, 3.0, 2.0, 3.0, 1.0] if cut else [],
            "active_heads": [4, 4, 3, 3, 2, 3] if cut else [],
        },
        "attention": {
            "step": 4,
            "heads": [[1, 0], [0, 0], [0, 1]],
            "n_cut": 1,
            "maps": {"before": [half] * 3, "cut": [half] * 3, "recovered": [half] * 3},
        }
        if cut
        else None,
        "last_step": 10,
    }
    return {
        "format": 1,
        "analysis": "head_plasticity",
        "name": "head_plasticity",
        "step": step,
        "epoch": 0,
        "trigger": "step",
        "metrics": {"loss": 2.25, "active_heads": 3.0, "closed_share": 0.25, "cut/loss_before": 2.25},
        "result": result,
        "cost": {"seconds": 0.5, "model_evaluations": 6, "peak_memory_bytes": 2**20},
        "files": {},
    }


def plasticity_rows(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The run of a row as three rows, each of which tells what came since the one before."""
    rows = []
    for after, step in ((-1, 4), (4, 6), (6, row["step"])):
        curve = row["result"]["curve"]
        fresh = [place for place, at in enumerate(curve["steps"]) if after < at <= step]
        told = {
            "timeline": [change for change in row["result"]["timeline"] if after < change["step"] <= step],
            "curve": {name: [column[place] for place in fresh] for name, column in curve.items()},
        }
        rows.append({**row, "step": step, "result": {**row["result"], **told}})
    return rows


def sweep_row() -> dict[str, Any]:
    """Two strategies, two levels, two seeds."""
    costs = {("taylor", 0.1): (0.0, 0.1), ("taylor", 0.5): (0.2, 0.4), ("random", 0.1): (0.1, 0.3)}
    costs[("random", 0.5)] = (1.0, None)
    runs = [
        {"strategy": strategy, "level": level, "cycles": 1, "seed": seed, "cost": cost, "loss": 2.0}
        for (strategy, level), both in costs.items()
        for seed, cost in enumerate(both)
    ]
    row = plasticity_row(0)
    return {**row, "analysis": "plasticity_sweep", "name": "plasticity_sweep", "result": {"runs": runs}, "metrics": {}}
