"""Run by a test: every callback that analyses, before the first step, on one process or on two."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_goldy.analysis.heads import PruningSchedule, Scoring
from lightning_goldy.callbacks import (
    AttentionTracker,
    BasinVolume,
    ChangeAttribution,
    GoldenParameters,
    GoldenSnapshot,
    HeadPlasticity,
    KnowledgeCoupling,
    ParameterDistribution,
    ReverseGoldenParameters,
    TaylorDiff,
)
from lightning_goldy.core import ParameterSpace, ParameterVector, save_vectors
from tests.callbacks.knowledge import PIECES, WordData
from tests.callbacks.training import Finetune, ShardedFinetune, fit


def main(strategy: str, folder: Path) -> None:
    """Trains one step.

    Args:
        strategy: ``single``, ``ddp`` or ``fsdp2``.
        folder: Where the run goes.
    """
    torch.set_num_threads(1)
    L.seed_everything(7, verbose=False)
    start = Finetune().model
    generator, space = torch.Generator().manual_seed(1), ParameterSpace.of(start)
    values = {
        name: value.detach() + 0.01 * torch.randn(value.shape, generator=generator)
        for name, value in space.resolve(start).items()
    }
    base = folder / f"base-{strategy}.safetensors"
    save_vectors(base, ParameterVector(space, values), kind="values", model=start)
    at = {"at": ("start",)}
    watchers = [
        GoldenSnapshot(base, every_n_steps=None, **at),
        GoldenParameters(n_samples=3, quorum=0.5, **at),
        GoldenParameters(n_samples=3, score="taylor", scope="global", quorum=0.6, name="golden_taylor", **at),
        ReverseGoldenParameters(5.0, n_samples=4, **at),
        ParameterDistribution(**at),
        TaylorDiff((1, 2), n_samples=3, by="tensor", **at),
        ChangeAttribution("kl", nodes=2, shares=[0.1, 0.5], n_samples=4, interactions=True, **at),
        # The loss of more of these samples changes by next to nothing, of which shares are noise.
        ChangeAttribution(nodes=2, shares=[0.5], pieces="units", n_samples=2, name="attributed_units", **at),
        TaylorDiff((1, 2), n_samples=3, by=None, function_space=False, name="taylor_of_loss", **at),
        AttentionTracker(n_samples=3, **at),
        BasinVolume(4, n_samples=3, cutoff=[1e-3, 1e-2], **at),
        KnowledgeCoupling(PIECES, edits=[PIECES[0].id], **at),
        HeadPlasticity(
            pruning_level=0.5,
            schedule=PruningSchedule(warmup_steps=0, steps_per_cycle=4, ramp_steps=1, cuts=1, regrow_at=2),
            scoring=Scoring(n_samples=3),
        ),
    ]
    kind = {
        "single": lambda: "auto",
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    }[strategy]()
    module = ShardedFinetune if strategy == "fsdp2" else Finetune
    devices = 1 if strategy == "single" else 2
    fit(folder / strategy, watchers, module=module, data=WordData(), strategy=kind, devices=devices, max_steps=1)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], Path(sys.argv[2]))
