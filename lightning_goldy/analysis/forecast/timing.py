"""How fast a model and its machine are, from one timed sample, and how much a graph of it keeps."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.change import log_histogram
from lightning_goldy.analysis.forecast.plan import VOTED, Speeds
from lightning_goldy.analysis.golden import golden_parameters, row_column_null, watched_elements
from lightning_goldy.core.batches import batch_tensors, sample_count
from lightning_goldy.core.objective import FunctionObjective, Objective
from lightning_goldy.core.selection import select_largest
from lightning_goldy.core.sharding import Replicas, is_sharded, local, unshard_guard
from lightning_goldy.core.space import trainable_parameters
from lightning_goldy.core.vector import direction_blocks, leading_directions, randomised_operations

# What is timed: elements of a tensor, and the side of a matrix.
_TIMED, _SIDE = 1 << 21, 256
# Samples that vote where voting is timed.
_VOTERS = 8
# Seconds of a run that is not repeated.
_LONG = 0.1
clock = time.perf_counter
"""What tells the time."""


def graph_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that the graph of a forward pass keeps beside the parameters; a storage counts once, also on ``meta``.

    Args:
        model: In evaluation mode.
        run: The pass.

    Example:
        >>> model, x = nn.Linear(3, 4, device="meta"), torch.ones(2, 3, device="meta")
        >>> graph_bytes(model, lambda: model(x).square())
        56
    """
    known = {local(parameter).untyped_storage()._cdata for parameter in model.parameters()}
    held: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = local(tensor).untyped_storage()
        if storage._cdata not in known:
            held[storage._cdata] = storage
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = run()
    del value
    return sum(storage.nbytes() for storage in held.values())


def shape_rows(batches: Iterable[Any]) -> tuple[tuple[int, int], ...]:
    """Of each batch the samples, and the tokens of each; 1 where they are no sequences of integers.

    Example:
        >>> shape_rows([{"input_ids": torch.zeros(2, 7, dtype=torch.long)}, (torch.ones(3, 4), torch.zeros(3))])
        ((2, 7), (3, 1))
    """
    rows = []
    for batch in batches:
        sequences = [
            tensor.shape[1]
            for tensor in batch_tensors(batch)
            if tensor.ndim == 2 and not tensor.is_floating_point() and len(tensor) == sample_count(batch)
        ]
        rows.append((sample_count(batch), max(sequences, default=1)))
    return tuple(rows)


def measure_speeds(model: nn.Module, objective: Objective, batch: Any, *, gradients: bool = True) -> Speeds:
    """Times a forward and a forward and backward pass over one sample and over a batch, and arithmetic.

    Args:
        model: In evaluation mode, isolated.
        objective: How a batch becomes log-probabilities.
        batch: On the model's device.
        gradients: Whether to time the backward pass; else it is taken to be twice a forward pass.

    Example:
        >>> from lightning_goldy.core.objective import ClassifierObjective
        >>> speeds = measure_speeds(nn.Linear(3, 2), ClassifierObjective(), (torch.ones(4, 3), torch.zeros(4).long()))
        >>> speeds.element > 0, min(speeds.forward) >= 0
        (True, True)
    """
    sample = next(iter(objective.samples(batch)))
    device = next(model.parameters()).device
    counts = [math.prod(shape_rows([part])[0]) for part in (sample, batch)]
    leaves = dict(trainable_parameters(model))

    def forward(part: Any) -> None:
        with torch.no_grad():
            objective.log_probs(model, part)

    def both(part: Any) -> None:
        with torch.enable_grad():
            try_gradients(model, leaves, objective, part)

    found = []
    for act in (forward, both) if gradients else (forward,):
        act(sample)  # code and buffers that come into being at the first pass
        timed = [_seconds(functools.partial(act, part), device) for part in (sample, batch)]
        found.append(_affine(counts, timed))
    if not gradients:
        found.append((3 * found[0][0], 3 * found[0][1]))
    return Speeds(found[0], found[1], **_arithmetic(device))


def arithmetic_speeds(device: torch.device) -> Speeds:
    """Those of a machine without a model: passes have no known time."""
    return Speeds((math.nan, math.nan), (math.nan, math.nan), **_arithmetic(device))


def try_gradients(model: nn.Module, parameters: Mapping[str, nn.Parameter], objective: Objective, sample: Any) -> None:
    """A forward and a backward pass of one sample.

    Args:
        model: The model, isolated.
        parameters: By name; those whose gradients are wanted.
        objective: How a batch becomes log-probabilities.
        sample: A batch of one sample, on the model's device.

    Raises:
        ValueError: The log-probability depends on none of the parameters.
    """
    log_prob, leaves = objective.log_probs(model, sample).mean(), list(parameters.values())
    if any(map(is_sharded, leaves)):
        log_prob.backward()  # FSDP2 leaves gradients in the parameters alone
        unshard_guard(model)
        return
    # Not into the parameters, or DistributedDataParallel would see a backward pass.
    found = torch.autograd.grad(log_prob, leaves, allow_unused=True) if log_prob.requires_grad else [None]
    if all(gradient is None for gradient in found):
        raise ValueError(
            f"the objective depends on none of the {len(leaves)} selected parameters ({next(iter(parameters))}, ...)"
        )


def _affine(counts: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Seconds per pass and per token."""
    (few, many), (short, long) = counts, seconds
    if many <= few or long <= short:
        return 0.0, long / many
    token = min((long - short) / (many - few), long / many)
    return max(0.0, short - token * few), token


def _seconds(act: Callable[[], Any], device: torch.device, runs: int = 3, *, alone: bool = False) -> float:
    """The shortest of some runs; of fewer where they take long, and where all ranks must make the same number."""
    best, spent = math.inf, 0.0
    # A pass of a sharded model is a collective, and no two ranks' clocks agree.
    together = not alone and Replicas.world().size > 1
    for run in range(runs):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = clock()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = clock() - start
        best, spent = min(best, took), spent + took
        # A short one alone may have been held up for several times what it takes.
        if together or (spent > 0.004 * runs and (run or took > _LONG)):
            break
    return best


@functools.cache
def _arithmetic(device: torch.device) -> Mapping[str, float]:
    wide, exact = (
        torch.linspace(-1.0, 1.0, _TIMED, device=device),
        torch.float64 if device.type != "mps" else torch.float32,
    )
    square = torch.ones(_SIDE, _SIDE, dtype=exact, device=device)
    ramp = torch.linspace(0.0, 1.0, _SIDE, device=device)
    matrix = (ramp[:, None] + 7.0 * ramp.repeat(3)).sin()  # [side, 3 side]
    heights = torch.linspace(0.0, 1.0, 2 * _SIDE)
    votes = (_VOTERS * heights[:, None] * heights.repeat_interleave(2)).round().to(torch.uint8)
    jobs: dict[str, tuple[Callable[[], Any], float]] = {
        "element": (lambda: (wide - 0.5).abs().sum(), _TIMED),
        "selected": (lambda: select_largest([wide], _TIMED // 20), _TIMED),
        "flop": (lambda: square @ square, 2.0 * _SIDE**3),
        "normal": (lambda: sum(len(block) for _, block in direction_blocks(matrix, "timed", 0)), matrix.numel()),
        "binned": (lambda: log_histogram(matrix), matrix.numel()),
        "cube": (lambda: torch.linalg.eigh((matrix @ matrix.t()).to(exact)), _SIDE**3),
        "factored": (
            lambda: leading_directions(matrix, 8, "timed", 0, exact=False),
            randomised_operations(matrix.shape[0], matrix.shape[1], 8),
        ),
        "null": (lambda: row_column_null(votes, _VOTERS, _VOTERS), votes.numel()),
    }
    found = {name: _seconds(act, device, 12, alone=True) / count for name, (act, count) in jobs.items()}
    return {**found, "watched": _watching(device, found)}


class _Timed(nn.Module):
    """A matrix whose gradient is the input of its sample."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        ramp = torch.linspace(0.0, 1.0, 2 * _SIDE, device=device)
        self.weight = nn.Parameter((3.0 * ramp[:, None] + ramp).cos())

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum(dim=(1, 2))


def _watching(device: torch.device, known: Mapping[str, float]) -> float:
    """Seconds per element whose mark by one sample is kept and left out, from votes over a whole matrix."""
    model = _Timed(device)
    numel = model.weight.numel()
    frequencies = torch.arange(1.0, 1.0 + _VOTERS, device=device)[:, None]
    samples = (frequencies * torch.linspace(0.0, 60.0, numel, device=device)).sin_().view(_VOTERS, *model.weight.shape)
    objective = FunctionObjective(lambda module, batch: module(batch).mean())

    def vote() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            golden_parameters(model, [samples], objective, control=False, split_over_ranks=False)

    def passes() -> None:
        for sample in samples:
            torch.autograd.grad(model(sample[None]).mean(), model.weight)

    took, alone = (_seconds(act, device, 2, alone=True) for act in (vote, passes))
    rest = took - alone - numel * (known["null"] + _VOTERS * (known["selected"] + VOTED * known["element"]))
    return max(0.0, rest) / (_VOTERS * watched_elements(numel, _VOTERS))
