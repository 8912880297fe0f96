"""Kronecker-factored preconditioners the slow way: one position after another, dense matrices, float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x).tanh()))


def least_likely(logits, seed):
    """Labels that depend on a row alone, so that batches may be cut differently."""
    return logits.argmin(dim=-1)


def split_tensors(batch, size):
    """Batches of ``size`` samples."""
    return zip(*(tensor.split(size) for tensor in batch), strict=True)


def second_moments(
    model: nn.Module, layers: Mapping[str, nn.Module], losses: Sequence[Callable[[nn.Module], Tensor]]
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """Sums over positions of a a^T / positions and of g g^T, and of each parameter's squared gradient.

    Args:
        model: Put into evaluation mode.
        layers: Linear layers by the name of their weight.
        losses: Each gives the summed negative log-probability of one sample's drawn labels.
    """
    model.eval()
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    gradients: dict[str, list[Tensor]] = {name: [] for name in layers}
    squares = dict.fromkeys(dict(model.named_parameters()), 0.0)
    for loss in losses:
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(module, args, output, seen=seen):
            name = next(each for each, layer in layers.items() if layer is module)
            output.retain_grad()
            seen[name] = (args[0].detach(), output)

        handles = [layer.register_forward_hook(keep) for layer in layers.values()]
        model.zero_grad()
        loss(model).backward()
        for handle in handles:
            handle.remove()
        for name, (given, output) in seen.items():
            inputs[name] += list(given.reshape(-1, given.shape[-1]))
            gradients[name] += list(output.grad.reshape(-1, output.shape[-1]))
    factors = {}
    for name in layers:
        pairs = [
            (a.double(), g.double()) for a, g in zip(inputs[name], gradients[name], strict=True) if float(g.abs().max())
        ]
        first = sum(torch.outer(a, a) for a, _ in pairs) / len(pairs)
        factors[name] = (first, sum(torch.outer(g, g) for _, g in pairs))
    # All samples together: gradients of drawn labels add up.
    model.zero_grad()
    sum(loss(model) for loss in losses).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            squares[name] = math.fsum((parameter.grad.double() ** 2).flatten().tolist())
    model.zero_grad()
    return factors, squares


def inverse_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix.double())
    return vectors @ torch.diag(values**-0.5) @ vectors.T


def dense_blocks(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    means: Mapping[str, float],
    shapes: Mapping[str, torch.Size],
    damping: float,
    inputs_first: bool = False,
) -> Tensor:
    """The block-diagonal matrix of determinant 1 that maps a flat direction.

    Args:
        factors: A and G of each factored weight, whose product is its Fisher information.
        means: Mean squared gradient of the other parameters.
        shapes: Of all parameters, in order.
        damping: Absolute.
        inputs_first: Whether weights are stored as in x out.
    """
    blocks = []
    for name, shape in shapes.items():
        if name in factors:
            a, g = (matrix.double() for matrix in factors[name])
            pi = math.sqrt(float(a.trace() / len(a)) / float(g.trace() / len(g)))
            a_root = inverse_root(a + pi * math.sqrt(damping) * torch.eye(len(a)))
            g_root = inverse_root(g + math.sqrt(damping) / pi * torch.eye(len(g)))
            blocks.append(torch.kron(a_root, g_root) if inputs_first else torch.kron(g_root, a_root))
        else:
            blocks.append(torch.eye(math.prod(shape), dtype=torch.float64) / math.sqrt(means[name] + damping))
    dense = torch.block_diag(*blocks)
    return dense / math.exp(float(torch.linalg.slogdet(dense).logabsdet) / len(dense))
