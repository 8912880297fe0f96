"""Which heads and MLPs carry a behaviour, through which edges of the residual stream, and how faithfully."""

from lightning_goldy.analysis.circuits.circuit import (
    Circuit,
    CircuitOverlap,
    Mover,
    Rank,
    Selection,
    circuit_overlap,
    find_circuits,
    name_movers,
    node_effects,
)
from lightning_goldy.analysis.circuits.faithfulness import (
    Faithfulness,
    FlatMetricError,
    TrackedCircuit,
    TrackingOptions,
    faithfulness,
    track_circuit,
)
from lightning_goldy.analysis.circuits.graph import CircuitGraph
from lightning_goldy.analysis.circuits.runs import Ablation, CircuitOptions, Metric
from lightning_goldy.analysis.circuits.scores import Method
from lightning_goldy.core.pieces import PromptPairs

__all__ = [
    "Ablation",
    "Circuit",
    "CircuitGraph",
    "CircuitOptions",
    "CircuitOverlap",
    "Faithfulness",
    "FlatMetricError",
    "Method",
    "Metric",
    "Mover",
    "PromptPairs",
    "Rank",
    "Selection",
    "TrackedCircuit",
    "TrackingOptions",
    "circuit_overlap",
    "faithfulness",
    "find_circuits",
    "name_movers",
    "node_effects",
    "track_circuit",
]
