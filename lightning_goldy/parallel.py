"""Sharding a model over processes with FSDP2, and gathering it again."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_goldy.core.sharding import gather, is_sharded


def shard_blocks(model: nn.Module, mesh: Any) -> None:
    """Shards each block, then the rest, over the ``data_parallel`` dimension of a mesh; again is harmless.

    Args:
        model: Changed in place.
        mesh: What Lightning's ``ModelParallelStrategy`` gives, with ``data_parallel`` and ``tensor_parallel``.

    Raises:
        ValueError: The mesh also splits tensors, for which there is no plan here.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    tensor_parallel = mesh["tensor_parallel"].size()
    if tensor_parallel > 1:
        raise ValueError(
            f"the strategy splits tensors over {tensor_parallel} devices, but the model is sharded over data_parallel "
            "only; use ModelParallelStrategy(data_parallel_size=<devices>, tensor_parallel_size=1)"
        )
    if isinstance(model, FSDPModule):
        return
    for block in repeated_blocks(model):
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model declares indivisible, or else the children of its longest list of modules.

    Example:
        >>> [type(block).__name__ for block in repeated_blocks(nn.Sequential(nn.Linear(1, 1), nn.ReLU()))]
        ['Linear']
    """
    declared = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in declared]
    if not blocks:
        lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
        blocks = list(max(lists, key=len).children()) if lists else []
    return [block for block in blocks if block is not model and next(block.parameters(), None) is not None]


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights by name; a collective when the model is sharded.

    Example:
        >>> sorted(full_state_dict(nn.Linear(1, 1)))
        ['bias', 'weight']
    """
    return {name: gather(value) if is_sharded(value) else value for name, value in model.state_dict().items()}
