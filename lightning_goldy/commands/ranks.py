"""Processes that torchrun started: they share out the work of a command, of which the first one prints and writes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lightning_goldy.core.sharding import Replicas

_NEEDED = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE_SECONDS = 60.0
"""How long a process that has failed waits for the others, who may be inside a collective of a sharded model."""


@dataclass(frozen=True)
class Launch:
    """Which of several processes this is.

    Args:
        rank: Among all.
        size: Their number.
        local_rank: Among those of this machine.
        local_size: Their number.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def of(cls, environment: Mapping[str, str] | None = None) -> Launch | None:
        """What torchrun has told this process; None where it is alone.

        Args:
            environment: Variables by name; this process's by default.

        Raises:
            ValueError: Some of torchrun's variables are set, and others are not.

        Example:
            >>> told = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
            >>> Launch.of({**told, "MASTER_ADDR": "there", "MASTER_PORT": "29500"})
            Launch(rank=3, size=4, local_rank=1, local_size=2)
            >>> Launch.of({}) is None
            True
            >>> Launch.of(told)
            Traceback (most recent call last):
            ValueError: of torchrun's variables MASTER_ADDR and MASTER_PORT are missing; use it, or unset WORLD_SIZE=4
        """
        known = os.environ if environment is None else environment
        if "RANK" not in known or int(known.get("WORLD_SIZE", "1")) == 1:
            return None
        missing = [name for name in _NEEDED if name not in known]
        if missing:
            raise ValueError(
                f"of torchrun's variables {' and '.join(missing)} are missing; use it, or unset "
                f"WORLD_SIZE={known['WORLD_SIZE']}"
            )
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return cls(*(int(known[name]) for name in names))


@contextmanager
def joined_ranks(work: str) -> Iterator[Replicas]:
    """Joins the processes that torchrun started, and leaves printing to the first; alone nothing happens.

    Within, a process that fails is heard of by the others at their next exchange.

    Args:
        work: What is done, for the message.

    Yields:
        This process among all of them.

    Raises:
        ValueError: Some of torchrun's variables are missing.
        RankError: Another process has failed.
    """
    launch = Launch.of()
    if launch is None:
        yield Replicas()
        return
    begun = not dist.is_initialized()
    if begun:
        if torch.cuda.is_available():
            torch.cuda.set_device(launch.local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with ExitStack() as stack:
            ranks = Replicas.world()
            if ranks.rank:
                stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            stack.enter_context(ranks.together(work, patience=PATIENCE_SECONDS))
            yield ranks
    finally:
        if begun:
            dist.destroy_process_group()


def trainer_words(*, shard: bool) -> tuple[str, ...]:
    """How a trainer that only sets up is spread over the processes, in words of the command line.

    Args:
        shard: Whether parameters are spread over them too, rather than held whole by each.

    Raises:
        ValueError: There is one process to shard over.

    Example:
        >>> trainer_words(shard=False)
        ('--trainer.devices=1', '--trainer.num_nodes=1', '--trainer.strategy=auto')
    """
    launch = Launch.of()
    if launch is None:
        if shard:
            raise ValueError(
                "--shard spreads the model over several processes, and this is one: start it with torchrun "
                "--nproc-per-node N -m lightning_goldy.cli analyze ... --shard"
            )
        return "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto"
    strategy = "ddp"
    if shard:
        sizes = {"data_parallel_size": launch.size, "tensor_parallel_size": 1}
        kind = "lightning.pytorch.strategies.ModelParallelStrategy"
        strategy = json.dumps({"class_path": kind, "init_args": sizes})
    return (
        f"--trainer.devices={launch.local_size}",
        f"--trainer.num_nodes={launch.size // launch.local_size}",
        f"--trainer.strategy={strategy}",
    )
