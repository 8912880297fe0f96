"""Headlines carry what they are of each sample, so that two runs are compared with an interval."""

from __future__ import annotations

import math

import pytest

from lightning_goldy.callbacks import (
    ActivationDifferences,
    AttentionTracker,
    ChangeAttribution,
    CircuitTracker,
    GoldenSnapshot,
    KnowledgeCoupling,
    TaylorDiff,
)
from lightning_goldy.report.comparison import differences, samples_of
from lightning_goldy.report.run import read_run
from tests.callbacks.knowledge import PIECES, WordData
from tests.callbacks.training import fit

PAIRED = {
    "taylor_diff": {"nonlinearity", "relative_error/order1"},
    "attention_tracker": {"drift"},
    "activation_differences": {"kl_from_base"},
    "change_attribution": {"effect", "recovered by 10 % of the elements"},
    "circuit_tracker": {"area"},
    "knowledge_coupling": {f"{what}/{of}" for what in ("measured_change", "exact") for of in ("edited", "untouched")},
}


def grafted(row) -> float:
    (point,) = (p for p in row["result"]["graft"]["points"] if (p["method"], p["share"]) == ("attribution", 0.1))
    return point["recovered"]


def watchers() -> list:
    at = {"at": ("end",)}
    return [
        GoldenSnapshot(**at),
        TaylorDiff(n_samples=3, **at),
        AttentionTracker(n_samples=3, **at),
        ActivationDifferences(n_samples=3, **at),
        ChangeAttribution(nodes=2, n_samples=4, shares=[0.1], **at),
        CircuitTracker("induction", n_pairs=3, sizes=[0.1, 0.3], n_random=1, **at),
        KnowledgeCoupling(PIECES, edits=[PIECES[0].id], **at),
    ]


def test_samples_make_up_the_headlines_and_two_runs_are_paired(tmp_path):
    for name, epochs in (("short", 1), ("long", 2)):
        fit(tmp_path / name, watchers(), data=WordData(), max_epochs=epochs)
    runs = [read_run(tmp_path / name / "run") for name in ("short", "long")]
    for analysis in runs[1].analyses:
        row = analysis.rows[-1]
        found = samples_of(row)
        assert set(found) == PAIRED.get(analysis.name, set()), analysis.name
        for metric, samples in found.items():
            pairs = [pair for values in samples.values.values() for pair in values]
            ratio = math.fsum(a for a, _ in pairs) / math.fsum(b for _, b in pairs)
            told = grafted(row) if metric.startswith("recovered") else row["metrics"][metric]
            assert ratio**samples.power == pytest.approx(told, rel=1e-6, abs=1e-12), metric
    told = {entry.what: entry for entry in differences(*runs)}
    for name, metrics in PAIRED.items():
        for metric in metrics - {"measured_change/edited", "exact/edited"}:
            if (entry := told.get(f"{name}: {metric}")) is not None:
                assert entry.remark.startswith("paired over"), (name, metric, entry)
    assert told["attention_tracker: drift"].low < told["attention_tracker: drift"].high
    assert told["golden_snapshot: delta_norm"].remark == "no interval"
