"""All that decides the numbers of a coupling, in a few words each: what a resumed run must share with the first."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from lightning_goldy.analysis.coupling_capture import Capture
from lightning_goldy.analysis.coupling_pieces import PieceSamples
from lightning_goldy.core.batches import batch_tensors
from lightning_goldy.core.naming import canonical_name, model_class
from lightning_goldy.core.sharding import gather


def run_settings(capture: Capture, pieces: PieceSamples, projection: int | None, seed: int) -> dict[str, str]:
    """Names and hashes of all that decides the numbers of a coupling; every rank must call.

    Args:
        capture: Knows the model, the objective and the tensors.
        pieces: The samples.
        projection: Dimensions of the random projection, if any.
        seed: Of the projection.
    """
    device = capture.device.type
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "none"
    model, objective = capture.model, capture.objective
    function = getattr(getattr(objective, "function", None), "__qualname__", "")
    return {
        "pieces": f"{len(pieces.samples)} with hash {_pieces_hash(pieces)}",
        "weights": _weights_hash(capture),
        "model": f"{model_class(model)} with hash {_digest(repr(model).encode())}",
        "selection": f"{len(capture.parameters)} tensors with hash {_digest(repr(list(capture.parameters)).encode())}",
        "objective": f"{type(objective).__module__}.{type(objective).__qualname__} {function}".strip(),
        "projection": "none" if projection is None else f"{projection} dimensions with seed {seed}",
        "autocast": autocast,
    }


def _pieces_hash(pieces: PieceSamples) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for sample in pieces.samples:
        digest.update(b"\1" if sample is None else b"\2")
        for tensor in () if sample is None else batch_tensors(sample):
            _update(digest, tensor)
    return digest.hexdigest()


def _weights_hash(capture: Capture) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in (*capture.model.named_parameters(), *capture.model.named_buffers()):
        digest.update(canonical_name(name).encode())
        _update(digest, gather(tensor))
    return digest.hexdigest()


def _update(digest: Any, tensor: torch.Tensor) -> None:
    full = tensor.detach().cpu().contiguous()
    digest.update(f"{tuple(full.shape)} {full.dtype}".encode())
    # NumPy knows no bfloat16; the bytes do not care.
    digest.update(full.reshape(-1).view(torch.uint8).numpy().data)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
