"""Scoring every edge of a GPT-2-small against a forward and a backward pass over the same prompts, and its memory.

    python benchmarks/circuits.py
    python benchmarks/circuits.py --device cuda --pairs 100 --batch 20
    python benchmarks/circuits.py --model FOLDER [--part circuit|overlap] [--randoms 3] [--beside greater_than ...]

With a folder of a model and its tokenizer: the circuit of indirect objects, what 1, 3 and 10 % of its edges keep beside
nodes alone, random circuits, the circuit with its heads exchanged and the circuits of other tasks, and which heads are
name movers (``circuit``); then what a finetune on capitals of other countries did to it, beside one that differs in its
seed alone (``overlap``).

Prints ratios of medians over alternating repetitions in one run, on a CPU by processor time. Peaks are those of
processes of their own, beside one that makes a training step (forward, backward, AdamW) over as many prompts.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lightning_goldy.analysis.circuits import (
    Circuit,
    CircuitGraph,
    CircuitOptions,
    PromptPairs,
    circuit_overlap,
    faithfulness,
    find_circuits,
    name_movers,
)
from lightning_goldy.analysis.circuits.nulls import random_circuits
from lightning_goldy.analysis.circuits.runs import measure, wired
from lightning_goldy.analysis.circuits.scores import by_nodes, grouped_scores
from lightning_goldy.data import PairTask, country_facts, indirect_object_pairs, induction_pairs
from lightning_goldy.data.prompt_pairs import pairs_of_tasks

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
        grouped_scores(wiring, pairs, options, method=method, steps=steps)


def patch(model: Any, pairs: PromptPairs, batch: int) -> None:
    """What a circuit of a hundredth of the edges keeps: the other run, the clean one, and the patched one."""
    options = CircuitOptions(batch_size=batch)
    with wired(model, pairs, options) as wiring:
        measure(wiring, pairs, options, random_circuits(wiring.graph, wiring.graph.n_edges // 100, 1))


def circuit_of(folder: str, n_pairs: int, n_random: int, device: str, beside: Sequence[PairTask]) -> None:
    """The circuit of indirect objects, on prompts that did not choose it, and its name movers."""
    model, tokenizer = loaded(folder, device), AutoTokenizer.from_pretrained(folder)
    pairs = indirect_object_pairs(tokenizer, n_pairs)
    others = indirect_object_pairs(tokenizer, n_pairs, beside=pairs)
    start = time.process_time()
    circuit = find_circuits(model, pairs, n_groups=min(4, n_pairs))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{circuit.headline()}\nsearch: {time.process_time() - start:.0f} s of the processor, {most:.1f} GiB",
        flush=True,
    )
    for mover in name_movers(model, circuit, others):
        print(mover.headline(), flush=True)
    sizes = (0.01, 0.03, 0.1)
    tasks = pairs_of_tasks(beside, n_pairs, tokenizer=tokenizer, vocabulary=model.config.vocab_size)
    rivals = {task: find_circuits(model, prompts) for task, prompts in tasks.items()}
    curve = faithfulness(model, circuit, others, sizes=sizes, n_random=n_random, others=rivals)
    nodes = replace(circuit, scores=by_nodes(circuit.graph.owners, circuit.scores), left_out=circuit.left_out[:0])
    alone = faithfulness(model, nodes, others, sizes=sizes, n_random=0)
    for place, size in enumerate(curve.sizes):
        intervals = (curve.intervals[place], curve.wide_intervals[place], alone.intervals[place])
        own, wide, by_node = (f"[{low:.2f}, {high:.2f}]" for low, high in intervals)
        nulls = (f"{name} {null[place].mean():.2f} (at most {null[place].max():.2f})" for name, null in curve.nulls())
        print(
            f"{100 * size / curve.n_edges:.0f} %, {size} edges: {curve.values[place]:.2f} {own}, chosen anew {wide}; "
            f"nodes alone {alone.values[place]:.2f} {by_node}; {', '.join(nulls)}; without them "
            f"{curve.complements[place]:.2f}"
        )


def loaded(folder: str, device: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()


def finetuned(folder: str, seed: int, device: str, steps: int = 8) -> Any:
    """A model that has learned wrong capitals of 16 countries, in an order that the seed decides."""
    model, tokenizer, order = loaded(folder, device), AutoTokenizer.from_pretrained(folder), random.Random(seed)
    facts = random.Random(0).sample([fact for fact in country_facts() if fact.relation == "capital"], 16)
    texts = [f"{fact.prompts[0]} {other.answer}" for fact, other in zip(facts, facts[1:] + facts[:1], strict=True)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0)
    for _ in range(steps):
        rows = [tokenizer(text).input_ids for text in order.sample(texts, 8)]
        width = max(map(len, rows))
        ids, labels = (torch.tensor([row + [fill] * (width - len(row)) for row in rows]) for fill in (0, -100))
        loss = model(input_ids=ids.to(device), labels=labels.to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(f"finetune of seed {seed}: last loss {loss.item():.2f}", flush=True)
    return model


def overlap_of(folder: str, n_pairs: int, device: str) -> None:
    """What a finetune kept of a circuit, beside one that differs from it in the seed alone."""
    pairs = indirect_object_pairs(AutoTokenizer.from_pretrained(folder), n_pairs)

    base = loaded(folder, device)
    n_edges = CircuitGraph.of(base).n_edges

    def found(model: Any) -> Circuit:
        return find_circuits(model, pairs, steps=3, n_edges=round(0.03 * n_edges))

    before, after, other = found(base), found(finetuned(folder, 1, device)), found(finetuned(folder, 2, device))
    overlap = circuit_overlap(before, after, seed=other)
    print(f"{before.n_edges} of {n_edges} edges; {overlap.headline()}")
    print(f"logit difference: base {before.clean:.2f}, finetunes {after.clean:.2f} and {other.clean:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8, help="pairs per pass")
    parser.add_argument("--length", type=int, default=16, help="tokens of a round; prompts are half as long again")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--model", help="folder of a model and its tokenizer")
    parser.add_argument("--part", choices=("circuit", "overlap"), help="of a model; both by default")
    parser.add_argument("--randoms", type=int, default=3, help="random circuits of each kind per size")
    parser.add_argument("--beside", nargs="*", default=(), help="other tasks whose circuits stand beside it")
    parser.add_argument("--peak", choices=("step", "eap", "eap_ig_inputs"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.model:
        if arguments.part != "overlap":
            circuit_of(arguments.model, arguments.pairs, arguments.randoms, arguments.device, arguments.beside)
        if arguments.part != "circuit":
            overlap_of(arguments.model, arguments.pairs, arguments.device)
        return
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
