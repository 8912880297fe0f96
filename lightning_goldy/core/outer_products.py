"""What a pass over a batch tells of each linear layer: outer products of its inputs and of its outputs' gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.core.naming import canonical_name, model_class
from lightning_goldy.core.sharding import is_sharded

# Elements of the cumulated probabilities held at a time, float64.
_CHUNK = 1 << 22


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Matrix products in full float32, whatever a training has asked for, and without autocast or gradients.

    Rounded to fewer bits, the steep directions of a curvature would leak into the flat ones.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    with torch.no_grad(), torch.autocast(device.type, enabled=False), ExitStack() as stack:
        # Asking for the precision of all backends together fails once a user has set that of one.
        for backend in backends:
            asked = getattr(backend, "fp32_precision", "none")
            if asked not in ("none", "ieee"):
                stack.callback(setattr, backend, "fp32_precision", asked)
                backend.fp32_precision = "ieee"
        if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield


def sampled_labels(logits: Tensor, seed: int) -> Tensor:
    """One label per row, drawn from the softmax by inverting its cumulative distribution.

    Args:
        logits: Shape ``[N, V]``.
        seed: Decides the labels, on any device.

    Returns:
        Shape ``[N]``, integers.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64, device="cpu").to(logits.device)
    rows = max(1, _CHUNK // logits.shape[1])
    labels = []
    for part, points in zip(logits.detach().split(rows), uniform.split(rows), strict=True):
        cumulated = part.double().softmax(dim=-1).cumsum(dim=-1)  # [rows, V]
        # To the right of equal values, so that a label of probability 0 is never drawn.
        labels.append(torch.searchsorted(cumulated, points * cumulated[:, -1:], right=True))
    return torch.cat(labels).squeeze(1).clamp_(max=logits.shape[1] - 1)


class LayerSums:
    """Sums of outer products of one layer's inputs and of the gradients at its outputs.

    Args:
        name: Canonical name of the weight.
        module: The layer.
        shape: Global shape of the weight.
        device: Where the sums are held.
        largest: A side wider than this is summed as a diagonal.
    """

    def __init__(self, name: str, module: nn.Module, shape: torch.Size, device: torch.device, largest: int) -> None:
        self.name, self.module = name, module
        self.inputs_first = not isinstance(module, nn.Linear)
        self.widths = tuple(shape) if self.inputs_first else tuple(shape)[::-1]  # (in, out)
        self.inputs, self.outputs = (
            torch.zeros((width,) if width > largest else (width, width), dtype=torch.float32, device=device)
            for width in self.widths
        )
        self.positions = torch.zeros((), dtype=torch.float64, device=device)

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """A forward hook: keeps the inputs until the gradients at the outputs come.

        Raises:
            ValueError: The layer is split over processes.
        """
        given = args[0] if args else next(iter(kwargs.values()))
        if is_sharded(given) or (given.shape[-1], output.shape[-1]) != self.widths:
            raise ValueError(
                f"the layer of {self.name} sees inputs and outputs of shape {tuple(given.shape)} and "
                f"{tuple(output.shape)} where its weight is {self.widths[0]} to {self.widths[1]}; under tensor "
                "parallelism no process sees a layer whole: use FSDP2"
            )
        if output.requires_grad:
            given = given.detach()
            output.register_hook(lambda gradient: self._add(given, gradient))

    def _add(self, given: Tensor, gradient: Tensor) -> None:
        a, g = given.reshape(-1, self.widths[0]), gradient.detach().reshape(-1, self.widths[1])  # [positions, width]
        # A position that bears on no target, such as padding, has no part in the means.
        kept = (g != 0).any(dim=1)
        with exact_products(g.device):
            for total, rows in ((self.inputs, a[kept].float()), (self.outputs, g[kept].float())):
                if total.ndim == 1:
                    total += rows.square().sum(dim=0)
                else:
                    total.addmm_(rows.T, rows)
        self.positions += kept.sum()


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by the name of their weight, without those whose weight serves elsewhere too."""
    modules = list(model.named_modules())
    uses = Counter(id(parameter) for _, module in modules for parameter in module._parameters.values())
    return {
        canonical_name(f"{path}.weight" if path else "weight"): module
        for path, module in modules
        if (isinstance(module, nn.Linear) or model_class(module) == "Conv1D")
        and (weight := module._parameters.get("weight")) is not None
        and weight.ndim == 2
        and uses[id(weight)] == 1
    }
