"""How important each attention head is: strategies by name, to which users add."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_goldy.analysis.head_probe import HeadProbe
from lightning_goldy.core.naming import suggestion
from lightning_goldy.core.registry import Registry

HeadScore = Callable[[HeadProbe], Tensor]
"""``score(probe)``: shape ``[layers, heads]``; larger is more important. Cut heads are those of the smallest scores."""

HEAD_SCORES: Registry[HeadScore] = Registry("head score")
register_head_score = HEAD_SCORES.register

DEFAULT_WEIGHTS = {"entropy": 0.5, "magnitude": 0.5}
"""What ``combined`` weighs its two scores with, fractions."""


@register_head_score("entropy")
def entropy(probe: HeadProbe) -> Tensor:
    """One minus the normalised entropy of the attention rows: heads that look somewhere count, uniform ones do not.

    Source: Voita et al. 2019, "Analyzing Multi-Head Self-Attention", section 5 (confident heads).
    """
    return 1 - probe.entropy()


@register_head_score("magnitude")
def magnitude(probe: HeadProbe) -> Tensor:
    r"""Gradient of the loss in the gate, :math:`\mathbb E_i |\partial L_i / \partial \xi_h|`.

    Source: Michel et al. 2019, "Are Sixteen Heads Really Better than One?", section 4.1.
    """
    return probe.magnitude()


@register_head_score("combined")
def combined(probe: HeadProbe) -> Tensor:
    r"""Weighted sum of standardised scores, :math:`\sum_s w_s (s_h - \mathrm{mean}\, s) / \mathrm{std}\, s`.

    The probe's ``weights`` name any registered strategies; by default entropy and magnitude count the same.
    """
    weights = probe.weights or DEFAULT_WEIGHTS
    total = torch.zeros(probe.shape, dtype=torch.float64)
    for name, weight in weights.items():
        total += weight * standardised(HEAD_SCORES[name](probe), probe.gates.heads_per_layer)
    return total


@register_head_score("random")
def random(probe: HeadProbe) -> Tensor:
    """Uniform numbers in [0, 1), a function of the seed."""
    generator = torch.Generator().manual_seed(probe.seed)
    return torch.rand(probe.shape, dtype=torch.float64, generator=generator)


@register_head_score("taylor")
def taylor(probe: HeadProbe) -> Tensor:
    r"""The loss that closing the head costs, to second order in its gate, nats.

    .. math:: L(\xi_h = 0) - L(\xi_h = 1) \approx -\frac{\partial L}{\partial \xi_h} + \frac12 F_{hh}

    with the empirical Fisher information F in the place of the second derivative, so one backward pass serves all
    heads. Near a minimum the gradient vanishes and the curvature decides.

    Source: LeCun et al. 1990, "Optimal Brain Damage"; Molchanov et al. 2019, "Importance Estimation for Neural Network
    Pruning", section 3.1.
    """
    return -probe.gradient() + probe.curvature() / 2


@register_head_score("ablation")
def ablation(probe: HeadProbe) -> Tensor:
    """The loss that closing the head alone costs, measured with one forward pass per head; the reference, nats."""
    return probe.ablation()


def standardised(scores: Tensor, heads_per_layer: tuple[int, ...]) -> Tensor:
    """Scores minus their mean over all heads, in their standard deviations; 0 when all are equal.

    Example:
        >>> standardised(torch.tensor([[1.0, 3.0]]), (2,)).tolist()
        [[-1.0, 1.0]]
    """
    real = torch.cat([row[:size] for row, size in zip(scores, heads_per_layer, strict=True)])
    spread = real.std(correction=0)
    return (scores - real.mean()) / spread if spread > 0 else torch.zeros_like(scores)


def check_weights(strategy: str, weights: dict[str, float] | None) -> None:
    """Checks a strategy and its weights before there is a model.

    Raises:
        ValueError: The strategy or a weighed score is unknown, a weight is negative, all are 0, or the strategy takes
            none.
    """
    HEAD_SCORES[strategy]
    for name, weight in (weights or {}).items():
        if name not in HEAD_SCORES or name == "combined":
            raise ValueError(f"weights: {suggestion(str(name), [each for each in HEAD_SCORES if each != 'combined'])}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weights: the weight of {name!r} must be a finite number from 0; got {weight}")
    if weights is not None and strategy != "combined":
        raise ValueError(f"weights belong to the strategy 'combined'; got them with {strategy!r}")
    if weights is not None and not any(weights.values()):
        raise ValueError(f"weights: at least one must be above 0; got {weights}")
