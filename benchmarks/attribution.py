"""Change attribution against forward + backward alone, its memory, and what grafts recover.

    python benchmarks/attribution.py [--model FOLDER --base FOLDER --text FILE --other FILE [--steps 40]]
    python benchmarks/attribution.py --shape 1b --device cuda --dtype bfloat16 --nodes 8

Prints medians of ratios over alternating repetitions in one run; absolute times depend on the machine. Nodes are timed
from the end of a first one to the end of the last, within one call; the ends (two forward passes), that first node and
the selection of the strongest elements come once. A model of 135 M parameters at 8 x 48 tokens takes 4 minutes of a
core. With
folders of a finetuned model and its base, and texts, the curve of grafts is printed too; a finetune that is not there
yet is made with AdamW on all but the last fifth of the text, which scores and tells. Of a base alone the times are
measured a random step away from it. Other text is a text file, or a JSON list of records with questions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_goldy.analysis import ChangeAttributionResult, change_attribution, graft_curve
from lightning_goldy.commands.graft import Wanted
from lightning_goldy.core import BaseParameters, ParameterVector

SHAPES = {
    "small": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 8192},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
}


def subject(arguments: argparse.Namespace) -> tuple[torch.nn.Module, BaseParameters]:
    """A model a step away from its base."""
    dtype = getattr(torch, arguments.dtype)
    if arguments.model:
        if not Path(arguments.model).is_dir():
            finetune(arguments)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
        base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=dtype)
        return model.to(arguments.device), BaseParameters(ParameterVector.of(base))
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8} if arguments.shape == "1b" else {}
    with torch.device(arguments.device):
        if arguments.base:
            model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=dtype).to(arguments.device).eval()
        else:
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[arguments.shape], **heads)).to(dtype).eval()
    base = BaseParameters(ParameterVector.of(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    return model, base


def finetune(arguments: argparse.Namespace) -> None:
    """AdamW on all but the last fifth of the text; the model is written where it was looked for."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32).to(arguments.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate)
    rows = blocks(arguments, arguments.text)
    rows = rows[: len(rows) * 4 // 5].to(arguments.device)
    for step in range(arguments.steps):
        ids = rows[torch.randint(len(rows), (8,))]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(arguments.model)


def now(device: str) -> float:
    """Seconds: on a CPU the process's own, on a GPU once it is done with what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" else time.perf_counter()


def peak(device: str) -> int:
    """Most memory so far: allocated on the GPU, else resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def blocks(arguments: argparse.Namespace, file: str) -> torch.Tensor:
    """The token ids of a text, [blocks, length]."""
    text = Path(file).read_text()
    if file.endswith(".json"):
        text = "\n".join(record.get("question") or record["Question"] for record in json.loads(text))
    ids = AutoTokenizer.from_pretrained(arguments.base)(text, verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // arguments.length * arguments.length]).view(-1, arguments.length)


def samples(arguments: argparse.Namespace, model: torch.nn.Module, file: str | None, count: int) -> torch.Tensor:
    """Token ids, [count, length], of the last fifth of a text of the finetune, and of the whole of other text."""
    if file is None:
        return torch.randint(0, model.config.vocab_size, (count, arguments.length), device=arguments.device)
    rows = blocks(arguments, file)
    rows = rows[len(rows) * 4 // 5 :] if file == arguments.text else rows
    return rows[torch.randperm(len(rows))[:count]].to(arguments.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a finetuned model")
    parser.add_argument("--base", help="folder of its base")
    parser.add_argument("--text", help="text of the finetune")
    parser.add_argument("--other", help="text that has nothing to do with it")
    parser.add_argument("--steps", type=int, default=40, help="of a finetune that is not there yet")
    parser.add_argument("--rate", type=float, default=5e-5, help="its learning rate")
    parser.add_argument("--only", choices=("times", "grafts"), help="leave the other part out")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--nodes", type=int, default=2, help="that are timed, beside a first one")
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
    ids = samples(arguments, model, arguments.text, 3 * arguments.samples)
    scored, held_out = ids[: arguments.samples], ids[arguments.samples :]
    print(f"{elements / 1e6:.0f} M parameters, {arguments.samples} x {arguments.length} tokens, {arguments.dtype}")
    if arguments.only != "grafts":
        print_times(arguments, model, base, scored, size, elements)
    if arguments.text and arguments.only != "times":
        other = samples(arguments, model, arguments.other, arguments.samples)
        print_grafts(model, base, scored, held_out, other)


def print_times(
    arguments: argparse.Namespace,
    model: torch.nn.Module,
    base: BaseParameters,
    scored: torch.Tensor,
    size: int,
    elements: int,
) -> None:
    """Memory and time of nodes beside a step's."""

    def step(samples: torch.Tensor) -> None:
        model(input_ids=samples, labels=samples, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    def stepped(together: int) -> list[list[float]]:
        """Seconds of each pass of so many samples, as often as there are nodes."""
        rows = []
        for _ in range(arguments.nodes):
            times = [now(arguments.device)]
            for samples in scored.split(together):
                step(samples)
                times.append(now(arguments.device))
            rows.append([after - before for before, after in itertools.pairwise(times)])
        return rows

    def attributed(nodes: int) -> tuple[list[list[float]], float, ChangeAttributionResult]:
        """Seconds of each pass at all nodes but the first, moving there with the first pass, and of the rest."""
        ends: list[float] = []
        start = now(arguments.device)
        found = change_attribution(
            model,
            base,
            [{"input_ids": scored}],
            nodes=nodes,
            progress=lambda done, total: ends.append(now(arguments.device)),
        )
        whole, count = now(arguments.device) - start, len(ends) // nodes
        times = ends[count - 1 :]
        steps = [after - before for before, after in itertools.pairwise(times)]
        return [steps[i : i + count] for i in range(0, len(steps), count)], whole - sum(steps), found

    step(scored[:2])
    before = peak(arguments.device)
    # Touches all that the timed calls do, so that none of them is the first.
    found = attributed(1)[2]
    grown = peak(arguments.device) - before
    print(
        f"memory beyond a step's: {grown / 2**20:.0f} MiB, {grown / size:.2f} x the parameters, "
        f"{grown / (size + 4 * elements):.2f} x (base + a float32 accumulator)",
        flush=True,
    )
    attributions, plains, alike, onces = [], [], [], []
    for _ in range(arguments.repetitions):
        more, once, found = attributed(1 + arguments.nodes)
        together = len(scored) // len(more[0])
        attributions += more
        plains += stepped(1)
        alike += stepped(together) if together > 1 else plains[-arguments.nodes :]
        onces.append(once)
        seconds = (sum(map(sum, rows[-arguments.nodes :])) for rows in (attributions, alike, plains))
        told = "{} nodes {:.2f} s, forward + backward of {} together {:.2f} s, of each sample alone {:.2f} s"
        node, passes, plain = seconds
        print(told.format(arguments.nodes, node, together, passes, plain), flush=True)
    # Of each pass the median of all times: what else a machine does comes in bursts.
    node, passes, plain = (
        sum(map(statistics.median, zip(*rows, strict=True))) for rows in (attributions, alike, plains)
    )
    print(
        f"a node against forward + backward, medians of {len(plains)} times: of each sample alone ratio "
        f"{node / plain:.3f} (<= 1.1), of {together} together, as the node has them, {node / passes:.3f}; the ends, "
        f"one node and the selection, once: {statistics.median(onces):.2f} s; gap {found.gap:.2g}"
    )


def print_grafts(
    model: torch.nn.Module, base: BaseParameters, scored: torch.Tensor, held_out: torch.Tensor, other: torch.Tensor
) -> None:
    """What grafts recover and harm, and which of them are taken for a wish."""
    found = change_attribution(model, base, [{"input_ids": scored}], nodes="auto")
    print(found.headline(), flush=True)
    curve = graft_curve(
        model,
        base,
        found,
        [{"input_ids": scored}],
        [{"input_ids": held_out}],
        [{"input_ids": other}],
        baselines=("magnitude", "random", "interpolation", "drop_and_rescale"),
        factors=(0.5, 0.6, 0.7, 0.8, 0.9),
        samples_per_pass=16,
        n_draws=1,
    )
    print(curve.headline())
    print(f"held-out loss {curve.base_value:.3f} to {curve.value:.3f}; other text {curve.base_collateral:.3f} before")
    for point in curve.records:
        print(
            f"{point.method:16} share {point.share:.3f} factor {point.factor:.3g}: recovers {point.recovered:.3f} "
            f"[{point.low:.3f}, {point.high:.3f}], harm {point.harm:+.4f}, KL {point.kl:.4f}"
            f"{'  frontier' if point.on_frontier else ''}"
        )
    for recover in (0.5, 0.8, 0.95):
        taken = Wanted(recover=recover).of(curve)
        enough = [point for point in curve.records if (point.recovered or 0.0) >= recover]
        least = min(point.harm or 0.0 for point in enough)
        named = f"{taken.method}, share {taken.share:.3g}, factor {taken.factor:.3g}"
        print(
            f"--recover {recover} --method best takes {named}: harm {taken.harm:+.4f}; least harm of the {len(enough)} "
            f"that recover as much: {least:+.4f}; on the frontier: {taken.on_frontier}"
        )


if __name__ == "__main__":
    main()
