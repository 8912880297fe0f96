"""Results as figures, as log entries and as one HTML page; reads results only."""

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
from lightning_goldy.report.charts import register_chart
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.expansion_charts import chart_taylor_prediction, chart_taylor_shares
from lightning_goldy.report.expansion_plots import plot_taylor_prediction, plot_taylor_shares
from lightning_goldy.report.html import write_report
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
from lightning_goldy.report.plots import (
    draw_plots,
    plot_change_histogram,
    plot_golden_parameters,
    plot_weight_changes,
    register_plot,
)
from lightning_goldy.report.registry import ReportError
from lightning_goldy.report.tensorboard import log_figure, log_histogram, log_scalars

__all__ = [
    "Description",
    "ReportError",
    "chart_attention_maps",
    "chart_gate_timeline",
    "chart_head_scores",
    "chart_plasticity_loss",
    "chart_plasticity_sweep",
    "chart_taylor_prediction",
    "chart_taylor_shares",
    "chart_volume_cutoffs",
    "chart_volume_estimates",
    "chart_volume_trajectory",
    "describe",
    "draw_plots",
    "log_figure",
    "log_histogram",
    "log_scalars",
    "plot_attention_maps",
    "plot_change_histogram",
    "plot_gate_timeline",
    "plot_golden_parameters",
    "plot_head_scores",
    "plot_plasticity_loss",
    "plot_plasticity_sweep",
    "plot_taylor_prediction",
    "plot_taylor_shares",
    "plot_volume_cutoffs",
    "plot_volume_estimates",
    "plot_volume_trajectory",
    "plot_weight_changes",
    "register_chart",
    "register_plot",
    "write_report",
]
