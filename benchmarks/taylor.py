"""Taylor expansions in units of an evaluation forward: seconds and memory.

    python benchmarks/taylor.py

Prints ratios of medians over alternating repetitions in one run; absolute times depend on the machine.
"""

from __future__ import annotations

import argparse
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
WORK = ("forward", "order1", "order2", "diff2", "loss2")


def subject(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_layer=8, n_head=8, n_embd=384, n_positions=256, **SIZES)).eval()
    config = LlamaConfig(
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        hidden_size=384,
        intermediate_size=1024,
        max_position_embeddings=256,
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


def print_memory(family: str, work: str, ids: torch.Tensor) -> None:
    found = jobs(family, ids)
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
    before = resident("VmRSS")
    found[work]()
    # With the parameters, which an evaluation forward needs too; the base is the caller's.
    print(resident("VmHWM") - before + 4 * sum(parameter.numel() for parameter in subject(family).parameters()))


def memory(family: str, work: str) -> int:
    command = [sys.executable, __file__, "--memory", work, "--family", family]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--family", choices=("gpt2", "llama"), help=argparse.SUPPRESS)
    parser.add_argument("--memory", choices=WORK, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    ids = torch.randint(0, 4096, (8, 256), generator=torch.Generator().manual_seed(1))
    if arguments.memory:
        print_memory(arguments.family, arguments.memory, ids)
        return
    bounds = {"order1": 5, "order2": 14, "loss2": 14, "diff2": 14}
    for family in ("gpt2", "llama"):
        found = jobs(family, ids)
        seconds: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(arguments.repetitions + 1):
            for name, job in found.items():
                began = time.perf_counter()
                job()
                seconds[name].append(time.perf_counter() - began)
        median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        for name in list(found)[1:]:
            bound = f" (<= {bounds[name]})" if name in bounds else ""
            print(f"{family} {name}: {median[name] / median['forward']:.1f} forwards{bound}")
        forward = memory(family, "forward")
        for name in WORK[1:]:
            ratio = memory(family, name) / forward
            print(f"{family} {name}: {ratio:.2f} x the memory of an evaluation forward (<= 3)")


if __name__ == "__main__":
    main()
