"""Votes per element, cast while gradients are produced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.scores import SCORES
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.selection import select_largest
from lightning_goldy.core.sharding import Replicas, align, is_sharded, like, local, sum_over_shards
from lightning_goldy.core.vector import elements_in

Scope = Literal["tensor", "global"]


class Ballot:
    """Votes per element, filled while gradients are produced."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], top_k_percent: float, score: str, scope: Scope, n_samples: int
    ) -> None:
        self.parameters = parameters
        self.score = SCORES[score]
        self.scope = scope
        self.counts = [elements_in(top_k_percent, p.numel()) for p in parameters.values()]
        self.total = elements_in(top_k_percent, sum(p.numel() for p in parameters.values()))
        # A byte holds the votes of 255 samples, a short those of 32,767.
        dtype = torch.uint8 if n_samples < 256 else torch.int16 if n_samples < 32768 else torch.int32
        self.votes = {name: torch.zeros_like(local(p), dtype=dtype) for name, p in parameters.items()}
        self.seen: set[str] = set()
        self.streaming = scope == "tensor" and not any(is_sharded(p) for p in parameters.values())

    def collecting(self, model: nn.Module) -> ExitStack:
        """Hooks that turn each gradient into votes as soon as it is complete, where that is possible.

        FSDP2 writes sharded gradients without running such hooks, and a global selection needs all gradients at once.
        """
        stack = ExitStack()
        if not any(is_sharded(parameter) for parameter in model.parameters()):
            chosen = {id(parameter) for parameter in self.parameters.values()}
            for parameter in model.parameters():
                if id(parameter) not in chosen and parameter.requires_grad:
                    parameter.requires_grad_(False)
        if self.streaming:
            for (name, parameter), k in zip(self.parameters.items(), self.counts, strict=True):

                def hook(parameter: Tensor, name: str = name, k: int = k) -> None:
                    self._mark([name], k)

                handle = parameter.register_post_accumulate_grad_hook(hook)
                stack.callback(handle.remove)
        return stack

    def vote(self, objective: Objective, model: nn.Module, sample: Any) -> None:
        """One forward and backward pass, whose gradients become votes."""
        before = set(self.seen)
        self.seen.clear()
        objective.log_probs(model, sample).mean().backward()
        names = list(self.parameters)
        if self.scope == "global":
            self._mark(names, self.total)
        else:
            for name, k in zip(names, self.counts, strict=True):
                if name not in self.seen:
                    self._mark([name], k)
        self.seen |= before
        for parameter in model.parameters():
            parameter.grad = None

    def _mark(self, names: Sequence[str], k: int) -> None:
        scores = []
        for name in names:
            parameter = self.parameters[name]
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                self.seen.add(name)
            scores.append(self._scores(gradient, parameter))
        self._require_finite(names, scores)
        for name, mask in zip(names, select_largest(scores, k), strict=True):
            # Booleans are bytes of 0 and 1; seen as such, the addition is vectorised.
            self.votes[name].add_(mask.view(torch.uint8))

    def _scores(self, gradient: Tensor | None, parameter: nn.Parameter) -> Tensor:
        value = local(parameter)
        dtype = torch.promote_types(value.dtype, torch.float32)
        if gradient is None:
            part = torch.zeros_like(value, dtype=dtype)
        else:
            dense = gradient.to_dense() if gradient.layout is torch.sparse_coo else gradient
            part = self.score(local(align(dense, parameter)).to(dtype), value.to(dtype))
        return like(parameter.detach(), part)

    def _require_finite(self, names: Sequence[str], scores: Sequence[Tensor]) -> None:
        # The largest element is NaN when any is: one pass, and no second tensor.
        largest = [part.amax() if part.numel() else part.new_zeros(()) for part in map(local, scores)]
        flags: Sequence[Tensor | bool] = [not math.isfinite(value) for value in largest]
        if any(map(is_sharded, scores)):
            # Summed over shards, so that all processes raise and none is left waiting in the selection.
            partial = [torch.tensor(int(flag), device=value.device) for flag, value in zip(flags, largest, strict=True)]
            flags = sum_over_shards(partial, scores)
        for name, broken in zip(names, flags, strict=True):
            if broken:
                raise ValueError(f"the gradient of {name} is not finite; its elements cannot be ranked")

    def totals(self, replicas: Replicas) -> dict[str, Tensor]:
        """Votes summed over the replicas, in the layout of the parameters."""
        voted = torch.tensor([name in self.seen for name in self.parameters], dtype=torch.int32)
        device = next(iter(self.votes.values())).device
        missing = (replicas.sum_(voted.to(device)) == 0).nonzero().flatten().tolist()
        if missing:
            name = list(self.parameters)[missing[0]]
            raise ValueError(
                f"the objective does not depend on {name} ({len(missing)} such parameters): no sample gave it a "
                "gradient; leave it out with exclude="
            )
        totals = {}
        for name, votes in self.votes.items():
            # Process groups do not sum shorts.
            summable = votes.int() if votes.dtype == torch.int16 and replicas.size > 1 else votes
            totals[name] = like(self.parameters[name].detach(), replicas.sum_(summable))
        return totals

    def shares(self) -> list[float]:
        """Share of each tensor that a sample marks, or would be expected to mark at random, a fraction."""
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        if self.scope == "global":
            return [self.total / sum(sizes)] * len(sizes)
        return [count / size for count, size in zip(self.counts, sizes, strict=True)]
