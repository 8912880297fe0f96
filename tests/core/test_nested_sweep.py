"""Every operation of torch that has a derivative: right in nested forward mode, or refused, never silently wrong."""

from __future__ import annotations

import math
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp
from torch.utils import _pytree as tree

from lightning_goldy.core.composed import nested_derivatives

SAMPLES = 6
# Of another meaning than a derivative along a line, or of none.
LEFT_OUT = {
    **dict.fromkeys(("linalg.cholesky", "linalg.cholesky_ex", "cholesky", "linalg.pinv.hermitian"), "reads a triangle"),
    **dict.fromkeys(("cholesky_inverse", "cholesky_solve"), "reads a triangle"),
    **dict.fromkeys(("linalg.eigh", "linalg.eigvalsh"), "reads a triangle"),
    **dict.fromkeys(("normal", "normal.number_mean"), "draws numbers, which no derivative goes through"),
    # Those are tested below, and in torch's samples ``grad``, where each place is written once.
    **{f"nn.functional.max_unpool{dims}d": "samples write one place several times" for dims in (1, 2, 3)},
}
# Steps, and operations that are not smooth at their samples: powers of negative numbers, hinges.
NOT_SMOOTH = {
    "ceil",
    "floor",
    "frac",
    "round",
    "round.decimals_3",
    "trunc",
    "__rpow__",
    "nn.functional.hinge_embedding_loss",
}
# What torch says where it has no derivative; differences take their place.
REFUSALS = (NotImplementedError, RuntimeError)
TOLERANCES = {1: 1e-6, 2: 1e-5, 3: 1e-3}
NODES = np.cos(np.pi * (np.arange(21) + 0.5) / 21)

Line = Callable[[Tensor], Tensor]


def derivatives(line: Line) -> list[float] | None:
    """Derivatives at 0 up to the third by Chebyshev interpolation; None where the function is not smooth there."""
    # The wider, the less do rounding errors count.
    return next((found for found in (interpolated(line, radius) for radius in (0.06, 0.02, 0.005)) if found), None)


def interpolated(line: Line, radius: float) -> list[float] | None:
    with torch.no_grad():
        values = np.array([float(line(torch.tensor(radius * node))) for node in NODES])
    fit = np.polynomial.chebyshev.chebfit(NODES, values, 20)
    if not np.isfinite(fit).all() or np.abs(fit[-5:]).max() > 1e-11 * np.abs(fit).max():
        return None
    found = [float(fit @ np.cos(np.arange(21) * np.pi / 2))]
    for order in (1, 2, 3):
        derivative = np.polynomial.chebyshev.chebder(fit, order)
        found.append(float(np.polynomial.chebyshev.chebval(0.0, derivative)) / radius**order)
    return found


def forward(line: Line, order: int) -> Line:
    if order == 0:
        return line
    lower = forward(line, order - 1)
    return lambda t: jvp(lower, (t,), (torch.ones_like(t),))[1]


def backward_over_forward(line: Line) -> float:
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(forward(line, 1)(t), [t], materialize_grads=True)
    return float(found)


def forward_over_backward(line: Line) -> float:
    zero = torch.zeros((), dtype=torch.float64)
    return float(jvp(torch.func.grad(line), (zero,), (torch.ones_like(zero),))[1])


def lines(operation: Any) -> Iterator[Line]:
    """A scalar of what an operation gives along a line through each of its first samples that have a derivative."""
    given = 0
    for sample in operation.sample_inputs("cpu", torch.float64, requires_grad=True):
        leaves, spec = tree.tree_flatten((sample.input, sample.args, sample.kwargs))
        generator = torch.Generator().manual_seed(0)
        steps = {
            place: 0.3 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.dtype == torch.float64 and leaf.requires_grad and leaf.numel()
        }

        def outputs(
            t: Tensor, leaves: list[Any] = leaves, spec: Any = spec, steps: dict[int, Tensor] = steps
        ) -> list[Tensor]:
            plain = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            moved = [leaf + t * steps[place] if place in steps else leaf for place, leaf in enumerate(plain)]
            first, args, kwargs = tree.tree_unflatten(moved, spec)
            torch.manual_seed(3)
            leaves = tree.tree_leaves(operation.op(first, *args, **kwargs))
            return [
                leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dtype == torch.float64 and leaf.numel()
            ]

        if steps and given < SAMPLES:
            given += 1
            yield partial(waves, outputs)


def waves(outputs: Callable[[Tensor], list[Tensor]], t: Tensor) -> Tensor:
    """A sum over sines of outputs, none of which is so large that its sine is not smooth."""
    with torch.no_grad():
        sizes = [max(1.0, float(output.abs().max())) for output in outputs(torch.zeros((), dtype=torch.float64))]
    total = torch.zeros((), dtype=torch.float64)
    for output, size in zip(outputs(t), sizes, strict=True):
        weights = torch.linspace(0.5, 2, output.numel(), dtype=torch.float64).view(output.shape)
        total = total + (output * (weights / size)).sin().sum()
    return total


def wrong(line: Line, compared: list[str] | None = None) -> str | None:
    """What of the derivatives of a line is wrong, None where all are right or refused; names those that it compared."""
    try:
        expected = derivatives(line)
    except REFUSALS:
        return None  # the sample is next to where the operation is not defined
    if expected is None or not np.isfinite(expected).all():
        return None
    zero = torch.zeros((), dtype=torch.float64)
    ways: list[tuple[str, int, Callable[[], float]]] = [
        (f"forward {order}", order, lambda order=order: float(forward(line, order)(zero))) for order in (1, 2, 3)
    ]
    ways.append(("backward over forward", 2, lambda: backward_over_forward(line)))
    ways.append(("forward over backward", 2, lambda: forward_over_backward(line)))
    for name, order, way in ways:
        size = max(abs(expected[order]), 1e-2 * abs(expected[0]), 1e-3)
        try:
            with nested_derivatives(), torch.enable_grad():
                found = way()
        except REFUSALS:
            continue
        if compared is not None:
            compared.append(name)
        if not math.isfinite(found):
            continue  # refused where it is used
        if not abs(found - expected[order]) <= TOLERANCES[order] * size:
            return f"{name} is {found:.8g}, not {expected[order]:.8g}"
    return None


def refuses(line: Line) -> bool:
    """Whether torch, or its nested derivatives here, say that they have no derivative."""
    try:
        with nested_derivatives():
            forward(line, 1)(torch.zeros((), dtype=torch.float64))
    except REFUSALS:
        return True
    return False


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Torch's own table of its operations, with samples."""
    stand_in = types.ModuleType("expecttest")  # what the table's module imports and does not need
    stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    stand_in.assert_expected_inline = None  # type: ignore[attr-defined]
    if "expecttest" not in sys.modules:
        monkeypatch.setitem(sys.modules, "expecttest", stand_in)
    from torch.testing._internal.common_methods_invocations import op_db

    return [each for each in op_db if torch.float64 in each.dtypes and each.supports_autograd]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_operation_has_a_derivative_that_is_silently_wrong(operations: list[Any]) -> None:
    compared: list[str] = []
    found, unseen = {}, set()
    for operation in operations:
        name = ".".join(filter(None, (operation.name, operation.variant_test_name)))
        if name in LEFT_OUT:
            continue
        before, seen = len(compared), False
        for line in lines(operation):
            problem = wrong(line, compared)
            if problem is not None:
                found[name] = problem
                break
            seen = seen or len(compared) > before or refuses(line)
        if not seen and name not in found:
            unseen.add(name)
    assert found == {}
    assert unseen == NOT_SMOOTH
    assert len(compared) > 10_000


def test_the_comparison_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(-1, 2, 6, dtype=torch.float64).square()

    def line(t: Tensor) -> Tensor:
        return F.layer_norm(x + t * torch.arange(6), (6,)).sin().sum()

    compared: list[str] = []
    assert wrong(line, compared) is None, compared
    assert len(compared) == 5
    monkeypatch.setattr(sys.modules[__name__], "nested_derivatives", nullcontext)
    assert str(wrong(line)).startswith("forward 2 is ")


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_unpooling_is_right_where_each_place_is_written_once(dims: int) -> None:
    pool, unpool = getattr(F, f"max_pool{dims}d"), getattr(F, f"max_unpool{dims}d")
    generator = torch.Generator().manual_seed(dims)
    given = torch.randn(2, 3, *(4,) * dims, generator=generator, dtype=torch.float64)
    pooled, places = pool(given, 2, return_indices=True)
    step = 0.3 * torch.randn(pooled.shape, generator=generator, dtype=torch.float64)
    weights = torch.linspace(0.5, 2, given.numel(), dtype=torch.float64).view(given.shape)
    compared: list[str] = []
    assert wrong(lambda t: (unpool(pooled + t * step, places, 2) * weights).sin().sum(), compared) is None
    assert len(compared) == 5


TRIANGLES: dict[str, Callable[[Tensor], Tensor]] = {
    "cholesky": lambda a: torch.linalg.cholesky(a @ a.mT),
    "eigh": lambda a: torch.linalg.eigh(a @ a.mT).eigenvalues,
    "eigvalsh": lambda a: torch.linalg.eigvalsh(a + a.mT),
    "pinv, hermitian": lambda a: torch.linalg.pinv(a + a.mT, hermitian=True),
    "cholesky_inverse": lambda a: torch.cholesky_inverse(a.tril()),
    "cholesky_solve": lambda a: torch.cholesky_solve(a.mT, a.triu(), upper=True),
}


@pytest.mark.parametrize("name", list(TRIANGLES))
def test_operations_that_read_a_triangle_are_right_where_the_whole_says_the_same(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, step = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    matrix = matrix + torch.diag(torch.tensor([3.0, 4.5, 6.0, 8.0]))
    compared: list[str] = []
    line = partial(waves, lambda t: [TRIANGLES[name](matrix + 0.3 * t * step)])
    assert wrong(line, compared) is None
    assert len(compared) == 5
