"""What gating, freezing, scoring and compacting attention heads cost and save, and which score agrees with ablation.

    python benchmarks/heads.py
    python benchmarks/heads.py --device cuda --dtype bfloat16 --layers 12 --heads 12 --width 768
    python benchmarks/heads.py --agreement gpt2 llama
    python benchmarks/heads.py --agreement MODEL --text FILE

The first two at 30 M parameters. The agreement is that of every score with what closing each head alone costs: on
models of bytes that learn the atlas first, or on MODEL, a folder of `save_pretrained`, with blocks of a text; and what
closing a fifth of the heads costs by each score, on samples that did not score.

Prints medians of ratios over alternating repetitions in one run, on a CPU of processor time, which other programs
disturb less; absolute times depend on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lightning_goldy.analysis import HeadFreeze, HeadGates, compact, head_importance
from lightning_goldy.analysis.agreement import agreement_of
from lightning_goldy.analysis.heads import HeadScores
from lightning_goldy.core import CausalLMObjective
from lightning_goldy.core.pieces import PadCollator, encode_pieces
from lightning_goldy.data import byte_tokenizer, load_pieces


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

    for strategy in ("magnitude", "first_order"):
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

    scored, alone, ratio = paired(lambda: head_importance(eager, [batch], strategy="entropy"), forward, arguments)
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


SCORES = ("first_order", "taylor", "magnitude", "entropy", "combined")
SEEDS, LEVEL = 5, 0.2


def atlas_subject(family: str, steps: int) -> tuple[Any, list[Any], list[Any]]:
    """A model of bytes after so many steps on the atlas, probe batches in its words and others."""
    tokenizer = byte_tokenizer()
    pieces = load_pieces("atlas").pieces
    samples = encode_pieces(pieces, tokenizer, template="{question}")
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 256, "eos_token_id": 256}
    if family == "gpt2":
        config: Any = GPT2Config(n_layer=4, n_head=8, n_embd=96, n_positions=128, **sizes)
    else:
        config = LlamaConfig(
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            hidden_size=96,
            intermediate_size=256,
            max_position_embeddings=128,
            **sizes,
        )
    model: Any = GPT2LMHeadModel(config) if family == "gpt2" else LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    collate = PadCollator(257)
    for step in range(steps):
        batch = collate([samples[order[(32 * step + row) % len(order)]] for row in range(32)])
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
        optimizer.zero_grad()
        CausalLMObjective().loss(model, batch).backward()
        optimizer.step()
    return model.eval(), [collate([samples[at] for at in order[:64]])], [collate([samples[at] for at in order[64:192]])]


def text_subject(folder: str, text: str) -> tuple[Any, list[Any], list[Any]]:
    """A saved model, and 8 + 16 blocks of 64 tokens, evenly spaced over the beginning of a text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(tokenizer(Path(text).read_text(encoding="utf-8")[:400_000])["input_ids"])
    blocks = ids[: len(ids) // 64 * 64].view(-1, 64)
    chosen = blocks[torch.arange(24) * (len(blocks) // 24)]
    return model.eval(), [{"input_ids": chosen[:8]}], [{"input_ids": chosen[8:]}]


def print_agreement(model: Any, probe: list[Any], held_out: list[Any], exact: HeadScores | None = None) -> None:
    """The table of one model; ``exact`` where ablations of the probe are known."""
    gates = HeadGates(model)
    exact = exact or head_importance(model, probe, strategy="ablation")
    known = [float(exact.scores[head]) for head in exact.ranking()]
    count = int(LEVEL * len(known) + 0.5)

    def cost(scores: HeadScores) -> float:
        with torch.no_grad(), gates.closing_only(sorted(scores.least_important(LEVEL))):
            return float(
                torch.cat([-CausalLMObjective().log_probs(model, batch).double() for batch in held_out]).mean()
            )

    with torch.no_grad():
        before = float(torch.cat([-CausalLMObjective().log_probs(model, batch).double() for batch in held_out]).mean())
    print(f"{len(known)} heads, loss {before:.3f} nats on samples that did not score")
    print(f"| score | Spearman with ablation | loss with {count} heads closed, nats more |\n|---|---|---|", flush=True)
    for strategy in SCORES:
        scores = head_importance(model, probe, strategy=strategy)
        found = agreement_of([float(scores.scores[head]) for head in exact.ranking()], known).spearman
        print(f"| `{strategy}` | {found:.2f} | {cost(scores) - before:+.3f} |", flush=True)
    print(f"| `ablation` | 1 | {cost(exact) - before:+.3f} |", flush=True)
    drawn = [cost(head_importance(model, probe, strategy="random", seed=seed)) - before for seed in range(SEEDS)]
    print(f"| `random`, {SEEDS} seeds | | {min(drawn):+.3f} to {max(drawn):+.3f} |", flush=True)


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
    parser.add_argument("--agreement", nargs="+", metavar="MODEL", help="gpt2, llama, or a folder of save_pretrained")
    parser.add_argument("--text", help="a text for the models of folders")
    parser.add_argument("--steps", type=int, default=400, help="that gpt2 and llama learn the atlas for")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.agreement or ():
        print(f"\n{name}")
        small = name in ("gpt2", "llama")
        print_agreement(*(atlas_subject(name, arguments.steps) if small else text_subject(name, arguments.text)))
    if arguments.agreement:
        return
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
