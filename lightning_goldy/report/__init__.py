"""Results as figures, as log entries and as one HTML page; reads results only."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from lightning_goldy.report.basin_charts import (
    chart_volume_cutoffs,
    chart_volume_estimates,
    chart_volume_trajectory,
)
from lightning_goldy.report.basin_plots import (
    plot_volume_cutoffs,
    plot_volume_estimates,
    plot_volume_trajectory,
)
from lightning_goldy.report.coupling_charts import chart_coupling_distribution, chart_coupling_map
from lightning_goldy.report.coupling_drift_charts import chart_drift_lines, chart_drift_map, chart_drift_prediction
from lightning_goldy.report.coupling_drift_plots import plot_drift_lines, plot_drift_map, plot_drift_prediction
from lightning_goldy.report.coupling_plots import plot_coupling_distribution, plot_coupling_map
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.expansion_charts import chart_taylor_prediction, chart_taylor_shares
from lightning_goldy.report.expansion_plots import plot_taylor_prediction, plot_taylor_shares
from lightning_goldy.report.figures import Figure, ReportError, draw_figures, reads_of, register_figure
from lightning_goldy.report.loggers import log_figure, log_histogram, log_scalars
from lightning_goldy.report.page import write_report
from lightning_goldy.report.plasticity_charts import (
    chart_attention_maps,
    chart_gate_timeline,
    chart_head_scores,
    chart_plasticity_loss,
    chart_plasticity_sweep,
)
from lightning_goldy.report.plasticity_plots import (
    plot_attention_maps,
    plot_gate_timeline,
    plot_head_scores,
    plot_plasticity_loss,
    plot_plasticity_sweep,
)
from lightning_goldy.report.ripple_charts import chart_ripple_effects
from lightning_goldy.report.ripple_plots import plot_ripple_effects
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
from lightning_goldy.report.topics.golden import (
    chart_change_histogram,
    chart_golden_parameters,
    chart_parameter_distribution,
    chart_search_history,
    chart_weight_changes,
)
from lightning_goldy.report.topics.linearized import chart_explained_change
from lightning_goldy.report.variant_figures import chart_variant_losses, plot_variant_losses

__all__ = [
    "Description",
    "Figure",
    "ReportError",
    "chart_attention_differences",
    "chart_attention_grid",
    "chart_attention_heads",
    "chart_attention_map",
    "chart_attention_map_change",
    "chart_attention_maps",
    "chart_attention_patterns",
    "chart_attention_scales",
    "chart_attention_spectra",
    "chart_change_histogram",
    "chart_coupling_distribution",
    "chart_coupling_map",
    "chart_drift_lines",
    "chart_drift_map",
    "chart_drift_prediction",
    "chart_explained_change",
    "chart_gate_timeline",
    "chart_golden_parameters",
    "chart_head_scores",
    "chart_parameter_distribution",
    "chart_plasticity_loss",
    "chart_plasticity_sweep",
    "chart_ripple_effects",
    "chart_search_history",
    "chart_taylor_prediction",
    "chart_taylor_shares",
    "chart_variant_losses",
    "chart_volume_cutoffs",
    "chart_volume_estimates",
    "chart_volume_trajectory",
    "chart_weight_changes",
    "describe",
    "draw_figures",
    "log_figure",
    "log_histogram",
    "log_scalars",
    "plot_attention_maps",
    "plot_coupling_distribution",
    "plot_coupling_map",
    "plot_drift_lines",
    "plot_drift_map",
    "plot_drift_prediction",
    "plot_gate_timeline",
    "plot_head_scores",
    "plot_plasticity_loss",
    "plot_plasticity_sweep",
    "plot_ripple_effects",
    "plot_taylor_prediction",
    "plot_taylor_shares",
    "plot_variant_losses",
    "plot_volume_cutoffs",
    "plot_volume_estimates",
    "plot_volume_trajectory",
    "reads_of",
    "register_figure",
    "write_report",
]

# Names of former versions: where each leads.
_FORMER = {
    "draw_plots": "lightning_goldy.report.figures.draw_figures",
    "plot_attention": "lightning_goldy.report.topics.attention.chart_attention_map",
    "plot_attention_difference": "lightning_goldy.report.topics.attention.chart_attention_map_change",
    "plot_attention_grid": "lightning_goldy.report.topics.attention.chart_attention_grid",
    "plot_attention_heads": "lightning_goldy.report.topics.attention.chart_attention_heads",
    "plot_attention_prompts": "lightning_goldy.report.topics.attention.chart_attention_patterns",
    "plot_attention_spectra": "lightning_goldy.report.topics.attention.chart_attention_spectra",
    "plot_change_histogram": "lightning_goldy.report.topics.golden.chart_change_histogram",
    "plot_explained_change": "lightning_goldy.report.topics.linearized.chart_explained_change",
    "plot_golden_parameters": "lightning_goldy.report.topics.golden.chart_golden_parameters",
    "plot_parameter_distribution": "lightning_goldy.report.topics.golden.chart_parameter_distribution",
    "plot_search_history": "lightning_goldy.report.topics.golden.chart_search_history",
    "plot_weight_changes": "lightning_goldy.report.topics.golden.chart_weight_changes",
    "register_chart": "lightning_goldy.report.figures.register_former",
    "register_plot": "lightning_goldy.report.figures.register_former",
}


def __getattr__(name: str) -> Any:
    if name not in _FORMER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, successor = _FORMER[name].rpartition(".")
    called = "register_figure" if successor == "register_former" else successor
    warnings.warn(f"lightning_goldy.report.{name} has become {called}", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(module), successor)
