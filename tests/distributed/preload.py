"""What every process of a test needs, imported once by the server that they are forked from."""

from __future__ import annotations

import importlib

for _name in (
    "lightning.pytorch",
    "lightning_goldy.analysis",
    "lightning_goldy.callbacks",
    "lightning_goldy.optim",
    "tests.references.models",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
):
    importlib.import_module(_name)
