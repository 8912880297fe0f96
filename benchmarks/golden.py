"""Golden parameters against forward + backward alone, and the cost of isolation, at 30 M parameters.

    python benchmarks/golden.py

Prints ratios of medians over alternating repetitions in one run; absolute times depend on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_goldy.analysis import golden_parameters
from lightning_goldy.core.isolation import preserved


def subject() -> torch.nn.Module:
    config = GPT2Config(
        n_layer=8, n_head=8, n_embd=512, vocab_size=8192, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def forward_backward(model: torch.nn.Module, ids: torch.Tensor) -> None:
    for sample in ids.split(1):
        model.zero_grad(set_to_none=True)
        model(input_ids=sample, labels=sample, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def paired(first, second, repetitions: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median ratio pair by pair."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repetitions + 1):
        for function, into in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            into.append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(times[0][1:], times[1][1:], strict=True)]
    return statistics.median(times[0][1:]), statistics.median(times[1][1:]), statistics.median(ratios)


def peak_growth(work: str) -> int:
    """Growth of the largest resident size, bytes, in a process of its own: a used heap hides what is allocated."""
    command = [sys.executable, __file__, "--peak", work]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_resident() -> int:
    # Linux only. Not getrusage: its maximum is handed down from the parent, whose own size then hides the child's.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def print_peak(work: str) -> None:
    model, ids = subject(), torch.randint(0, 8192, (2, 256))
    with torch.no_grad():  # libraries allocate their workspaces on first use
        model(input_ids=ids[:1])
    before = peak_resident()
    if work == "forward_backward":
        forward_backward(model, ids)
    else:
        golden_parameters(model, [{"input_ids": ids}], scope=work)
    print(peak_resident() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--peak", choices=("forward_backward", "tensor", "global"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    if arguments.peak:
        print_peak(arguments.peak)
        return
    model = subject()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    ids = torch.randint(0, 8192, (arguments.samples, 256))
    batch = {"input_ids": ids}
    print(
        f"{size / 4e6:.1f} M parameters, {arguments.samples} samples of 256 tokens, {torch.get_num_threads()} threads"
    )

    for scope in ("tensor", "global"):
        analysis, alone, ratio = paired(
            lambda scope=scope: golden_parameters(model, [batch], scope=scope),
            lambda: forward_backward(model, ids),
            arguments.repetitions,
        )
        print(
            f"golden_parameters({scope}) {analysis:.2f} s, forward + backward {alone:.2f} s: ratio {ratio:.3f} (<= 1.2)"
        )

    plain = peak_growth("forward_backward")
    for scope in ("tensor", "global"):
        extra = (peak_growth(scope) - plain) / size
        print(f"memory({scope}): {extra:+.2f} x the parameters against forward + backward with its gradients (<= 1.3)")

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def enter_and_leave() -> None:
        with preserved(model):
            pass

    def copy_gradients_and_buffers() -> None:
        copies = [parameter.grad.clone() for parameter in model.parameters()]
        copies += [buffer.clone() for buffer in model.buffers()]

    isolation, copy, ratio = paired(enter_and_leave, copy_gradients_and_buffers, 4 * arguments.repetitions)
    print(
        f"isolation {1e3 * isolation:.2f} ms, a copy of gradients and buffers {1e3 * copy:.2f} ms: {ratio:.3f} (<= 1)"
    )


if __name__ == "__main__":
    main()
