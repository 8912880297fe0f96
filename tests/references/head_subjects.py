"""Models with padded batches whose heads are scored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_goldy.core.objective import CausalLMObjective, ClassifierObjective
from tests.references.architecture_models import VOCABULARY
from tests.references.architecture_models import build as built

CLASSIFIERS = ("bert", "roberta")


def build(family: str) -> Any:
    torch.manual_seed(0)
    return built(family)


def subject(family: str, *, padding: int = 3) -> tuple[Any, dict[str, Tensor], Any]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(2, VOCABULARY, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, 4):
        mask[row, 9 - min(row, padding) :] = 0
    ids = ids.masked_fill(mask == 0, 0)
    if family in CLASSIFIERS:
        labels, objective = torch.randint(0, 2, (4,), generator=generator), ClassifierObjective()
    else:
        labels, objective = ids.masked_fill(mask == 0, -100), CausalLMObjective()
        labels[:, :2] = -100
    return build(family), {"input_ids": ids, "attention_mask": mask, "labels": labels}, objective
