"""Which heads and MLPs carry a behaviour, through which edges of the residual stream, and how faithfully."""

from lightning_goldy.analysis.circuits.circuit import (
    Circuit,
    CircuitOverlap,
    circuit_overlap,
    find_circuits,
    node_effects,
)
from lightning_goldy.analysis.circuits.faithfulness import Faithfulness, faithfulness
from lightning_goldy.analysis.circuits.graph import CircuitGraph
from lightning_goldy.analysis.circuits.scores import CircuitOptions
from lightning_goldy.analysis.circuits.tracking import TrackedCircuit, TrackingOptions, track_circuit
from lightning_goldy.core.pieces import PromptPairs

__all__ = [
    "Circuit",
    "CircuitGraph",
    "CircuitOptions",
    "CircuitOverlap",
    "Faithfulness",
    "PromptPairs",
    "TrackedCircuit",
    "TrackingOptions",
    "circuit_overlap",
    "faithfulness",
    "find_circuits",
    "node_effects",
    "track_circuit",
]
