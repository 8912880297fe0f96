"""What gating, freezing, scoring and compacting attention heads cost and save, at 30 M parameters.

    python benchmarks/heads.py
    python benchmarks/heads.py --device cuda --dtype bfloat16 --layers 12 --heads 12 --width 768

Prints medians of ratios over alternating repetitions in one run, on a CPU of processor time, which other programs
disturb less; absolute times depend on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_goldy.analysis import HeadFreeze, HeadGates, compact, head_importance
from lightning_goldy.core import CausalLMObjective


def subject(arguments: argparse.Namespace, implementation: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=arguments.layers,
        n_head=arguments.heads,
        n_embd=arguments.width,
        vocab_size=8192,
        n_positions=arguments.length,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=implementation,
    )
    model = GPT2LMHeadModel(config).to(arguments.device, getattr(torch, arguments.dtype))
    model.set_attn_implementation(implementation)
    return model


def half(model: Any) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(model.config.n_layer) for head in range(0, model.config.n_head, 2)]


def paired(
    first: Callable[[], Any], second: Callable[[], Any], arguments: argparse.Namespace
) -> tuple[float, float, float]:
    """Median milliseconds of both, and the median ratio pair by pair: on a CPU of processor time, wall clock else."""
    device = torch.device(arguments.device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times: tuple[list[float], list[float]] = ([], [])
    for repetition in range(arguments.repetitions + 1):
        # In turns, for whoever comes second finds warm caches.
        for index in (0, 1) if repetition % 2 else (1, 0):
            synchronise(device)
            start = clock()
            (first, second)[index]()
            synchronise(device)
            times[index].append(1e3 * (clock() - start))
    ratios = [a / b for a, b in zip(times[0][1:], times[1][1:], strict=True)]
    return statistics.median(times[0][1:]), statistics.median(times[1][1:]), statistics.median(ratios)


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def training_step(model: Any, batch: dict[str, torch.Tensor]) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        CausalLMObjective().loss(model, batch).backward()
        optimizer.step()

    return step, optimizer


def report_steps(arguments: argparse.Namespace, batch: dict[str, torch.Tensor]) -> None:
    plain, _ = training_step(subject(arguments).train(), batch)
    for name in ("open gates", "half closed", "half closed and frozen"):
        model = subject(arguments).train()
        gates = HeadGates(model)
        step, optimizer = training_step(model, batch)
        if name != "open gates":
            gates.disable(half(model))
        if name.endswith("frozen"):
            HeadFreeze(model, optimizer)
        gated, ungated, ratio = paired(step, plain, arguments)
        print(f"training step, {name} {gated:.1f} ms, without gates {ungated:.1f} ms: ratio {ratio:.3f} (<= 1.02)")


def report_scores(arguments: argparse.Namespace, batch: dict[str, torch.Tensor]) -> None:
    model = subject(arguments).eval()

    def forward_backward() -> None:
        model.zero_grad(set_to_none=True)
        CausalLMObjective().loss(model, batch).backward()

    for strategy in ("magnitude", "taylor"):
        scored, alone, ratio = paired(
            lambda strategy=strategy: head_importance(model, [batch], strategy=strategy),
            forward_backward,
            arguments,
        )
        print(f"{strategy} {scored:.1f} ms, forward + backward {alone:.1f} ms: ratio {ratio:.3f} (<= 1.2)")
    eager = subject(arguments, "eager").eval()

    def forward() -> None:
        with torch.no_grad():
            CausalLMObjective().loss(eager, batch)

    scored, alone, ratio = paired(lambda: head_importance(model, [batch]), forward, arguments)
    print(f"entropy {scored:.1f} ms, eager forward {alone:.1f} ms: ratio {ratio:.3f} (<= 1.5)")


def report_compaction(arguments: argparse.Namespace, batch: dict[str, torch.Tensor]) -> None:
    model = subject(arguments).eval()
    HeadGates(model).disable(half(model))
    smaller = compact(model)
    rows = len(batch["input_ids"])
    hidden = torch.randn(rows, arguments.length, arguments.width, device=arguments.device).to(next(model.parameters()))

    @torch.no_grad()
    def attend(each: Any) -> None:
        for block in each.transformer.h:
            block.attn(hidden)

    cut, gated, ratio = paired(lambda: attend(smaller), lambda: attend(model), arguments)
    # Half the heads are half of the arithmetic of attention, its four projections included.
    saved = (1 - ratio) / 0.5
    print(f"attention with half the heads {cut:.1f} ms, gated {gated:.1f} ms: {saved:.3f} of the saving (>= 0.8)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = (arguments.rows, arguments.length)
    batch = {"input_ids": torch.randint(0, 8192, shape, device=arguments.device)}
    size = sum(parameter.numel() for parameter in subject(arguments).parameters())
    print(
        f"{size / 1e6:.1f} M parameters, {shape[0]} samples of {shape[1]} tokens, {arguments.dtype} on "
        f"{arguments.device}, {torch.get_num_threads()} threads"
    )
    report_steps(arguments, batch)
    report_scores(arguments, batch)
    report_compaction(arguments, batch)


if __name__ == "__main__":
    main()
