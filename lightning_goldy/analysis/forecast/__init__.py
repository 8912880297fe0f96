"""What analyses will cost, before they run."""

from lightning_goldy.analysis.forecast.analyses import (
    BasinSettings,
    ReverseSettings,
    forecast_attention,
    forecast_basin,
    forecast_bridge,
    forecast_change,
    forecast_coupling,
    forecast_distribution,
    forecast_golden,
    forecast_heads,
    forecast_losses,
    forecast_reverse,
    forecast_taylor,
)
from lightning_goldy.analysis.forecast.plan import Forecast, Passes, Plan, Run, Speeds, Work
from lightning_goldy.analysis.forecast.timing import arithmetic_speeds, graph_bytes, measure_speeds, shape_rows

__all__ = [
    "BasinSettings",
    "Forecast",
    "Passes",
    "Plan",
    "ReverseSettings",
    "Run",
    "Speeds",
    "Work",
    "arithmetic_speeds",
    "forecast_attention",
    "forecast_basin",
    "forecast_bridge",
    "forecast_change",
    "forecast_coupling",
    "forecast_distribution",
    "forecast_golden",
    "forecast_heads",
    "forecast_losses",
    "forecast_reverse",
    "forecast_taylor",
    "graph_bytes",
    "measure_speeds",
    "shape_rows",
]
