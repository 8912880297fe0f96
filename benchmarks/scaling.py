"""How the work of basin volume and coupling divides over processes: passes, CPU seconds of each rank, and the clock.

The speed-up that the work allows is what one process spends over the most that a rank spends; the wall clock shows it
only where every rank has a core of its own.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_goldy.analysis import basin_volume, knowledge_coupling

VOCABULARY, LENGTH = 512, 32


def model(width: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": width, "intermediate_size": 4 * width}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **shape)).eval()


def batches(samples: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(1, VOCABULARY, (samples, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]


ANALYSES: dict[str, Callable[[LlamaForCausalLM, argparse.Namespace], Any]] = {
    "basin": lambda module, options: basin_volume(module, batches(16), n_directions=options.directions).estimates,
    "coupling": lambda module, options: knowledge_coupling(module, batches(options.pieces)).matrix,
}


def measured(rank: int, size: int, folder: str, options: argparse.Namespace) -> None:
    """One rank: seconds of the processor and of the clock for each analysis, and a number to compare."""
    torch.set_num_threads(1)
    if size > 1:
        address = f"file://{folder}/rendezvous-{size}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    module, found = model(options.width), {}
    for name, analyse in ANALYSES.items():
        analyse(module, argparse.Namespace(directions=2, pieces=8))  # what is made once
        best = None
        counted = [0]
        hook = module.register_forward_hook(
            lambda _, args, kwargs, output, counted=counted: counted.__setitem__(0, counted[0] + len(output.logits)),
            with_kwargs=True,
        )
        for _ in range(options.repeats):
            if size > 1:
                dist.barrier()
            cpu, clock = time.process_time(), time.perf_counter()
            value = analyse(module, options)
            # Waiting for another rank is no work of this one: a rank sleeps in a collective.
            spent = time.process_time() - cpu, time.perf_counter() - clock
            best = spent if best is None else tuple(map(min, best, spent))
        hook.remove()
        passes = counted[0] / options.repeats
        found[name] = {"passes": passes, "cpu": best[0], "wall": best[1], "value": float(value.double().nanmean())}
    torch.save(found, f"{folder}/{size}-{rank}")
    if size > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--width", type=int, default=128, help="of the model")
    parser.add_argument("--directions", type=int, default=41)
    parser.add_argument("--pieces", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores; load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        for size in (1, *options.ranks):
            mp.spawn(measured, (size, folder, options), nprocs=size)
        alone = torch.load(Path(folder) / "1-0")
        for size in options.ranks:
            ranks = [torch.load(Path(folder) / f"{size}-{rank}") for rank in range(size)]
            for name, one in alone.items():
                assert abs(ranks[0][name]["value"] / one["value"] - 1) < 1e-5, (ranks[0][name], one)
                for measure, unit in (("passes", "samples through the model"), ("cpu", "s CPU"), ("wall", "s wall")):
                    each = [rank[name][measure] for rank in ranks]
                    divided = ", ".join(f"{part:.4g}" for part in each)
                    speed = one[measure] / max(each)
                    print(
                        f"{name:9} {size} ranks: {speed:.2f} x by {unit}: {one[measure]:.4g} alone, {divided} divided"
                    )


if __name__ == "__main__":
    main()
