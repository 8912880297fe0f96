"""What did this finetune change? Callbacks, analyses and a module wrapper for PyTorch Lightning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Names load on first use, so that `lightning_goldy.core` and `.analysis` never pull Lightning in.
if TYPE_CHECKING:
    from lightning_goldy.core.mask import ParameterMask as ParameterMask
    from lightning_goldy.core.objective import CausalLMObjective as CausalLMObjective
    from lightning_goldy.core.objective import ClassifierObjective as ClassifierObjective
    from lightning_goldy.core.objective import FunctionObjective as FunctionObjective
    from lightning_goldy.core.objective import MaskedLMObjective as MaskedLMObjective
    from lightning_goldy.core.objective import Seq2SeqObjective as Seq2SeqObjective
    from lightning_goldy.core.objective import SpanObjective as SpanObjective
    from lightning_goldy.core.objective import TokenClassifierObjective as TokenClassifierObjective
    from lightning_goldy.core.objective import TokenObjective as TokenObjective
    from lightning_goldy.core.space import ParameterSpace as ParameterSpace
    from lightning_goldy.core.vector import ParameterVector as ParameterVector
    from lightning_goldy.core.vector import applied as applied
    from lightning_goldy.core.vector import random_direction as random_direction
    from lightning_goldy.optim.masked_adamw import MaskedAdamW as MaskedAdamW
    from lightning_goldy.training.module import GoldyMixin as GoldyMixin
    from lightning_goldy.training.module import GoldyModule as GoldyModule

_EXPORTS = {
    "GoldyMixin": "training.module",
    "GoldyModule": "training.module",
    "MaskedAdamW": "optim.masked_adamw",
    "ParameterMask": "core.mask",
    "ParameterSpace": "core.space",
    "ParameterVector": "core.vector",
    "applied": "core.vector",
    "random_direction": "core.vector",
    "CausalLMObjective": "core.objective",
    "ClassifierObjective": "core.objective",
    "FunctionObjective": "core.objective",
    "MaskedLMObjective": "core.objective",
    "Seq2SeqObjective": "core.objective",
    "SpanObjective": "core.objective",
    "TokenClassifierObjective": "core.objective",
    "TokenObjective": "core.objective",
}

_MOVED = {
    "analysis.compact": "analysis.heads.compaction",
    "analysis.fluctuation": "analysis.golden.budget",
    "analysis.golden.fluctuation": "analysis.golden.budget",
    "analysis.head_surgery": "analysis.heads.surgery",
    "callbacks.plasticity_settings": "analysis.heads.schedule",
    "callbacks.run_directory": "callbacks.engine.store",
    "callbacks.subject": "training.subject",
    "core.collate": "core.pieces",
    "core.directions": "core.vector",
    "core.ray": "core.vector",
    "core.registry": "core.naming",
    "data.loading": "data.base",
    "demo": "commands.demo",
    "export": "training.models",
    "masked_training": "training.module",
    "metrics": "training.module",
    "mixin": "training.module",
    "models": "training.models",
    "module": "training.module",
    "options": "optim.schedules",
    "saved": "commands.checkpoints",
    "training.export": "training.models",
    "training.masks": "training.module",
    "training.metrics": "training.module",
    "training.mixin": "training.module",
    "variants": "training.variants",
}
"""Modules by their former names, which users' code and configurations may hold."""

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _FormerNames(MetaPathFinder, Loader):
    """Imports a module by its former name, with a warning that tells the present one."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.removeprefix(f"{__name__}.") in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        present = f"{__name__}.{_MOVED[module.__name__.removeprefix(f'{__name__}.')]}"
        warnings.warn(f"{module.__name__} is {present} now; import it from there", DeprecationWarning, stacklevel=2)
        real = importlib.import_module(present)
        module.__getattr__ = lambda name: getattr(real, name)  # type: ignore[method-assign]
        module.__dir__ = lambda: dir(real)  # type: ignore[method-assign]


# Last, so that it is asked for nothing that exists.
if not any(type(finder).__name__ == _FormerNames.__name__ for finder in sys.meta_path):
    sys.meta_path.append(_FormerNames())
