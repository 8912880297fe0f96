"""Knowledge coupling against a loop of one forward and one backward pass per piece: seconds, memory, agreement.

    python benchmarks/coupling.py
    python benchmarks/coupling.py --device cuda --pieces 256
    python benchmarks/coupling.py --many 10000

GPT-2-small shape, all MLP output projections, one thread. Every way runs once in a process of its own, which tells its
seconds and how much its largest resident size grew. Prints ratios; absolute times depend on the machine. ``--many``
couples so many pieces of a small model through a folder instead, stops half-way, and goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_goldy.analysis import knowledge_coupling
from lightning_goldy.core import CausalLMObjective

ANSWER = 6
WAYS = ("loop", "loop of selected gradients", "coupling")


def subject(device: str) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).eval().to(device)


def batch(pieces: int, tokens: int, vocabulary: int, device: str) -> dict[str, Tensor]:
    ids = torch.randint(0, vocabulary, (pieces, tokens), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :-ANSWER] = -100
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def cosines(gradients: Tensor) -> Tensor:
    """In slices, for one long sum in float32 is off by a hundredth."""
    gram = sum((part @ part.T).double() for part in gradients.split(1 << 15, dim=1))
    norms = gram.diagonal().sqrt()
    return gram / norms[:, None] / norms


def loop(model: GPT2LMHeadModel, data: dict[str, Tensor], selected: bool) -> Tensor:
    """What one would write: all gradients by ``backward``, or by ``autograd.grad`` the selected ones alone."""
    weights = [block.mlp.c_proj.weight for block in model.transformer.h]
    found = torch.empty(len(data["labels"]), sum(map(torch.numel, weights)), device=data["labels"].device)
    for row, (ids, labels) in enumerate(zip(data["input_ids"], data["labels"], strict=True)):
        loss = model(input_ids=ids[None], labels=labels[None], use_cache=False).loss
        if selected:
            gradients = torch.autograd.grad(loss, weights)
        else:
            model.zero_grad()
            loss.backward()
            gradients = [weight.grad for weight in weights]
        torch.cat([gradient.flatten() for gradient in gradients], out=found[row])
    return cosines(found)


def resident(field: str) -> int:
    """VmRSS, the present resident size, or VmHWM, the largest since the last reset, bytes; Linux only."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def measure(way: str, arguments: argparse.Namespace) -> None:
    """Runs one way, prints seconds and bytes, and saves the matrix."""
    device = arguments.device
    model, data = subject(device), batch(arguments.pieces, arguments.tokens, 50257, device)
    with torch.no_grad():  # libraries allocate their workspaces on first use
        CausalLMObjective().log_probs(model, {name: value[:1] for name, value in data.items()})
    if device == "cuda":
        # Kernels are chosen and loaded on first use.
        loop(model, batch(2, arguments.tokens, 50257, device), selected=True)
        knowledge_coupling(model, [batch(arguments.pieces, arguments.tokens, 50257, device)])
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
        before = resident("VmRSS")
    # Seconds of this process alone on a CPU, for others may be at work.
    clock = time.perf_counter if device == "cuda" else time.process_time
    began = clock()
    if way == "coupling":
        matrix = knowledge_coupling(model, [data]).matrix
    else:
        matrix = loop(model, data, selected=way != "loop").cpu()
    seconds = clock() - began
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    save_file({"matrix": matrix.double()}, arguments.output)
    print(json.dumps({"seconds": seconds, "bytes": peak - before}))


def compare(arguments: argparse.Namespace) -> None:
    found, matrices = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            path = f"{folder}/{WAYS.index(way)}.safetensors"
            options = ("device", "pieces", "tokens", "threads")
            settings = [text for name in options for text in (f"--{name}", str(getattr(arguments, name)))]
            command = [sys.executable, __file__, *settings, "--way", way, "--output", path]
            found[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            matrices[way] = load_file(path)["matrix"]
            print(f"{way}: {found[way]['seconds']:.2f} s, {found[way]['bytes'] / 2**30:.2f} GiB")
    mine = found["coupling"]
    for way in WAYS[:-1]:
        error = float((matrices[way] - matrices["coupling"]).abs().max())
        print(
            f"against the {way}: {found[way]['seconds'] / mine['seconds']:.1f} x faster, "
            f"1/{found[way]['bytes'] / mine['bytes']:.1f} of the memory, cosines off by {error:.1e} at most"
        )
    wanted = ">= 10 x" if arguments.device == "cuda" else ">= 3 x, <= 1/8 of the memory"
    print(f"wanted against the loop: {wanted}, cosines to 1e-5")


class StopHereError(Exception):
    """An interruption."""


def many(arguments: argparse.Namespace) -> None:
    """Couples many pieces of a small model through a folder, stops half-way, and goes on."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=256, n_positions=32, bos_token_id=0, eos_token_id=0)
    model, data = GPT2LMHeadModel(config).eval(), batch(arguments.many, 16, 256, "cpu")

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise StopHereError

    with tempfile.TemporaryDirectory() as folder:
        options = {"workspace": f"{folder}/blocks", "memory_limit": 64 << 20}
        Path("/proc/self/clear_refs").write_text("5")
        before, began = resident("VmRSS"), time.perf_counter()
        try:
            knowledge_coupling(model, [data], progress=stop, **options)
        except StopHereError:
            print(f"stopped after {time.perf_counter() - began:.1f} s")
        began = time.perf_counter()
        result = knowledge_coupling(model, [data], **options)
        matrix = result.matrix.numel() * result.matrix.element_size()
        print(
            f"{arguments.many} pieces: {time.perf_counter() - began:.1f} s for the rest, largest size "
            f"{(resident('VmHWM') - before) / 2**30:.2f} GiB, of which the matrix {matrix / 2**30:.2f} GiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pieces", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--many", type=int, default=0)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.way:
        measure(arguments.way, arguments)
    elif arguments.many:
        many(arguments)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
