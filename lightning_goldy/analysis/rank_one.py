"""The rank-one editor: one MLP output projection, changed in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.editors import EditRequest, register_editor, require_count, require_positive
from lightning_goldy.analysis.projection_keys import added_to, by_token, key_covariance, key_position, seen_by
from lightning_goldy.core.architecture import UnsupportedArchitectureError, describe_architecture
from lightning_goldy.core.assembly import is_projection
from lightning_goldy.core.blocks import NamedModule
from lightning_goldy.core.naming import model_class
from lightning_goldy.core.objective import CausalLMObjective
from lightning_goldy.core.space import ParameterSpace

# Below this smallest eigenvalue of the keys' correlations, two edits ask different outputs of one key.
_DEPENDENT = 1e-10


def rank_one_update(keys: Tensor, changes: Tensor, covariance: Tensor) -> Tensor:
    r"""The smallest change of a matrix that changes its products with keys as asked.

    .. math:: \Delta W = \frac{z \, (C^{-1} k)^\top}{k^\top C^{-1} k}, \qquad \text{in general} \quad
        \Delta W = Z^\top (K C^{-1} K^\top)^{-1} K C^{-1}

    Of all :math:`\Delta W` with :math:`\Delta W k_i = z_i` it has the least
    :math:`\mathrm{tr}(\Delta W C \Delta W^\top)`, which is the mean squared change of the products with keys of second
    moment C. Its rank is the number of keys.

    Args:
        keys: K, shape ``[n, d_in]``.
        changes: Z, shape ``[n, d_out]``.
        covariance: C, shape ``[d_in, d_in]``, positive definite.

    Returns:
        Shape ``[d_out, d_in]``, float64.

    Raises:
        ValueError: The covariance is not positive definite, or the keys are not linearly independent.

    Source: Meng et al., "Locating and Editing Factual Associations in GPT" (2022), equation 2; several keys as in
        Bau et al., "Rewriting a Deep Generative Model" (2020).

    Example:
        >>> rank_one_update(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]]), torch.eye(2)).tolist()
        [[3.0, 0.0]]
    """
    return _update(keys.double(), changes.double(), _cholesky(covariance.double()))


@register_editor("rank_one")
@dataclass(frozen=True)
class RankOneEditor:
    r"""Writes the new answer into one MLP output projection, as ROME does.

    The key k is the projection's input at the subject's last token (the prompt's last token where the subject is not
    known). Adam finds the change z of its output there that makes the new answer likely,

    .. math:: \min_z \; -\log p(a' \mid q; z) + \lambda \, \lVert z \rVert^2 / \lVert W k \rVert^2, \qquad
        \lVert z \rVert \le c \, \lVert W k \rVert

    and :func:`rank_one_update` changes W so that the output at k is Wk + z. Several edits at once make a change whose
    rank is their number. Unlike the published method this takes the key from one prompt, without random prefixes, and
    restrains z by its norm alone, without a divergence on other prompts.

    Args:
        learning_rate: Of Adam on z, in units of the output's root mean square.
        steps: Of Adam.
        layer: Index of the block; a third of the way up by default.
        weight_decay: lambda, nats.
        largest: c, at most so many times the output's norm.
        damping: Added to C's diagonal, as a multiple of its mean.
        batches: Where C is taken from, the mean of k k' over all tokens; the pieces of the run by default.

    Raises:
        ValueError: A number is out of range.

    Source: Meng et al., "Locating and Editing Factual Associations in GPT" (2022).

    Example:
        >>> RankOneEditor(damping=0)
        Traceback (most recent call last):
        ValueError: damping must be a positive number; got 0
    """

    learning_rate: float = 0.5
    steps: int = 20
    layer: int | None = None
    weight_decay: float = 0.1
    largest: float = 4.0
    damping: float = 0.01
    batches: Sequence[Mapping[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        for name in ("learning_rate", "largest", "damping"):
            require_positive(name, getattr(self, name))
        require_count("steps", self.steps)
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must be at least 0; got {self.weight_decay}")

    def projection(self, model: nn.Module) -> NamedModule:
        """The MLP output projection of the layer, as its block calls it.

        Raises:
            ValueError: There is no such layer.
            UnsupportedArchitectureError: The projection cannot be told.
        """
        blocks = describe_architecture(model).blocks
        index = len(blocks) // 3 if self.layer is None else self.layer
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(blocks):
            raise ValueError(f"layer must be a block from 0 to {len(blocks) - 1}; got {index!r}")
        return blocks[index].mlp_output_part

    def space(self, model: nn.Module) -> ParameterSpace:
        """The projection's weight, also where it is frozen under adapters."""
        part = self.projection(model)
        base = getattr(part.module, "base_layer", part.module)
        weight = base._parameters.get("weight")
        if not is_projection(part.module) or weight is None or weight.ndim != 2 or not weight.is_floating_point():
            raise UnsupportedArchitectureError(
                f"rank_one changes the weight of a Linear or Conv1D; {part.name!r} is a {model_class(base)} whose "
                "weight is packed, parametrized or missing"
            )
        name = f"{part.name}.weight" if base is part.module else f"{part.name}.base_layer.weight"
        return ParameterSpace((name,), (weight.shape,), (weight.dtype,))

    def edit(self, model: nn.Module, request: EditRequest) -> None:
        """Finds keys and values and changes the weight, rounded once."""
        module = self.projection(model).module
        if "factor" not in request.kept:
            batches = request.context if self.batches is None else self.batches
            request.kept["factor"] = _cholesky(key_covariance(model, module, batches, damping=self.damping))
        rows = torch.arange(len(request.samples))
        places = rows, torch.tensor([key_position(request, index) for index in range(len(request.samples))])
        with torch.no_grad(), seen_by(module) as seen:
            CausalLMObjective().log_probs(model, request.batch)
        given, made = (by_token(part, request.batch)[places].double() for part in seen)  # [n, d_in], [n, d_out]
        changes = self._changes(model, module, request, places, made)
        update = _update(given, changes, request.kept["factor"])
        (weight,) = request.space.resolve(model).values()
        if not isinstance(getattr(module, "base_layer", module), nn.Linear):
            update = update.T  # Conv1D keeps its weight as in x out
        with torch.no_grad():
            weight.copy_(weight.double() + update)

    def _changes(
        self, model: nn.Module, module: nn.Module, request: EditRequest, places: tuple[Tensor, Tensor], made: Tensor
    ) -> Tensor:
        """z, shape ``[n, d_out]``, float64: the best on the way, so never worse than no change."""
        width = made.shape[1]
        # In units of the output's root mean square, so that a learning rate fits models of any scale.
        unit = made.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / math.sqrt(width)  # [n, 1]
        scaled = torch.zeros_like(made, requires_grad=True)
        optimizer = torch.optim.Adam([scaled], lr=self.learning_rate)
        best, least = torch.zeros_like(made), math.inf
        for step in range(self.steps + 1):
            with added_to(module, request.batch, places, scaled * unit):
                log_prob = request.log_prob(model)
            loss = self.weight_decay * scaled.square().mean() - log_prob
            (scaled.grad,) = torch.autograd.grad(loss, [scaled])
            if step == 0 and not bool(scaled.grad.any()):
                raise ValueError(
                    "the output of the edited projection has no effect on the answer: in the last block only the "
                    "prompt's last token has one; choose a lower layer"
                )
            if (value := float(loss.detach())) < least:
                best, least = (scaled * unit).detach().clone(), value
            optimizer.step()
            with torch.no_grad():
                norm = scaled.norm(dim=1, keepdim=True).clamp_min(torch.finfo(scaled.dtype).tiny)
                scaled.mul_((self.largest * math.sqrt(width) / norm).clamp_max(1.0))
        return best


def _cholesky(covariance: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed):
        raise ValueError("the covariance of the keys is not positive definite: raise the damping")
    return factor


def _update(keys: Tensor, changes: Tensor, factor: Tensor) -> Tensor:
    solved = torch.cholesky_solve(keys.T, factor)  # C^-1 K', [d_in, n]
    products = keys @ solved  # [n, n]
    size = products.diagonal().sqrt()
    if not bool((size > 0).all()) or float(torch.linalg.eigvalsh(products / (size * size[:, None]))[0]) < _DEPENDENT:
        raise ValueError(
            "the keys of the edits are not linearly independent, so no matrix gives each its own output: a key is "
            "zero, or two edits share their prompt up to the subject's last token"
        )
    return changes.T @ torch.linalg.solve(products, solved.T)  # [d_out, n] @ [n, d_in]
