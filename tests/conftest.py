"""Shared set-up: one thread, no hub, a quiet console, small models of several real families."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# A fixed set of examples by default, so that a failure is of the change that is tested; HYPOTHESIS_PROFILE=explore
# searches new ones.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
