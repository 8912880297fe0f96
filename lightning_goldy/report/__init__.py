"""Results as figures, as log entries and as one HTML page; reads results only."""

from __future__ import annotations

import warnings
from typing import Any

from lightning_goldy.report.answers import Answer, Finding, answers_of, register_answer
from lightning_goldy.report.comparison import write_comparison
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.figures import (
    Figure,
    ReportError,
    draw_figures,
    reads_of,
    register_figure,
    register_former,
)
from lightning_goldy.report.loggers import log_figure, log_histogram, log_scalars
from lightning_goldy.report.page import write_report
from lightning_goldy.report.topics.activations import chart_position_cosines, chart_stream_change
from lightning_goldy.report.topics.attention import (
    chart_attention_differences,
    chart_attention_grid,
    chart_attention_heads,
    chart_attention_map,
    chart_attention_map_change,
    chart_attention_patterns,
    chart_attention_scales,
    chart_attention_spectra,
)
from lightning_goldy.report.topics.attribution import (
    chart_attribution_heads,
    chart_attribution_neurons,
    chart_attribution_places,
    chart_graft,
    chart_interactions,
    chart_links,
)
from lightning_goldy.report.topics.basin import chart_volume_cutoffs, chart_volume_estimates, chart_volume_trajectory
from lightning_goldy.report.topics.circuits import chart_circuit, chart_emergence, chart_faithfulness
from lightning_goldy.report.topics.coupling import (
    chart_coupling_distribution,
    chart_coupling_map,
    chart_drift_lines,
    chart_drift_map,
    chart_drift_prediction,
    readiness_lines,
    readiness_table,
)
from lightning_goldy.report.topics.golden import (
    chart_change_histogram,
    chart_golden_parameters,
    chart_parameter_distribution,
    chart_search_history,
    chart_weight_changes,
)
from lightning_goldy.report.topics.heads import (
    chart_attention_maps,
    chart_gate_timeline,
    chart_head_scores,
    chart_plasticity_loss,
    chart_plasticity_sweep,
)
from lightning_goldy.report.topics.linearized import chart_explained_change, explanation_table
from lightning_goldy.report.topics.ripple import chart_ripple_effects
from lightning_goldy.report.topics.taylor import chart_taylor_prediction, chart_taylor_shares, chart_variant_losses
from lightning_goldy.report.topics.text import continuations_table, generations_table, summary_table

__all__ = [
    "Answer",
    "Description",
    "Figure",
    "Finding",
    "ReportError",
    "answers_of",
    "chart_attention_differences",
    "chart_attention_grid",
    "chart_attention_heads",
    "chart_attention_map",
    "chart_attention_map_change",
    "chart_attention_maps",
    "chart_attention_patterns",
    "chart_attention_scales",
    "chart_attention_spectra",
    "chart_attribution_heads",
    "chart_attribution_neurons",
    "chart_attribution_places",
    "chart_change_histogram",
    "chart_circuit",
    "chart_coupling_distribution",
    "chart_coupling_map",
    "chart_drift_lines",
    "chart_drift_map",
    "chart_drift_prediction",
    "chart_emergence",
    "chart_explained_change",
    "chart_faithfulness",
    "chart_gate_timeline",
    "chart_golden_parameters",
    "chart_graft",
    "chart_head_scores",
    "chart_interactions",
    "chart_links",
    "chart_parameter_distribution",
    "chart_plasticity_loss",
    "chart_plasticity_sweep",
    "chart_position_cosines",
    "chart_ripple_effects",
    "chart_search_history",
    "chart_stream_change",
    "chart_taylor_prediction",
    "chart_taylor_shares",
    "chart_variant_losses",
    "chart_volume_cutoffs",
    "chart_volume_estimates",
    "chart_volume_trajectory",
    "chart_weight_changes",
    "continuations_table",
    "describe",
    "draw_figures",
    "explanation_table",
    "generations_table",
    "log_figure",
    "log_histogram",
    "log_scalars",
    "readiness_lines",
    "readiness_table",
    "reads_of",
    "register_answer",
    "register_figure",
    "summary_table",
    "write_comparison",
    "write_report",
]

# Names of former versions and their successors, beside every plot_x, which is chart_x.
_FORMER = {
    "draw_plots": draw_figures,
    "plot_attention": chart_attention_map,
    "plot_attention_difference": chart_attention_map_change,
    "plot_attention_prompts": chart_attention_patterns,
    "register_chart": register_former,
    "register_plot": register_former,
}


def __getattr__(name: str) -> Any:
    chart = globals().get(f"chart_{name.removeprefix('plot_')}") if name.startswith("plot_") else None
    successor = _FORMER.get(name, chart)
    if successor is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    called = "register_figure" if successor is register_former else successor.__name__
    warnings.warn(f"lightning_goldy.report.{name} has become {called}", DeprecationWarning, stacklevel=2)
    return successor
