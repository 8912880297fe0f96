"""How far a model moves from what it said: the divergence over samples that replicas share, and its gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.divergence import AnchoredDivergence, Cache, divergence_sum
from lightning_goldy.analysis.golden.golden import taken_gradients, zeros_like_parts
from lightning_goldy.analysis.result import Cost
from lightning_goldy.core.batches import batch_tensors, map_batch
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.sharding import Replicas, like
from lightning_goldy.core.vector import require_finite

# Elements of [rows, vocabulary] that are worked on at a time.
_CHUNK = 1 << 22


class SharedDivergence:
    r"""Mean divergence of the model from itself as it was when this was made, its samples shared out over replicas.

    Args:
        model: The module at the anchor, in evaluation mode.
        pieces: Batches, each one forward pass; the same on every rank.
        objective: Where the targets are.
        replicas: The ranks that share the pieces out.
        cache: Where the anchor's log-probabilities are kept.

    Example:
        >>> from lightning_goldy.core.objective import ClassifierObjective
        >>> piece = (torch.ones(1, 2), torch.tensor([0]))
        >>> SharedDivergence(nn.Linear(2, 3), [piece], ClassifierObjective(), Replicas()).positions
        1
    """

    def __init__(
        self,
        model: nn.Module,
        pieces: Sequence[Any],
        objective: Objective,
        replicas: Replicas,
        *,
        cache: Cache = "auto",
    ) -> None:
        device = next(model.parameters()).device
        self.n_samples = sum(len(next(batch_tensors(piece))) for piece in pieces)
        """Samples of all ranks."""
        self.cost = Cost(forwards=self.n_samples)
        """Passes made so far."""
        # Without a cache the anchor runs again beside the model.
        self._runs = 2 if cache == "none" else 1
        self.pieces = [map_batch(piece, lambda tensor: tensor.to(device)) for piece in replicas.share(pieces)]
        """This rank's share, on the model's device."""
        self.replicas = replicas
        self._device = device
        # A rank may have no piece, and then only takes part in the sums.
        self._held = _Held(model, self.pieces, objective, cache=cache) if self.pieces else None
        self.positions = round(self._sum(self._held.positions if self._held else 0))
        """Target positions of all ranks."""

    def __call__(self, model: nn.Module) -> float:
        """The mean divergence, nats.

        Raises:
            ValueError: It is not finite.
        """
        self.cost += Cost(forwards=self._runs * self.n_samples)
        return self._mean(self._held(model) * self._held.positions if self._held else 0.0)

    def gradients(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> tuple[float, dict[str, Tensor]]:
        """The mean divergence, nats, and its gradient, this process's part of each in float32.

        Raises:
            ValueError: One of them is not finite.
        """
        self.cost += Cost(forwards=self._runs * self.n_samples, backwards=self.n_samples)
        sums, total = zeros_like_parts(parameters), 0.0
        for value in self._held.backward(model) if self._held else ():
            total += value
            for name, gradient in taken_gradients(model, parameters):
                sums[name] += gradient
        for gradient in sums.values():
            self.replicas.sum_(gradient)
        laid_out = {name: like(parameters[name].detach(), part) for name, part in sums.items()}
        require_finite(laid_out, "gradients of the divergence")
        return self._mean(total), {name: gradient.div_(self.positions) for name, gradient in sums.items()}

    def _mean(self, total: float) -> float:
        mean = self._sum(total) / self.positions
        if not abs(mean) < float("inf"):
            raise ValueError(f"the divergence of the masked model is {mean} nats: its outputs are not finite")
        return mean

    def _sum(self, value: float) -> float:
        # Backends of accelerators without float64 still take part in sums on their own terms.
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        return float(self.replicas.sum_(torch.tensor(value, dtype=dtype, device=self._device)))


def divergence_gradient(log_probs: Tensor, logits: Tensor) -> Tensor:
    r"""Gradient of the sum over rows of KL(p || softmax(logits)) with respect to the logits, which is q - p.

    Args:
        log_probs: log p, shape ``[rows, vocabulary]``, any device and dtype.
        logits: Shape ``[rows, vocabulary]``.

    Returns:
        Shape and dtype of the logits.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> divergence_gradient(torch.tensor([[1.0, 0.0]]).log(), logits).tolist()
        [[-0.5, 0.5]]
    """
    found = torch.empty_like(logits)
    rows = max(1, _CHUNK // logits.shape[-1])
    for start in range(0, len(logits), rows):
        part = logits[start : start + rows].detach()
        dtype = torch.promote_types(part.dtype, torch.float32)
        q = torch.softmax(part, dim=-1, dtype=dtype)
        found[start : start + rows] = q - log_probs[start : start + rows].to(part.device, dtype).exp()
    return found


def pieces_of(batches: Sequence[Any], size: int | None) -> list[Any]:
    """Cuts batches into pieces of at most ``size`` samples, which never span two batches.

    Example:
        >>> [len(piece["x"]) for piece in pieces_of([{"x": torch.zeros(5, 2)}], 2)]
        [2, 2, 1]
    """
    if size is None:
        return list(batches)
    pieces = []
    for batch in batches:
        length = len(next(batch_tensors(batch)))
        for start in range(0, length, size):
            pieces.append(map_batch(batch, lambda tensor, at=slice(start, start + size): tensor[at]))  # type: ignore[misc]
    return pieces


class _Held(AnchoredDivergence):
    """Adds the backward pass."""

    def backward(self, model: nn.Module) -> Iterator[float]:
        """Leaves the gradient of each batch's summed divergence in the parameters, and gives that sum, nats."""
        for index, batch in enumerate(self.batches):
            # Before the forward pass, because without a cache the anchor's weights take the model's place meanwhile.
            with torch.no_grad():
                anchor = self._anchor_log_probs(model, index)
            logits = self.objective.logits_and_targets(model, batch).logits
            logits.backward(divergence_gradient(anchor, logits))
            yield divergence_sum(anchor, logits.detach())
