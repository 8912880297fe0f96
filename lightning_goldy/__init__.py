"""What did this finetune change? Callbacks, analyses and a module wrapper for PyTorch Lightning."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Names load on first use, so that `lightning_goldy.core` and `.analysis` never pull Lightning in.
_EXPORTS = {
    "GoldyMixin": "mixin",
    "GoldyModule": "module",
    "MaskedAdamW": "optim.masked_adamw",
    "ParameterMask": "core.mask",
    "ParameterSpace": "core.space",
    "ParameterVector": "core.vector",
    "applied": "core.vector",
    "random_direction": "core.directions",
    "CausalLMObjective": "core.objective",
    "ClassifierObjective": "core.objective",
    "FunctionObjective": "core.objective",
}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
