"""Taylor expansions in units of an evaluation forward: seconds and memory.

    python benchmarks/taylor.py

Seconds: medians of ratios, each to the evaluation forwards just before and after it. Memory: what a call holds at its
largest, the parameters counted in, over the same of an evaluation forward; after a call on a few tokens, so that
neither code nor a library's buffers count.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_goldy.analysis import TaylorApproximation, taylor_diff
from lightning_goldy.core import ParameterVector

SIZES = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0}
FAMILIES = ("gpt2", "llama")
BOUNDS = {"order1": 5, "order2": 14, "loss2": 14, "diff2": 14}
MEMORY = 3
# Samples, tokens. One sample cannot be cut into parts.
SHAPES = ((8, 256), (32, 64), (2, 1024), (1, 1024))


def subject(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_layer=8, n_head=8, n_embd=384, n_positions=1024, **SIZES)).eval()
    config = LlamaConfig(
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        hidden_size=384,
        intermediate_size=1024,
        max_position_embeddings=1024,
        **SIZES,
    )
    return LlamaForCausalLM(config).eval()


def moved(family: str) -> tuple[torch.nn.Module, ParameterVector]:
    model = subject(family)
    base = ParameterVector.of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.002 * torch.randn_like(parameter))
    return model, base


def tokens(samples: int, length: int) -> torch.Tensor:
    return torch.randint(0, 4096, (samples, length), generator=torch.Generator().manual_seed(1))


def jobs(family: str, ids: torch.Tensor) -> dict[str, Callable[[], object]]:
    model, base = moved(family)
    batch = {"input_ids": ids}

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    first, second = (TaylorApproximation(model, base, order) for order in (1, 2))
    return {
        "forward": forward,
        "order1": lambda: first(input_ids=ids, use_cache=False),
        "order2": lambda: second(input_ids=ids, use_cache=False),
        "loss2": lambda: taylor_diff(model, base, [batch], function_space=False, by=None),
        "diff2": lambda: taylor_diff(model, base, [batch], by=None),
        "diff2 by block": lambda: taylor_diff(model, base, [batch]),
    }


def resident(field: str) -> int:
    """VmRSS, the present resident size, or VmHWM, the largest since the last reset, bytes; Linux only."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def held(job: Callable[[], object]) -> int:
    """What a call holds at its largest, bytes."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
    before = resident("VmRSS")
    job()
    return resident("VmHWM") - before


def print_memory(family: str) -> None:
    # With the parameters, which an evaluation forward needs too; the base is the caller's.
    parameters = 4 * sum(parameter.numel() for parameter in subject(family).parameters())
    for job in jobs(family, tokens(1, 8)).values():
        job()
    for shape in SHAPES:
        found = {name: parameters + held(job) for name, job in jobs(family, tokens(*shape)).items()}
        forward = found.pop("forward")
        ratios = ", ".join(f"{name} {size / forward:.2f}" for name, size in found.items())
        print(f"{family} {shape[0]} x {shape[1]}: {ratios} x a forward's {forward / 2**20:.0f} MiB (<= {MEMORY})")


def memory(family: str) -> None:
    # Every tensor in pages of its own, which go back when it is freed; or free memory between tensors would count.
    pages = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576", "PYTHONUNBUFFERED": "1"}
    subprocess.run([sys.executable, __file__, "--memory", family], check=True, env={**os.environ, **pages})


def forwards(found: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """The time of each job in forwards."""

    def seconds(name: str) -> float:
        began = time.perf_counter()
        found[name]()
        return time.perf_counter() - began

    ratios: dict[str, list[float]] = {name: [] for name in found if name != "forward"}
    for repetition in range(repetitions + 1):
        for name, values in ratios.items():
            before, took, after = seconds("forward"), seconds(name), seconds("forward")
            if repetition:
                values.append(2 * took / (before + after))
    return {name: statistics.median(values) for name, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--memory", choices=FAMILIES, help="print the memory of one family alone")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.memory:
        print_memory(arguments.memory)
        return
    for family in FAMILIES:
        for name, ratio in forwards(jobs(family, tokens(*SHAPES[0])), arguments.repetitions).items():
            bound = f" (<= {BOUNDS[name]})" if name in BOUNDS else ""
            print(f"{family} {name}: {ratio:.1f} forwards{bound}", flush=True)
    for family in FAMILIES:
        memory(family)


if __name__ == "__main__":
    main()
