"""Every callback under every strategy: what its rows are, and whether the training is the one without it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_goldy import GoldyModule
from lightning_goldy.analysis.heads import PruningSchedule, Scoring
from lightning_goldy.callbacks import (
    ActivationDifferences,
    AttentionTracker,
    BasinVolume,
    ChangeAttribution,
    CircuitTracker,
    ExactResume,
    FinetuneComparison,
    GoldenParameters,
    GoldenSnapshot,
    HeadPlasticity,
    KnowledgeCoupling,
    ParameterDistribution,
    ReverseGoldenParameters,
    RunReport,
    TaylorDiff,
    VariantLosses,
)
from lightning_goldy.core import ParameterSpace, ParameterVector, save_vectors
from lightning_goldy.training.models import shard_blocks
from lightning_goldy.training.variants import VariantsModule
from tests.callbacks.knowledge import PIECES, WordData
from tests.callbacks.training import Finetune, differences, fit, trace
from tests.references.models import build
from tests.references.zero import DeepSpeedStrategy, FSDPStrategy, OwnDeepSpeed, SlowFSDP


class Llama(Finetune):
    """The family that tensor parallelism can split."""

    def __init__(self) -> None:
        super().__init__("llama")


class Sharded(Llama):
    """FSDP2, by block."""

    def configure_model(self) -> None:
        shard_blocks(self.model, self.device_mesh)


class Hybrid(Llama):
    """Two groups that each hold the whole model in two shards."""

    def configure_model(self) -> None:
        if not hasattr(self.model, "unshard"):
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
            for block in self.model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)


class TensorParallel(Llama):
    """MLPs split over two processes, everything over two groups of them."""

    def configure_model(self) -> None:
        if hasattr(self.model, "unshard"):
            return
        plan = {
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(),
        }
        for block in self.model.model.layers:
            parallelize_module(block, self.device_mesh["tensor_parallel"], plan)
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def _own(kind: type[GoldyModule], **options: Any) -> Callable[[], L.LightningModule]:
    def made() -> L.LightningModule:
        module = kind(build("llama"), schedule={"name": "constant"}, **options)
        module.losses = []
        return module

    return made


@dataclass(frozen=True)
class Subject:
    """A callback that is tried.

    Args:
        make: Gives it, and those that it needs, itself the last; called with a file of a base and further options.
        module: A module that it needs, other than the strategy's.
        manner: Whether it runs together with others; if not, whether it must leave the training as it is too.
        unused: Whether its module has parameters that its loss does not use.
    """

    make: Callable[..., Sequence[L.Callback]]
    module: Callable[[], L.LightningModule] | None = None
    manner: Literal["together", "looks", "changes"] = "together"
    unused: bool = False


def _alone(kind: type, *arguments: Any, manner: Any = "together", **settings: Any) -> Subject:
    return Subject(lambda base, **at: [kind(*arguments, **settings, **at)], manner=manner)


_SCHEDULE = PruningSchedule(warmup_steps=0, steps_per_cycle=4, ramp_steps=1, cuts=1, regrow_at=2)
SUBJECTS: Mapping[str, Subject] = {
    "GoldenSnapshot": Subject(lambda base, **at: [GoldenSnapshot(base, **at)]),
    "GoldenParameters": _alone(GoldenParameters, n_samples=3, quorum=0.5),
    "ReverseGoldenParameters": _alone(ReverseGoldenParameters, 5.0, n_samples=4),
    "ParameterDistribution": Subject(
        lambda base, **at: [GoldenSnapshot(base, at=("start",)), ParameterDistribution(**at)]
    ),
    "TaylorDiff": Subject(
        lambda base, **at: [
            GoldenSnapshot(base, at=("start",)),
            TaylorDiff((1, 2), n_samples=3, by="tensor", **at),
        ]
    ),
    "AttentionTracker": _alone(AttentionTracker, n_samples=3),
    "BasinVolume": _alone(BasinVolume, 4, n_samples=3, cutoff=[1e-3, 1e-2]),
    "BasinVolume, adam": _alone(BasinVolume, 4, n_samples=3, preconditioner="best", name="adam", manner="looks"),
    "KnowledgeCoupling": Subject(
        lambda base, **at: [
            GoldenSnapshot(base, at=("start",)),
            KnowledgeCoupling(PIECES, edits=[PIECES[0].id], **at),
        ],
        manner="looks",
    ),
    "ChangeAttribution": Subject(
        lambda base, **at: [
            GoldenSnapshot(base, at=("start",)),
            ChangeAttribution(n_samples=4, shares=[0.1, 0.5], baselines=["random", "gradient"], **at),
        ],
    ),
    "ActivationDifferences": Subject(
        lambda base, **at: [GoldenSnapshot(base, at=("start",)), ActivationDifferences(positions=2, **at)],
    ),
    "CircuitTracker": Subject(
        lambda base, **at: [
            GoldenSnapshot(base, at=("start",)),
            CircuitTracker(n_pairs=3, sizes=[0.1, 0.5], n_random=1, **at),
        ],
        manner="looks",
    ),
    "HeadPlasticity": Subject(
        lambda base, **at: [HeadPlasticity(pruning_level=0.5, schedule=_SCHEDULE, scoring=Scoring(n_samples=3))],
        manner="changes",
    ),
    "VariantLosses": Subject(
        lambda base, **at: [VariantLosses(n_samples=3, **at)], _own(VariantsModule), "looks", unused=True
    ),
    "FinetuneComparison": Subject(
        lambda base, **at: [GoldenParameters(n_samples=3, quorum=0.5, at=("start",)), FinetuneComparison()],
        _own(GoldyModule, optimizer={"name": "masked_adamw", "mask": "golden"}),
        manner="changes",
    ),
    "RunReport": Subject(lambda base, **at: [GoldenSnapshot(base, **at), RunReport()]),
    "ExactResume": Subject(lambda base, **at: [ExactResume()], manner="changes"),
}


@dataclass(frozen=True)
class Strategy:
    """A strategy that callbacks are tried under.

    Args:
        ranks: Processes.
        make: Gives what the trainer is told.
        module: What is trained.
        stands: Whether it is one of this package's tests that stands for another.
    """

    ranks: int
    make: Callable[[], Any]
    module: type[L.LightningModule] = Llama
    stands: bool = False


_GLOO = {"process_group_backend": "gloo"}
_SHARDED = partial(ModelParallelStrategy, tensor_parallel_size=1)
STRATEGIES: Mapping[str, Strategy] = {
    "single": Strategy(1, lambda: "auto"),
    "DDP x 2": Strategy(2, partial(DDPStrategy, **_GLOO)),
    "DDP x 4": Strategy(4, partial(DDPStrategy, **_GLOO)),
    "DDP static graph": Strategy(2, partial(DDPStrategy, static_graph=True, **_GLOO)),
    "DDP spawn": Strategy(2, partial(DDPStrategy, start_method="spawn", **_GLOO)),
    "FSDP2 x 2": Strategy(2, partial(_SHARDED, data_parallel_size=2), Sharded),
    "FSDP2 x 4": Strategy(4, partial(_SHARDED, data_parallel_size=4), Sharded),
    "HSDP 2 x 2": Strategy(4, partial(_SHARDED, data_parallel_size=4), Hybrid),
    "tensor x data 2 x 2": Strategy(
        4, partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=2), TensorParallel
    ),
    "ZeRO 1": Strategy(2, partial(DeepSpeedStrategy, 1, **_GLOO), stands=True),
    "ZeRO 2": Strategy(2, partial(DeepSpeedStrategy, 2, **_GLOO), stands=True),
    "ZeRO 2, subclass": Strategy(2, partial(OwnDeepSpeed, 2, **_GLOO), stands=True),
    "ZeRO 3": Strategy(1, partial(DeepSpeedStrategy, 3, **_GLOO), stands=True),
    "ZeRO 3, subclass": Strategy(1, partial(OwnDeepSpeed, 3, **_GLOO), stands=True),
    "FSDP1": Strategy(1, partial(FSDPStrategy, "cpu"), stands=True),
    "FSDP1, subclass": Strategy(1, partial(SlowFSDP, "cpu"), stands=True),
}
SPAWNED = "DDP spawn"


class Recorder(L.Callback):
    """Writes what a training ended with; the processes that it ran in may be others than the one that asks."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        torch.save(trace(trainer, pl_module), f"{self.path}.{rank}")


def _train(
    folder: Path,
    strategy: Strategy,
    callbacks: Sequence[L.Callback],
    module: Any = None,
    *,
    unused: bool = False,
    **options: Any,
) -> list[dict]:
    """Trains, and gives what each rank ended with."""
    path = folder.with_suffix(".trace")
    settings = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, **options}
    external = strategy.ranks > 1 and dist.is_initialized() and strategy is not STRATEGIES[SPAWNED]
    plugins = [TorchElasticEnvironment()] if external else None
    made = strategy.make()
    if unused and type(made) is DDPStrategy:
        made._ddp_kwargs["find_unused_parameters"] = True
    fit(
        folder,
        [*callbacks, Recorder(path)],
        module=module or strategy.module,
        data=WordData(),
        strategy=made,
        devices=strategy.ranks,
        plugins=plugins,
        **settings,
    )
    if dist.is_initialized():
        dist.barrier()
    return [torch.load(f"{path}.{rank}", weights_only=False) for rank in range(strategy.ranks)]


def observe(name: str, folder: Path, base: Path) -> dict[str, Any]:
    """What each callback did: ``row`` of the start, ``differences`` of the training, or the ``error`` that refused it.

    Those that only look run together, and one by one where that fails.

    Args:
        name: Of a strategy.
        folder: Where the runs go.
        base: A file of a base.
    """
    strategy = STRATEGIES[name]
    together = [name for name, subject in SUBJECTS.items() if subject.manner == "together"]
    found: dict[str, Any] = {}
    plain: dict[Any, list[dict]] = {}
    groups = [together, *([key] for key in SUBJECTS if key not in together)]
    while groups:
        group = groups.pop(0)
        try:
            found |= _observed(group, folder / "-".join(group)[:60].replace(", ", "-"), strategy, base, plain)
        except Exception as error:  # noqa: BLE001 - every way to end is an entry
            if len(group) > 1:
                groups += [[key] for key in group]
            else:
                found[group[0]] = {"error": f"{type(error).__name__}: {error}"}
            print("FAILED", name, group, repr(error)[:300], flush=True)
    return found


def _observed(
    group: Sequence[str], run: Path, strategy: Strategy, base: Path, plain: dict[Any, list[dict]]
) -> dict[str, Any]:
    if group == ["ExactResume"]:
        return {"ExactResume": _resumed(run, strategy)}
    subjects = [SUBJECTS[name] for name in group]
    # A run at every step, beside the one whose rows are compared.
    at: dict[str, Any] = {"at": ("start",), **({} if subjects[0].manner == "changes" else {"every_n_steps": 1})}
    made = [subject.make(base, **at) for subject in subjects]
    known: dict[str, L.Callback] = {}
    for callback in (callback for callbacks in made for callback in callbacks):
        known.setdefault(getattr(callback, "name", type(callback).__name__), callback)
    traces = _train(run, strategy, list(known.values()), subjects[0].module, unused=subjects[0].unused)
    changed: list[str] = []
    if subjects[0].manner != "changes":
        key = subjects[0].module
        if key not in plain:
            plain[key] = _train(run.with_name(f"plain-{len(plain)}"), strategy, [], key, unused=subjects[0].unused)
        changed = sorted({part for pair in zip(plain[key], traces, strict=True) for part in differences(*pair)})
    return {
        name: {"row": _row_of(run, callbacks[-1]), "differences": changed}
        for name, callbacks in zip(group, made, strict=True)
    }


def _row_of(run: Path, callback: L.Callback) -> dict[str, Any]:
    if isinstance(callback, RunReport):
        return {"metrics": {"pages": len(list((run / "run").glob("report.html")))}, "cost": {}}
    name = getattr(callback, "name", None)
    line = (run / "run" / "goldy" / str(name) / "results.jsonl").read_text().splitlines()[0]
    return json.loads(line)


def _resumed(run: Path, strategy: Strategy) -> dict[str, Any]:
    """Whether a training goes on from an epoch's end as if it had not stopped."""
    options: dict[str, Any] = {"max_epochs": 2, "limit_train_batches": 2, "enable_checkpointing": True}

    def callbacks(folder: Path) -> list[L.Callback]:
        saver = ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
        return [ExactResume(), saver]

    whole = _train(run, strategy, callbacks(run / "saved"), **options)
    checkpoint = run / "saved" / "epoch=0.ckpt"
    again = _train(run.with_name("again"), strategy, callbacks(run / "saved-again"), ckpt_path=checkpoint, **options)
    changed, apart = set(), 0.0
    for first, second in zip(whole, again, strict=True):
        # DistributedDataParallel sums in another order in its first step, which three ranks or more can tell.
        close = {name: _apart(first[name], second[name]) for name in ("weights", "optimizer", "losses")}
        apart = max(apart, *close.values())
        changed |= set(differences(first, second)) - {name for name, value in close.items() if value < 1e-3}
    return {"row": {"metrics": {"agreement": 1.0 - apart}, "cost": {}}, "differences": sorted(changed)}


def _apart(first: list, second: list) -> float:
    """The largest difference of numbers that are kept as they are or as bytes of float32, of the largest of each."""
    pairs = [
        [np.frombuffer(value, np.float32) if isinstance(value, bytes) else np.array([value]) for value in pair]
        for pair in zip(first[-len(second) :], second, strict=True)
    ]
    return max(float(np.abs(one - other).max() / max(np.abs(one).max(), 1e-12)) for one, other in pairs if len(one))


def write_base(path: Path) -> Path:
    """A base that lies beside the model that every training starts from."""
    L.seed_everything(7, verbose=False)
    start = build("llama")
    generator, space = torch.Generator().manual_seed(1), ParameterSpace.of(start)
    values = {
        name: value.detach() + 0.01 * torch.randn(value.shape, generator=generator)
        for name, value in space.resolve(start).items()
    }
    save_vectors(path, ParameterVector(space, values), kind="values", model=start)
    return path


def observe_all(names: Sequence[str], folder: str, base: str) -> dict:
    """In a world of processes: what callbacks did under each of some strategies."""
    warnings.simplefilter("ignore")
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if size == 1:
        dist.destroy_process_group()
    found = {name: observe(name, Path(folder) / name.replace(" ", "-"), Path(base)) for name in names}
    if not dist.is_initialized():
        store = dist.FileStore(f"{folder}/again", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    return found


if __name__ == "__main__":
    # Lightning starts its own processes here, which begin by importing this file.
    warnings.simplefilter("ignore")
    target = Path(sys.argv[1])
    shutil.rmtree(target / "spawn", ignore_errors=True)
    result = observe(SPAWNED, target / "spawn", Path(sys.argv[2]))
    (target / "spawn.json").write_text(json.dumps(result))
