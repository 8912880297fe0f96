"""Reverse golden parameters against single-shot masks of the same size: divergence, passes, seconds.

    python benchmarks/reverse_golden.py [--text FILE] [--family llama] [--percents 0.1] [--seeds 0 1 2]
    python benchmarks/reverse_golden.py --one-element MODEL [--text FILE] [--samples 4] [--length 24]

A byte-level GPT-2 of 0.84 M parameters, or a Llama of 0.75 M, is trained first, on the text where there is one and on
generated sentences otherwise. Masks are chosen on one part of its held-out end and measured on another. Prints ratios
measured in one run; absolute times, of the processor, depend on the machine. Of several seeds, each a model of its
own, it prints mean and standard deviation at the end; ``--keep FOLDER`` trains each model once for all runs. With
``--one-element`` it searches the single element of a folder of ``save_pretrained`` whose zeroing does most, chosen on
passages of the text (of a JSON list, its questions and answers) and measured on others that lie between them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lightning_goldy.analysis import reverse_golden_parameters
from lightning_goldy.analysis.golden.budget import STRATEGIES
from lightning_goldy.core import CausalLMObjective

LENGTH = 128
WORDS = ("the", "a", "small", "large", "red", "blue", "cat", "dog", "tree", "house", "sees", "likes", "finds", "under")
PLACES = (Path("shakespeare.txt"), Path(__file__).parents[2] / "shared" / "data" / "tinyshakespeare.txt")


def corpus(path: Path | None) -> tuple[torch.Tensor, str]:
    """Bytes to learn, and where they come from."""
    for place in [path] if path else PLACES:
        if place is not None and place.is_file():
            return torch.tensor(list(place.read_bytes())), place.name
        if path:
            raise SystemExit(f"there is no file {path}")
    generator = torch.Generator().manual_seed(0)
    words = [WORDS[index] for index in torch.randint(len(WORDS), (200_000,), generator=generator).tolist()]
    return torch.tensor(list(" ".join(words).encode())), "generated sentences, for there is no text file"


def windows(data: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    starts = torch.randint(len(data) - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([data[start : start + LENGTH] for start in starts])


def build(family: str) -> PreTrainedModel:
    ends = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        return GPT2LMHeadModel(GPT2Config(n_layer=4, n_head=4, n_embd=128, n_positions=LENGTH, **ends, **dropout))
    config = LlamaConfig(
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=128,
        intermediate_size=336,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        **ends,
    )
    return LlamaForCausalLM(config)


def trained(data: torch.Tensor, steps: int, family: str = "gpt2", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = build(family)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        ids = windows(data, 16, seed * steps + step)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def kept(data: torch.Tensor, steps: int, family: str, seed: int, folder: Path | None) -> PreTrainedModel:
    """A trained model, from the folder where it is there, and otherwise put there."""
    place = None if folder is None else folder / f"{family}-{steps}-{seed}"
    if place is not None and place.is_dir():
        return AutoModelForCausalLM.from_pretrained(place).eval()
    model = trained(data, steps, family, seed)
    if place is not None:
        model.save_pretrained(place)
    return model


def report(
    model: PreTrainedModel,
    choosing: torch.Tensor,
    measuring: torch.Tensor,
    shares: dict[str, list[float]],
    strategies: list[str],
    found: dict[str, list[float]],
) -> None:
    """Prints what each search finds, and adds it to what was found on other models."""
    for scope, percents in shares.items():
        for percent in percents:
            for strategy in strategies:
                began = time.process_time()
                result = reverse_golden_parameters(
                    model,
                    [{"input_ids": choosing}],
                    eval_batches=[{"input_ids": measuring}],
                    top_k_percent=percent,
                    scope=scope,
                    strategy=strategy,
                    # Scores of single samples make the strongest single-shot masks.
                    chunk_size=1,
                )
                seconds = time.process_time() - began
                found.setdefault(f"{percent:g} % ({scope}), {strategy}", []).append(result.kl_divergence)
                if strategy == strategies[0]:
                    shots = ", ".join(f"{name} {value:.2f}" for name, value in result.single_shots.items())
                    print(f"{percent:g} % ({scope}), single shots: {shots} nats")
                bound = " (>= 5)" if scope == "tensor" else ""
                print(
                    f"  {strategy}: {result.kl_divergence:.2f} nats ({result.search_divergence:.2f} on the choosing "
                    f"samples), {result.over_gradient:.1f} x |gradient|{bound}, "
                    f"{result.kl_divergence / max(result.single_shots.values()):.1f} x the best single shot (>= 1), "
                    f"{result.passes} passes (<= 281), {result.evaluations} evaluations, {seconds:.1f} s",
                    flush=True,
                )


def report_one_element(folder: Path, text: Path, samples: int, length: int, rounds: int) -> None:
    """Prints the element that a search with a budget of one finds, and what zeroing it does."""
    from transformers import AutoTokenizer

    content = text.read_text()[:400_000]
    if text.suffix == ".json":
        content = " ".join(f"{row['Question']} {row['answer'][0]}" for row in json.loads(content))
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(content)["input_ids"])
    starts = torch.linspace(0, len(ids) - length - 1, 2 * samples).long().tolist()
    passages = torch.stack([ids[start : start + length] for start in starts])
    choosing, measuring = passages[::2], passages[1::2]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    began = time.perf_counter()
    result = reverse_golden_parameters(
        model,
        [{"input_ids": choosing}],
        eval_batches=[{"input_ids": measuring}],
        top_k_percent=1e-9,
        scope="global",
        rounds=rounds,
    )
    (place,) = [(name, *where) for name in result.mask.space.names for where in result.mask[name].nonzero().tolist()]
    shots = ", ".join(f"{name} {value:.2f}" for name, value in result.single_shots.items())
    print(
        f"{text.name}, {samples} + {samples} passages of {length} tokens: {place[0]}{list(place[1:])}, "
        f"{result.search_divergence:.2f} nats on those that chose, {result.kl_divergence:.2f} on the others (>= 3); "
        f"single shots: {shots}; {result.passes} passes, {result.evaluations} evaluations, "
        f"{time.perf_counter() - began:.0f} s",
        flush=True,
    )


def one_pass(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Median seconds of a forward and a backward pass."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--family", choices=("gpt2", "llama"), default="gpt2")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of models and their training")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where trained models are kept and looked for")
    parser.add_argument("--scopes", nargs="+", choices=("tensor", "global"), default=["tensor", "global"])
    parser.add_argument("--percents", nargs="+", type=float, help="budgets; by default 0.1, 1, and 5 of every tensor")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--one-element", type=Path, metavar="MODEL", help="searches the one element that does most")
    parser.add_argument("--length", type=int, default=24, help="of its passages, tokens")
    parser.add_argument("--rounds", type=int, default=4, help="of its search")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--strategies", nargs="+", default=["none", "adaptive_sinusoidal"], choices=list(STRATEGIES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one_element:
        place = arguments.text or next(place for place in PLACES if place.is_file())
        report_one_element(arguments.one_element, place, arguments.samples, arguments.length, arguments.rounds)
        return
    data, source = corpus(arguments.text)
    print(f"text: {source}")
    end = int(0.9 * len(data))
    middle = (end + len(data)) // 2
    choosing, measuring = windows(data[end:middle], arguments.samples, 1), windows(data[middle:], arguments.samples, 2)
    usual = {"tensor": [0.1, 1.0, 5.0], "global": [0.1, 1.0]}
    shares = {scope: arguments.percents or usual[scope] for scope in arguments.scopes}
    found: dict[str, list[float]] = {}
    for seed in arguments.seeds:
        model = kept(data[:end], arguments.steps, arguments.family, seed, arguments.keep)
        with torch.no_grad():
            loss = float(CausalLMObjective().loss(model, {"input_ids": measuring}))
        size = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"seed {seed}: {size / 1e6:.2f} M parameters, held-out loss {loss:.3f} nats, {arguments.samples} + "
            f"{arguments.samples} samples of {LENGTH} bytes; one forward and backward pass "
            f"{one_pass(model, choosing):.2f} s"
        )
        report(model, choosing, measuring, shares, arguments.strategies, found)
    if len(arguments.seeds) > 1:
        for name, values in found.items():
            mean, spread = statistics.mean(values), statistics.stdev(values)
            print(f"{name}: {mean:.2f} nats on average over {len(values)} seeds, standard deviation {spread:.2f}")


if __name__ == "__main__":
    main()
