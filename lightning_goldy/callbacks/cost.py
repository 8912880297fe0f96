"""What an analysis costs in memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def peak_memory_bytes(device: torch.device) -> Iterator[Callable[[], int]]:
    """Measures the peak memory of a block; the yielded function gives the bytes once the block has ended.

    On a CUDA device the peak of allocated memory within the block; elsewhere the process's largest resident size so
    far, which includes the training's.

    Args:
        device: Where the model is.

    Example:
        >>> with peak_memory_bytes(torch.device("cpu")) as peak:
        ...     block = torch.zeros(1000)
        >>> peak() > 4000
        True
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    peak = 0
    yield lambda: peak
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_peak()


def _resident_peak() -> int:
    try:
        import resource
    except ImportError:  # pragma: no cover - Windows
        return 0
    # Linux counts kilobytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
