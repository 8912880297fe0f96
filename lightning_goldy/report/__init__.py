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
from lightning_goldy.report.html import write_report
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
    "chart_volume_cutoffs",
    "chart_volume_estimates",
    "chart_volume_trajectory",
    "describe",
    "draw_plots",
    "log_figure",
    "log_histogram",
    "log_scalars",
    "plot_change_histogram",
    "plot_golden_parameters",
    "plot_volume_cutoffs",
    "plot_volume_estimates",
    "plot_volume_trajectory",
    "plot_weight_changes",
    "register_chart",
    "register_plot",
    "write_report",
]
