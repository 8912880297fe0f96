"""Gradients of samples and of divergences, taken tensor by tensor as they arise, and the factors of linear layers'."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.divergence import AnchoredDivergence, Cache, divergence_sum, own_share, precise
from lightning_goldy.analysis.result import Cost
from lightning_goldy.core.batches import sample_count, take_samples
from lightning_goldy.core.naming import canonical_name, model_class
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.sharding import Replicas, align, is_sharded, like, local, unshard_guard
from lightning_goldy.core.vector import require_finite

# Elements of [rows, vocabulary] that are worked on at a time.
_CHUNK = 1 << 22


def only_these_require_gradients(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Spares the backward pass the gradients that nobody asks for; FSDP2 needs uniform groups and is left as it is."""
    if any(is_sharded(parameter) for parameter in model.parameters()):
        return
    chosen = {id(parameter) for parameter in parameters.values()}
    for parameter in model.parameters():
        if id(parameter) not in chosen:
            parameter.requires_grad_(False)


def backward(value: Tensor) -> None:
    """A backward pass, unless the value depends on nothing that requires a gradient: then there is none to make."""
    if value.requires_grad:
        value.backward()


@contextmanager
def streamed_gradients(parameters: Mapping[str, nn.Parameter], take: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Hands each gradient over as soon as it is complete, and frees it; FSDP2 does not run such hooks.

    What has no hook is left for :func:`taken_gradients`.

    Args:
        parameters: Name to parameter.
        take: Called with the name and this process's part of the gradient, in at least float32.
    """

    def taker(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            take(name, gradient_part(gradient, parameter))

        return hook

    with ExitStack() as hooks:
        for name, parameter in parameters.items() if not any(map(is_sharded, parameters.values())) else ():
            hooks.callback(parameter.register_post_accumulate_grad_hook(taker(name)).remove)
        yield


def taken_gradients(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """Name and this process's part of each gradient that there is, in at least float32; all gradients are cleared."""
    unshard_guard(model)
    for name, parameter in parameters.items():
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            yield name, gradient_part(gradient, parameter)
    for parameter in model.parameters():
        parameter.grad = None


def gradient_part(gradient: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a gradient of any layout, in at least float32."""
    dense = gradient.to_dense() if gradient.layout is torch.sparse_coo else gradient
    return precise(local(align(dense, parameter)))


def zeros_like_parts(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros of the shape of this process's part of each parameter, in at least float32."""
    return {
        name: torch.zeros_like(local(parameter), dtype=torch.promote_types(parameter.dtype, torch.float32))
        for name, parameter in parameters.items()
    }


def require_gradients(parameters: Mapping[str, Tensor], seen: Collection[str], replicas: Replicas) -> list[str]:
    """The parameters that no sample, of any replica, gave a gradient: theirs is zero, which a warning says.

    Raises:
        ValueError: No parameter received one.
    """
    device = local(next(iter(parameters.values()))).device
    voted = torch.tensor([name in seen for name in parameters], dtype=torch.int32, device=device)
    missing = [name for name, count in zip(parameters, replicas.sum_(voted).tolist(), strict=True) if not count]
    if len(missing) == len(parameters):
        raise ValueError(
            f"the objective depends on none of the {len(parameters)} selected parameters ({missing[0]}, ...): no "
            "sample gave one a gradient"
        )
    if missing:
        warnings.warn(
            f"the objective does not depend on {missing[0]} ({len(missing)} such parameters), whose gradient counts as "
            "zero; leave it out with exclude=",
            stacklevel=2,
        )
    return missing


class NotDifferentiableError(ValueError):
    """A gradient of a divergence is not finite."""


class SharedDivergence:
    r"""Mean divergence of the model from itself as it was at the anchor, its samples shared out over replicas.

    Args:
        model: The module, in evaluation mode.
        pieces: Batches, each one forward pass; the same on every rank.
        objective: Where the targets are.
        replicas: The ranks that share the pieces out.
        cache: Where the anchor's log-probabilities are kept.
        anchored: Whether the module is at the anchor at present; otherwise :meth:`anchor` is called before all else.

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
        anchored: bool = True,
    ) -> None:
        self.n_samples = sum(map(sample_count, pieces))
        """Samples of all ranks."""
        self.cost = Cost()
        """Passes made so far."""
        # Without a cache the anchor runs again beside the model.
        self._runs = 2 if cache == "none" else 1
        self.pieces = list(own_share(pieces, model, replicas, None))
        """This rank's share, on the model's device."""
        self.replicas = replicas
        self._device = next(model.parameters()).device
        self._objective, self._cache = objective, cache
        self._held: _Held | None = None
        self.positions = 0
        """Target positions of all ranks."""
        if anchored:
            self.anchor(model)

    def anchor(self, model: nn.Module) -> None:
        """Takes the present model for the one that divergences are from."""
        self.cost += Cost(forwards=self.n_samples)
        # A rank may have no piece, and then only takes part in the sums.
        self._held = _Held(model, self.pieces, self._objective, cache=self._cache) if self.pieces else None
        self.positions = round(self._sum(self._held.positions if self._held else 0))

    def __call__(self, model: nn.Module) -> float:
        """The mean divergence, nats.

        Raises:
            ValueError: It is not finite.
        """
        self.cost += Cost(forwards=self._runs * self.n_samples)
        return self._mean(self._held(model) * self._held.positions if self._held else 0.0)

    def gradients(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], *, measured: bool = True, sign: int = 1
    ) -> tuple[float, dict[str, Tensor]]:
        """The mean divergence, nats (0 where it need not be measured), and its gradient, this process's part of each.

        Args:
            model: The module, moved from the anchor.
            parameters: Name to parameter.
            measured: Whether the divergence is wanted.
            sign: What the gradient is multiplied by: 1, or -1 for the way down.

        Raises:
            NotDifferentiableError: The gradient is not finite, on every rank.
            ValueError: The divergence is not.
        """
        self.cost += Cost(forwards=self._runs * self.n_samples, backwards=self.n_samples)
        sums, total = self._summed(model, parameters, measured)
        for gradient in sums.values():
            self.replicas.sum_(gradient)
        laid_out = {name: like(parameters[name].detach(), part) for name, part in sums.items()}
        try:
            require_finite(laid_out, "gradients of the divergence")
        except ValueError as error:
            raise NotDifferentiableError(str(error)) from None
        return self._mean(total), {name: gradient.div_(sign * self.positions) for name, gradient in sums.items()}

    def _summed(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], measured: bool
    ) -> tuple[dict[str, Tensor], float]:
        """This process's summed gradient, and its sum."""
        pieces, total = self._held.each_backward(model, measured=measured) if self._held else iter(()), 0.0
        if not any(is_sharded(part) or part.dtype.itemsize < 4 for part in parameters.values()):
            # Gradients add up where they arise, and are held once.
            total = sum(pieces, 0.0)
            found = dict(taken_gradients(model, parameters))
            return {
                name: found[name] if name in found else torch.zeros_like(p) for name, p in parameters.items()
            }, total
        sums = zeros_like_parts(parameters)

        def add(name: str, gradient: Tensor) -> None:
            sums[name] += gradient

        with streamed_gradients(parameters, add):
            for value in pieces:
                total += value
                for name, gradient in taken_gradients(model, parameters):
                    add(name, gradient)
        return sums, total

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
    return [
        take_samples(batch, slice(start, start + size))
        for batch in batches
        for start in range(0, sample_count(batch), size)
    ]


class _Held(AnchoredDivergence):
    """Adds backward passes batch by batch."""

    def each_backward(self, model: nn.Module, *, measured: bool = True) -> Iterator[float]:
        """Leaves the gradient of each batch's summed divergence in the parameters, and gives that sum, nats.

        Args:
            model: The module, moved from the anchor.
            measured: Whether the sums are wanted; otherwise they are 0.
        """
        for index, batch in enumerate(self.batches):
            # Before the forward pass, because without a cache the anchor's weights take the model's place meanwhile.
            with torch.no_grad():
                anchor = self._anchor_log_probs(model, index)
            logits = self.objective.logits_and_targets(model, batch).logits
            logits.backward(divergence_gradient(anchor, logits))
            yield divergence_sum(anchor, logits.detach()) if measured else 0.0


# Elements of the cumulated probabilities held at a time, float64.


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
