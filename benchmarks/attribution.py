"""Change attribution against forward + backward alone, its memory, and what grafts recover.

    python benchmarks/attribution.py [--model FOLDER --base FOLDER --text FILE --other FILE]
    python benchmarks/attribution.py --shape 1b --device cuda --dtype bfloat16 --nodes 8

Prints medians of ratios over alternating repetitions in one run; absolute times depend on the machine. A node is what
one more of them costs; the ends (two forward passes) and the selection of the strongest elements come once. With
folders of a finetuned model and its base, and texts, the curve of grafts is printed too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_goldy.analysis import ChangeAttributionResult, change_attribution, graft_curve
from lightning_goldy.core import BaseParameters, ParameterVector

SHAPES = {
    "small": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 8192},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
}


def subject(arguments: argparse.Namespace) -> tuple[torch.nn.Module, BaseParameters]:
    """A model a step away from its base."""
    dtype = getattr(torch, arguments.dtype)
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
        base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=dtype)
        return model.to(arguments.device), BaseParameters(ParameterVector.of(base))
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8} if arguments.shape == "1b" else {}
    with torch.device(arguments.device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[arguments.shape], **heads)).to(dtype).eval()
    base = BaseParameters(ParameterVector.of(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    return model, base


def seconds(function: Callable[[], object], device: str) -> float:
    start = time.process_time() if device == "cpu" else time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.process_time() if device == "cpu" else time.perf_counter()) - start


def compare(functions: Sequence[Callable[[], object]], count: int, device: str) -> list[list[float]]:
    """Seconds of each function, in turns, after one that does not count; on a CPU in the process's own time."""
    return [[seconds(function, device) for function in functions] for _ in range(count + 1)][1:]


def peak(device: str) -> int:
    """Most memory so far: allocated on the GPU, else resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def samples(arguments: argparse.Namespace, model: torch.nn.Module, file: str | None, count: int) -> torch.Tensor:
    """Token ids, [count, length]."""
    if file is None:
        return torch.randint(0, model.config.vocab_size, (count, arguments.length), device=arguments.device)
    ids = AutoTokenizer.from_pretrained(arguments.base)(Path(file).read_text())["input_ids"]
    rows = torch.tensor(ids[: len(ids) // arguments.length * arguments.length]).view(-1, arguments.length)
    return rows[torch.randperm(len(rows))[:count]].to(arguments.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a finetuned model")
    parser.add_argument("--base", help="folder of its base")
    parser.add_argument("--text", help="text of the finetune")
    parser.add_argument("--other", help="text that has nothing to do with it")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    model, base = subject(arguments)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    elements = sum(parameter.numel() for parameter in model.parameters())
    ids = samples(arguments, model, arguments.text, 4 * arguments.samples)
    scored, held_out = ids[: arguments.samples], ids[arguments.samples :]
    print(f"{elements / 1e6:.0f} M parameters, {arguments.samples} x {arguments.length} tokens, {arguments.dtype}")

    def step(sample: torch.Tensor) -> None:
        model(input_ids=sample, labels=sample, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    def alone() -> None:
        for _ in range(arguments.nodes):
            for sample in scored.split(1):
                step(sample)

    def attributed(nodes: int) -> ChangeAttributionResult:
        return change_attribution(model, base, [{"input_ids": scored}], nodes=nodes)

    step(scored[:2])
    before = peak(arguments.device)
    found = attributed(arguments.nodes)
    grown = peak(arguments.device) - before
    print(
        f"memory beyond a step's: {grown / 2**20:.0f} MiB, {grown / size:.2f} x the parameters, "
        f"{grown / (size + 4 * elements):.2f} x (base + a float32 accumulator)"
    )
    whole, single = partial(attributed, 1 + arguments.nodes), partial(attributed, 1)
    times = compare([whole, alone, single], arguments.repetitions, arguments.device)
    ratio = statistics.median((many - one) / plain for many, plain, one in times)
    took, plain = (statistics.median(row[place] for row in times) for place in (0, 1))
    once = statistics.median(one - (many - one) / arguments.nodes for many, _, one in times)
    print(
        f"{arguments.nodes} more nodes against forward + backward of each sample alone, {plain:.2f} s: "
        f"ratio {ratio:.3f} (<= 1.1); ends and selection, once: {once:.2f} s of {took:.2f}; gap {found.gap:.2g}"
    )
    if not arguments.text:
        return
    other = samples(arguments, model, arguments.other, 2 * arguments.samples)
    options = {"shares": (0.001, 0.01, 0.05, 0.1, 0.2), "samples_per_pass": 16}
    found = change_attribution(model, base, [{"input_ids": scored}], nodes="auto", shares=options["shares"])
    print(found.headline())
    curve = graft_curve(
        model, base, found, [{"input_ids": scored}], [{"input_ids": held_out}], [{"input_ids": other}], **options
    )
    print(curve.headline())
    for point in curve.records:
        print(
            f"{point.method:16} share {point.share:.3f} factor {point.factor:.3g}: recovers {point.recovered:.3f} "
            f"[{point.low:.3f}, {point.high:.3f}], harm {point.harm:+.4f}, KL {point.kl:.4f}"
            f"{'  frontier' if point.on_frontier else ''}"
        )


if __name__ == "__main__":
    main()
