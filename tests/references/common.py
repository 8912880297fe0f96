"""Slow and obvious versions of what the package computes quickly; tests compare the two."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

# options in combination


def paired(axes: Mapping[str, Mapping[str, Any]], *, strength: int = 2) -> pytest.MarkDecorator:
    """Every combination of options as a test; fast are as few as hold every two values of different options together.

    Args:
        axes: The values of each argument, by what they are called.
        strength: How many values the fast ones hold together; 1 for every value at least once.
    """
    whole = list(product(*axes.values()))
    pairs = {chosen: set(combinations(enumerate(chosen), strength)) for chosen in whole}
    left, fast = set().union(*pairs.values()), set()
    while left:
        best = max(whole, key=lambda chosen: len(pairs[chosen] & left))
        fast.add(best)
        left -= pairs[best]
    cases = [
        pytest.param(
            *(values[name] for values, name in zip(axes.values(), chosen, strict=True)),
            marks=() if chosen in fast else pytest.mark.slow,
            id="-".join(chosen),
        )
        for chosen in whole
    ]
    return pytest.mark.parametrize(tuple(axes), cases)


# figures


def one_pixel(spec: Mapping[str, Any], scale: float = 1.0) -> bytes:
    """A picture in the place of what a specification, which must be JSON, shows."""
    json.dumps(spec, allow_nan=False)
    data = zlib.compress(bytes(5))
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 6, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# core: selection


def largest_reference(tensors: Sequence[Tensor], k: int) -> list[Tensor]:
    """Masks of the k largest of all elements: one stable sort of everything in float64."""
    # bfloat16, float16 and float32 are exact in float64, so ties stay ties and no others arise.
    values = np.concatenate([tensor.detach().double().numpy().reshape(-1) for tensor in tensors])
    order = np.argsort(-values, kind="stable")[:k]
    marked = np.zeros(len(values), dtype=bool)
    marked[order] = True
    parts = torch.from_numpy(marked).split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


# core: vectors


def exact_dot(first: Tensor, second: Tensor) -> float:
    """Inner product: exact sum of float64 products, correctly rounded once."""
    products = first.detach().double().reshape(-1) * second.detach().double().reshape(-1)
    return math.fsum(products.tolist())


def share_of(percent: float, numel: int) -> int:
    """Number of elements that a percentage is, half a one counted as one, and at least one."""
    return max(1, int(numel * percent / 100 + 0.5))


# core: directions


def direction_reference(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """A direction drawn from the first element to the last in whole blocks of 65,536, float32."""
    numel = math.prod(shape)
    blocks: list[Tensor] = []
    while sum(map(len, blocks)) < numel:
        key = f"{seed}\0{name}\0{len(blocks)}".encode()
        number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") // 2
        blocks.append(torch.randn(65_536, generator=torch.Generator().manual_seed(number), dtype=torch.float32))
    return torch.cat([*blocks, torch.empty(0)])[:numel].reshape(tuple(shape))


# core: store


def bits_reference(mask: Tensor) -> list[int]:
    """Bytes of a mask, the first element in the highest bit, zeros at the end."""
    flat = mask.reshape(-1).tolist()
    flat += [False] * (-len(flat) % 8)
    return [sum(bit << (7 - place) for place, bit in enumerate(flat[at : at + 8])) for at in range(0, len(flat), 8)]


# core: space


def selected_reference(module: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Names of trainable parameters that some pattern takes and none takes out, tied ones once."""
    names = []
    for name, parameter in module.named_parameters():
        taken = any(fnmatch.fnmatchcase(name, pattern) for pattern in include)
        left_out = any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)
        if parameter.requires_grad and taken and not left_out:
            names.append(name)
    return names


# core: objective


def causal_log_probs_reference(
    forward: Callable[[Tensor], Tensor], ids: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
) -> list[list[float]]:
    """Log-probability of each target token of each sample, nats; every sample alone and without its padding.

    Args:
        forward: Token indices [1, T] to logits [1, T, V].
        ids: [B, T].
        mask: [B, T]; padding is 0.
        labels: [B, T]; -100 is no target. Without, every token but the first is one.
    """
    rows = []
    for row in range(len(ids)):
        real = torch.ones_like(ids[row]).bool() if mask is None else mask[row].bool()
        tokens = ids[row][real]
        wanted = tokens if labels is None else labels[row][real]
        log_probs = forward(tokens[None])[0].double().log_softmax(dim=-1)  # [T, V]
        rows.append([float(log_probs[at - 1, wanted[at]]) for at in range(1, len(tokens)) if int(wanted[at]) != -100])
    return rows


def class_log_probs_reference(logits: Tensor, labels: Tensor) -> list[float]:
    """Log-probability of each label, nats: the logit minus the logarithm of the sum of exponentials."""
    rows = logits.double().tolist()
    return [
        row[label] - max(row) - math.log(math.fsum(math.exp(value - max(row)) for value in row))
        for row, label in zip(rows, labels.tolist(), strict=True)
    ]
