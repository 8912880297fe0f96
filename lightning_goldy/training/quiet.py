"""A console that says only what its reader can act on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

_KNOWN = (
    # Samples lie in memory, where loader processes would only cost time.
    (".*does not have many workers.*", UserWarning),
    # Between Lightning and torch.
    (".*isinstance\\(treespec, LeafSpec\\).*", FutureWarning),
)


@contextmanager
def without_known_warnings() -> Iterator[None]:
    """Silences warnings of other libraries that neither a user nor this package can mend.

    Example:
        >>> with without_known_warnings():
        ...     warnings.warn("'train_dataloader' does not have many workers", UserWarning, stacklevel=1)
    """
    with warnings.catch_warnings():
        for message, category in _KNOWN:
            warnings.filterwarnings("ignore", message, category)
        yield


@contextmanager
def without_transformers_bars() -> Iterator[None]:
    """Silences the progress bars that transformers shows while it reads or writes weights."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def progress_only() -> Iterator[None]:
    """Leaves Lightning's progress bars and warnings, and silences its notices and transformers' bars."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with without_transformers_bars():
            yield
    finally:
        logger.setLevel(level)
