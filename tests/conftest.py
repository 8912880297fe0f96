"""Shared set-up: one thread, no hub, a quiet console, small models of several real families."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import integration

torch.set_num_threads(1)

# A fixed set of examples by default, so that a failure is of the change that is tested; HYPOTHESIS_PROFILE=explore
# searches new ones. Neither fails because the machine is busy.
UNTIMED: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", derandomize=True, **UNTIMED)
settings.register_profile("explore", derandomize=False, **UNTIMED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# What takes longest on one processor, longest first: files, and the folder whose worlds of several processes are forked
# from one server, which each worker that runs any of them has to start.
LONGEST = (
    "tests/distributed/",
    "tests/recipes/test_recipes.py",
    "tests/callbacks/test_isolation_of_callbacks.py",
    "tests/callbacks/test_which_weights.py",
    "tests/commands/test_analyze.py",
    "tests/callbacks/test_head_plasticity.py",
    "tests/callbacks/test_resume.py",
    "tests/analysis/golden/test_reverse_golden.py",
    "tests/callbacks/test_basin_volume.py",
    "tests/analysis/golden/test_golden.py",
    "tests/callbacks/test_reverse_golden.py",
    "tests/commands/test_basin.py",
    "tests/callbacks/test_resume_mid_epoch.py",
    "tests/analysis/basin/test_volume.py",
    "tests/analysis/linearized/test_linearize.py",
    "tests/analysis/coupling/test_coupling.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives workers whole files, the longest first, so that none is left with a long one at the end."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class LongestFirst(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((place for place in LONGEST if nodeid.startswith(place)), super()._split_scope(nodeid))

    config.option.loadscopereorder = False
    return LongestFirst(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    integration.mark(item)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        return next((number for number, place in enumerate(LONGEST) if item.nodeid.startswith(place)), len(LONGEST))

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    # Thousands of imported classes and collected tests stay to the end; no collection of garbage need go through them.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _classes_are_listed_once() -> Iterator[None]:
    """For each word without a dot where a configuration may name a module, all its subclasses are listed anew.

    They are thousands once tests have imported many families, and a run of a command reads dozens of such words.
    """
    with pytest.MonkeyPatch.context() as patch:
        import jsonargparse._typehints as typehints

        if hasattr(typehints, "get_all_subclass_paths"):
            once = functools.lru_cache(maxsize=None)(typehints.get_all_subclass_paths)
            every = typehints.get_all_subclass_paths
            patch.setattr(
                typehints,
                "get_all_subclass_paths",
                lambda cls, **options: (once if cls is torch.nn.Module else every)(cls, **options),
            )
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
