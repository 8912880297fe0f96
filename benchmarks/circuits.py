"""Scoring every edge of a GPT-2-small against a forward and a backward pass over the same prompts, and its memory.

    python benchmarks/circuits.py
    python benchmarks/circuits.py --device cuda --pairs 100 --batch 20

Prints ratios of medians over alternating repetitions in one run, on a CPU by processor time. Peaks are those of
processes of their own, beside one that makes a training step (forward, backward, AdamW) over as many prompts.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_goldy.analysis.circuits import CircuitOptions, PromptPairs
from lightning_goldy.analysis.circuits.circuit import random_circuits
from lightning_goldy.analysis.circuits.runs import measure, wired
from lightning_goldy.analysis.circuits.scores import edge_scores
from lightning_goldy.data import induction_pairs

VOCABULARY = 50257


def subject(device: str) -> Any:
    """A GPT-2 of the small shape, 124 M parameters, untrained."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).to(device).eval()


def prompts(count: int, length: int) -> PromptPairs:
    """Pairs whose prompts have one and a half times so many tokens."""
    return induction_pairs(range(VOCABULARY - 1), count, length=length)


def pass_over(model: Any, pairs: PromptPairs, device: str, batch: int) -> None:
    """A forward and a backward pass over the clean prompts."""
    for places in pairs.batches(batch):
        ids = torch.tensor([pairs.clean[place] for place in places], device=device)
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()


def seconds(function: Callable[[], object], device: str) -> float:
    start = time.process_time() if device == "cpu" else time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.process_time() if device == "cpu" else time.perf_counter()) - start


def peak(what: str, pairs: PromptPairs, batch: int) -> None:
    """Prints this process's peak after one training step, or after scoring all edges, in MiB."""
    model = subject("cpu")
    if what == "step":
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.tensor(pairs.take(range(batch)).clean)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    else:
        score(model, pairs, what, batch)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def score(model: Any, pairs: PromptPairs, method: Any, batch: int, steps: int = 5) -> None:
    options = CircuitOptions(batch_size=batch)
    with wired(model, pairs, options) as wiring:
        edge_scores(wiring, pairs, options, method=method, steps=steps)


def patch(model: Any, pairs: PromptPairs, batch: int) -> None:
    """What a circuit of a hundredth of the edges keeps: the other run, the clean one, and the patched one."""
    options = CircuitOptions(batch_size=batch)
    with wired(model, pairs, options) as wiring:
        measure(wiring, pairs, options, random_circuits(wiring.graph, wiring.graph.n_edges // 100, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8, help="pairs per pass")
    parser.add_argument("--length", type=int, default=16, help="tokens of a round; prompts are half as long again")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--peak", choices=("step", "eap", "eap_ig_inputs"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pairs, device, batch = prompts(arguments.pairs, arguments.length), arguments.device, arguments.batch
    if arguments.peak:
        peak(arguments.peak, pairs, batch)
        return
    model = subject(device)
    jobs: dict[str, Callable[[], object]] = {
        "forward + backward": lambda: pass_over(model, pairs, device, batch),
        "eap": lambda: score(model, pairs, "eap", batch),
        f"eap_ig_inputs, {arguments.steps} steps": lambda: score(model, pairs, "eap_ig_inputs", batch, arguments.steps),
        "a circuit measured": lambda: patch(model, pairs, batch),
    }
    rounds = [{name: seconds(job, device) for name, job in jobs.items()} for _ in range(arguments.repetitions + 1)][1:]
    print(f"{len(pairs)} pairs of {len(pairs.clean[0])} tokens, {batch} per pass, {device}")
    for name in jobs:
        own = statistics.median(one[name] for one in rounds)
        ratio = statistics.median(one[name] / one["forward + backward"] for one in rounds)
        print(f"{name:28} {own:8.3f} s  {ratio:6.2f} x forward + backward  {len(pairs) / own:7.2f} pairs per second")
    if device == "cpu":
        sizes = ("--pairs", str(arguments.pairs), "--batch", str(batch), "--length", str(arguments.length))
        for what in ("step", "eap", "eap_ig_inputs"):
            command = [sys.executable, __file__, "--peak", what, *sizes]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"peak of {what:20} {float(done.stdout):8.0f} MiB")


if __name__ == "__main__":
    main()
