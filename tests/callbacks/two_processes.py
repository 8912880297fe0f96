"""Run by a test: two processes train with and without callbacks; each rank writes what it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_goldy.analysis import diagonal_preconditioner, finetune_ripple, golden_parameters, knowledge_coupling
from lightning_goldy.analysis.basin import KroneckerPreconditioner, basin_volume, kronecker_fisher
from lightning_goldy.analysis.divergence import shortened
from lightning_goldy.callbacks import BasinVolume, GoldenParameters, GoldenSnapshot, KnowledgeCoupling
from lightning_goldy.core import ParameterSpace, ParameterVector, load_vectors
from lightning_goldy.core.objective import CausalLMObjective
from lightning_goldy.core.sharding import gather
from lightning_goldy.core.vector import substituted
from tests.callbacks.knowledge import PIECES, WORDS, WordData
from tests.callbacks.training import Finetune, ShardedFinetune, TokenData, differences, fit


def main(strategy: str, folder: Path) -> None:
    torch.set_num_threads(1)
    sharded = strategy == "fsdp2"

    def run(name: str, callbacks):
        kind = (
            ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            if sharded
            else DDPStrategy(process_group_backend="gloo")
        )
        return fit(
            folder / name,
            callbacks,
            module=ShardedFinetune if sharded else Finetune,
            data=WordData(),
            strategy=kind,
            devices=2,
            max_epochs=2,
            accumulate_grad_batches=2,
        )

    _, _, plain = run("plain", [])
    snapshot = GoldenSnapshot(every_n_steps=2, at=("end",))
    golden = GoldenParameters(n_samples=3, quorum=0.5, every_n_steps=2, at=("start", "end"))
    basin = BasinVolume(5, n_samples=3, preconditioner="best", every_n_steps=2, at=("end",))
    knowledge = KnowledgeCoupling(PIECES, every_n_steps=2, at=("end",))
    trainer, module, found = run("watched", [snapshot, golden, basin, knowledge])

    # The same on one process: the present weights in an unsharded model.
    alone = Finetune()
    parameters = dict(module.model.named_parameters())
    with torch.no_grad():
        for name, parameter in alone.model.named_parameters():
            value = parameters[name].detach()
            parameter.copy_(value.full_tensor() if hasattr(value, "full_tensor") else value)
    batches = list(TokenData().probe_dataloader())
    expected = golden_parameters(alone.model, batches, n_samples=3, quorum=0.5, split_over_ranks=False)
    mask, _ = load_vectors(golden.folder / f"mask-step={trainer.global_step:08d}.safetensors")
    base, _ = load_vectors(snapshot.folder / "base.safetensors")
    change = (ParameterVector.of(alone.model, ParameterSpace.of(alone.model)) - base).norm()
    volumes = same_volumes(trainer, module, alone, batches, basin)
    row = json.loads((snapshot.folder / "results.jsonl").read_text().splitlines()[-1])
    result = {
        "differences": differences(plain, found),
        "world_size": dist.get_world_size(),
        "same_mask_as_one_process": all(torch.equal(mask[name], expected.mask[name]) for name in expected.mask),
        "same_volumes_as_one_process": volumes,
        "same_change_as_one_process": abs(row["metrics"]["delta_norm"] / change - 1) < 1e-6,
        "same_knowledge_as_one_process": same_knowledge(trainer, alone, base, knowledge),
    }
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))


def same_knowledge(trainer, alone, base, knowledge) -> bool:
    """Every piece's numbers and the cosines, against the present weights on one process."""
    found, _ = load_vectors(knowledge.folder / f"coupling-step={trainer.global_step:08d}.safetensors")
    options = {"tokenizer": WORDS, "split_over_ranks": False}
    ripple = finetune_ripple(alone.model, base, PIECES, **options)
    now = knowledge_coupling(alone.model, PIECES, **options).cosines
    with substituted(alone.model, base):
        before = knowledge_coupling(alone.model, PIECES, **options).cosines
    pairs = [
        (found["predicted"], ripple.predicted),
        (found["after"] - found["before"], ripple.measured),
        (found["cosines"], now),
        (found["base_cosines"], before),
    ]
    return all(torch.allclose(mine, wanted, rtol=1e-4, atol=1e-5) for mine, wanted in pairs)


def same_volumes(trainer, module, alone, batches, basin) -> bool:
    last = json.loads((basin.folder / "results.jsonl").read_text().splitlines()[-1])
    row = last["result"]
    optimizer = trainer.optimizers[0]
    names = [name.removeprefix("model.") for name, _ in module.named_parameters()]
    held = dict(zip(names, optimizer.param_groups[0]["params"], strict=True))
    space = ParameterSpace.of(alone.model)
    # Without their bias correction, one factor for all, which a volume-preserving map does not see.
    whole = ParameterVector(space, {name: gather(optimizer.state[held[name]]["exp_avg_sq"]) for name in space})
    fisher = kronecker_fisher(alone.model, shortened(batches, CausalLMObjective(), 3, None), space=space)
    proposals = {
        "none": None,
        "adam": diagonal_preconditioner(whole, eps=row["eps"]),
        "kronecker": KroneckerPreconditioner(fisher, eps=last["metrics"]["kronecker_eps"]),
    }
    options = {"n_directions": 5, "n_samples": 3, "sigma": row["sigma"], "split_over_ranks": False}
    expected = basin_volume(alone.model, batches, preconditioner=proposals, **options)
    (volume,) = row["volumes"]
    pairs = [(torch.tensor(volume["estimates"], dtype=torch.float64), expected.estimates)]
    for name, numbers in expected.proposals.items():
        pairs.append(tuple(torch.tensor(each["log_volume"]) for each in (volume["proposals"][name], numbers)))
    return set(volume["proposals"]) == set(proposals) and all(
        torch.allclose(found, wanted, rtol=1e-6, atol=0.0) for found, wanted in pairs
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
