"""The files that ``goldy coupling`` writes beside its summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_goldy.analysis.coupling_picture import coupling_picture
from lightning_goldy.callbacks.run_directory import ResultStore
from lightning_goldy.core.files import atomic_path, atomic_write
from lightning_goldy.coupling.analysis import Findings
from lightning_goldy.coupling.report import SCHEMA_VERSION
from lightning_goldy.report.figures import draw_figures

TENSORS = "coupling.safetensors"
SUMMARY = "coupling.json"
PAIRS = "pairs.csv"
REPORT = "report.html"
_PICTURES = {
    ("knowledge_coupling", "heat_map"): ("heat_map.png", "cosines in the order of the clusters"),
    ("knowledge_coupling", "distribution"): ("distribution.png", "distribution of the cosines, with the thresholds"),
    ("ripple_effects", "prediction"): ("ripple.png", "predicted against measured changes by the edits"),
}
_RIPPLE = (
    "predicted_first_order", "predicted_coupling", "cosine", "before", "after", "rank_before", "rank_after",
    "exact_before", "exact_after", "new_before", "new_after", "new_exact", "delta_norm", "gradient_norm",
)  # fmt: skip


def write_tensors(found: Findings, path: Path) -> Path:
    """Writes the matrix and everything else that is a tensor; ids are in the header, as JSON.

    Args:
        found: What was measured.
        path: Target.
    """
    tensors: dict[str, Tensor] = {
        "coupling": found.result.matrix,
        "norms": found.result.norms,
        "log_probs": found.result.log_probs,
        "order": torch.tensor(found.statistics.order, dtype=torch.int64),
        "clusters": torch.tensor(found.statistics.clusters, dtype=torch.int64),
        "answer_log_probs": found.scores.log_prob,
        "answer_ranks": found.scores.rank,
        "answer_exact": found.scores.exact,
    }
    if found.activation is not None:
        tensors["activation"] = found.activation.matrix
    header = {"schema_version": SCHEMA_VERSION, "ids": list(found.result.ids)}
    if found.ripple is not None:
        tensors |= {f"ripple/{name}": getattr(found.ripple, name) for name in _RIPPLE}
        header["ripple_ids"] = list(found.ripple.pieces)
        header["ripple_edits"] = [{name: list(value) for name, value in each.items()} for each in found.ripple.edits]
    # Copies, because safetensors refuses tensors that share memory.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={"goldy_coupling": json.dumps(header)})
    return path


def write_rows(
    found: Findings, parts: Mapping[str, Any], folder: Path, cost: Mapping[str, Mapping[str, float | int]]
) -> list[dict[str, Any]]:
    """Writes the rows that the report is made of, and returns them.

    Args:
        found: What was measured.
        parts: ``high_coupling_pairs`` and ``readiness`` of the summary.
        folder: Of all results.
        cost: Of each analysis ``seconds``, ``model_evaluations``, ``peak_memory_bytes``.
    """
    common: dict[str, Any] = {"format": 1, "step": 0, "epoch": 0, "trigger": "end", "files": {}}
    high, moderate = found.statistics.thresholds
    rows: list[dict[str, Any]] = [
        {
            **common,
            "analysis": "knowledge_coupling",
            "name": "knowledge_coupling",
            "metrics": found.statistics.scalars(),
            "result": {
                "measure": found.result.measure,
                "n_pieces": found.statistics.n_pieces,
                "n_pairs": found.statistics.n_pairs,
                "n_clusters": found.statistics.n_clusters,
                "thresholds": {"high": high, "moderate": moderate},
                **coupling_picture(found.result, found.statistics).row(),
                "top": parts["high_coupling_pairs"]["top"],
                "readiness": parts["readiness"],
            },
            "cost": dict(cost["knowledge_coupling"]),
        }
    ]
    if found.ripple is not None:
        rows.append({**common, **found.ripple.row(), "trigger": "end", "cost": dict(cost["ripple_effects"])})
    for row in rows:
        ResultStore(folder / "goldy" / str(row["name"]), write=True).append(row)
    return rows


def write_pictures(rows: list[dict[str, Any]], folder: Path) -> tuple[dict[str, str], str | None]:
    """Draws the rows as PNG.

    Args:
        rows: As ``write_rows`` gives them.
        folder: Where.

    Returns:
        What each file shows, by name; and why there is none, where what draws them is not installed.
    """
    written = {}
    for row in rows:
        try:
            figures = draw_figures(row)
        except ImportError as error:
            return {}, str(error)
        for name, figure in figures.items():
            file, shows = _PICTURES[row["analysis"], name]
            atomic_write(folder / file, figure.png())
            written[file] = shows
    return written, None
