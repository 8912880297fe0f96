"""What thousands of analyses leave in the process: nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from lightning_goldy.callbacks import AttentionTracker, BasinVolume, GoldenParameters, GoldenSnapshot, TaylorDiff
from tests.callbacks.training import Finetune, differences, fit

FIRINGS = int(os.environ.get("GOLDY_FIRINGS", "2000"))


@pytest.mark.slow
def test_memory_files_and_threads_stay_what_they_are(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.callbacks.soaked", str(FIRINGS), str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "seen.json").read_text())
    assert found["rows"] == [FIRINGS // 4] * 4
    # What is made once, as the first figure's process, is there by then.
    settled = [seen for seen in found["seen"] if seen["firings"] > FIRINGS / 4]
    slope = np.polyfit([seen["firings"] for seen in settled], [seen["bytes"] for seen in settled], 1)[0]
    print(f"{100 * slope / 2**20:.3f} MB per 100 firings; {settled[0]} to {settled[-1]}")
    assert 100 * slope < 2**20, settled
    for name in ("files", "threads", "own_threads"):
        assert len({seen[name] for seen in settled}) == 1, (name, settled)


class Compiled(Finetune):
    def __init__(self) -> None:
        super().__init__()
        self.model = torch.compile(self.model, backend="eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:The .grad attribute of a Tensor that is not a leaf")
def test_analyses_compile_nothing(tmp_path: Path) -> None:
    """Dynamo gives up on a model that is compiled anew too often."""

    def trained(name: str, callbacks) -> tuple[dict, dict]:
        torch._dynamo.reset()
        counters.clear()
        _, _, found = fit(tmp_path / name, callbacks, module=Compiled, max_epochs=1)
        return found, dict(counters["stats"])

    plain, compiled = trained("plain", [])
    watched, again = trained(
        "watched",
        [
            GoldenSnapshot(every_n_steps=1, at=("start", "end")),
            GoldenParameters(n_samples=3, quorum=0.5, every_n_steps=2),
            TaylorDiff(n_samples=2, every_n_steps=2),
            AttentionTracker(n_samples=2, every_n_steps=2),
            BasinVolume(2, n_samples=2, every_n_steps=4),
        ],
    )
    assert compiled["unique_graphs"] > 0
    assert again == compiled
    assert differences(plain, watched) == []
