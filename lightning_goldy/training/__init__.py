"""What trains: the LightningModule, its mixin, variants side by side, models and recipes."""

from __future__ import annotations

import importlib
from typing import Any

# Names load on first use: listing recipes needs no torch.
_EXPORTS = {"GoldyMixin": "module", "GoldyModule": "module", "VariantsModule": "variants"}

__all__ = ["GoldyMixin", "GoldyModule", "VariantsModule"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
