"""Which callback works under which strategy: what was observed, in the words of the table, written or read.

``python -m tests.references.strategies_table`` renews ``docs/strategies.md``; it takes some minutes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.distributed.launch import run_processes
from tests.distributed.strategy_checks import SPAWNED, STRATEGIES, SUBJECTS, observe_all, write_base
from tests.references import noted_table

PATH = Path(__file__).parents[2] / "docs" / "strategies.md"
_INTRODUCTION = """# Strategies

What each callback does under each of Lightning's strategies, on the CPU with gloo, 1, 2 and 4 processes. The table is
generated: a slow test runs every cell and holds it against this page, and `make strategies` renews it.

**exact**: every metric, and the numbers of passes among its costs, has the bits that one process finds, and a training
with the callback ends with the bits (weights, optimizer, buffers, random states) of one without it. **rounding 1e-6**:
the training likewise; metrics agree up to this relative difference, which sums in another order make. **other passes**:
the analysis goes another way where the model is in shards, so its passes are others. **without**: it warns that it
leaves out what needs whole layers, and lacks this metric. **refused**: it ends before the first
step with a message of its own, the note. A cell that nobody has run yet says so.

`HeadPlasticity` and `FinetuneComparison` change or repeat the training, so of them the rows alone are compared. Of
`ExactResume` it is told whether a training that goes on from a checkpoint is the one that did not stop. DeepSpeed and
FSDP1 need a GPU: their columns are those of stand-ins with the same class names, flat parameters and hooks on
gradients. A subclass of a strategy is told apart by what it inherits.
"""


def observed(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What every callback did under every strategy."""
    base = write_base(folder / "base.safetensors")
    found: dict[str, dict[str, Any]] = {}
    for size in sorted({strategy.ranks for strategy in STRATEGIES.values()}):
        names = [name for name, strategy in STRATEGIES.items() if strategy.ranks == size and name != SPAWNED]
        ranks = run_processes(observe_all, size, names, str(folder), str(base), timeout=3600)
        for name in names:
            for rank in ranks[1:]:
                assert rank[name].keys() == ranks[0][name].keys()
                for subject, seen in rank[name].items():
                    first = ranks[0][name][subject]
                    assert seen.get("error") == first.get("error"), (name, subject, seen.get("error"), first)
        found |= ranks[0]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.strategy_checks", str(folder), str(base)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found[SPAWNED] = json.loads((folder / "spawn.json").read_text())
    return {(subject, name): found[name][subject] for subject in SUBJECTS for name in STRATEGIES}


def told(seen: Mapping[str, Any], alone: Mapping[str, Any]) -> str:
    """A cell: what a callback did, beside what it does in one process."""
    if "error" in seen:
        kind, _, message = seen["error"].partition(": ")
        return f"refused: {_short(message, kind)}"
    if seen["differences"]:
        return f"changes the training: {', '.join(seen['differences'])}"
    if "error" in alone:
        return "exact"
    mine, wanted = seen["row"], alone["row"]
    lacking = sorted(wanted["metrics"].keys() - mine["metrics"].keys())
    wanted = {**wanted, "metrics": {name: value for name, value in wanted["metrics"].items() if name not in lacking}}
    if {name for name, value in mine["metrics"].items() if value is None} != {
        name for name, value in wanted["metrics"].items() if value is None
    } or mine["metrics"].keys() != wanted["metrics"].keys():
        return "other metrics"
    pairs = [(mine["metrics"][name], value) for name, value in wanted["metrics"].items() if value is not None]
    apart = max((abs(found - value) / max(abs(value), 1e-3) for found, value in pairs), default=0.0)
    # What differs by less than float32 resolves is of sums in another order.
    power = max(math.ceil(math.log10(apart)), -6) if apart else None
    manner = "exact" if power is None else f"rounding 1e{power}"
    counts = [[part["cost"].get(name, 0) for name in ("forwards", "backwards")] for part in (mine, wanted)]
    passes = [] if counts[0] == counts[1] else ["other passes"]
    return ", ".join([manner, *passes, *(f"without {name}" for name in lacking)])


def _short(message: str, kind: str) -> str:
    line = " ".join(message.split()).replace("|", "/")
    # A class of torch's spawning wraps the worker's own error.
    line = line.rpartition("ValueError: ")[2] if kind == "ProcessRaisedException" else line
    return line if len(line) <= 240 else f"{line[:237].rstrip()}..."


def cells_of(seen: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """The words of all cells, by strategy and callback."""
    return {(name, subject): told(found, seen[subject, "single"]) for (subject, name), found in seen.items()}


def render(cells: Mapping[tuple[str, str], str]) -> str:
    """The page, of cells by strategy and callback."""
    return noted_table.render(_INTRODUCTION, "strategy", STRATEGIES, SUBJECTS, cells)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        PATH.write_text(render(cells_of(observed(Path(place)))))
