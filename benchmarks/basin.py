"""Basin volume: bridges against exact volumes; rays against doubling and bisection: evaluations, seconds, memory.

    python benchmarks/basin.py
    python benchmarks/basin.py --only network --model FOLDER --text FILE --last-layers 1 --gradients 200 --chains 2

A small GPT-2-shaped model is trained on generated text for seconds first. Prints ratios measured in one run; absolute
times depend on the machine. ``--only network`` walks bridges around a small network that it trains, or around the last
blocks of a folder of ``save_pretrained``; with ``--keep-in`` what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_goldy.analysis import adam_preconditioner, basin_volume, kronecker_preconditioner, local_volume
from lightning_goldy.analysis.basin import BridgeResult, BridgeSettings, kronecker_fisher
from lightning_goldy.analysis.basin.bridge import Path as Crossing
from lightning_goldy.analysis.divergence import AnchoredDivergence, Cache
from lightning_goldy.core import CausalLMObjective, ParameterSpace, ParameterVector
from lightning_goldy.core.vector import Ray, direction_seed

WORDS = ("the", "a", "small", "large", "red", "blue", "cat", "dog", "tree", "house", "sees", "likes", "finds", "under")


def text(length: int, seed: int) -> torch.Tensor:
    """Bytes of generated sentences: something to learn that needs no file."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(WORDS), (length,), generator=generator).tolist()
    order = [WORDS[(a + index % 3) % len(WORDS)] for index, a in enumerate(sorted(chosen[:7]) * (length // 7))]
    return torch.tensor(list(" ".join(order).encode()))[:length]


def trained(layers: int, width: int, steps: int) -> tuple[GPT2LMHeadModel, torch.optim.AdamW]:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers,
        n_head=4,
        n_embd=width,
        vocab_size=256,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(steps):
        ids = torch.stack([text(64, 16 * step + row) for row in range(16)])
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval(), optimizer


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.stack([text(128, 10_000 + 8 * i + row) for row in range(8)])} for i in range(count)]


def reference(
    model: torch.nn.Module, data: list, n_directions: int, cutoff: float, rtol: float, *, cache: Cache = "auto"
) -> tuple[int, float]:
    """Doubles the radius from 1 until outside, then bisects; with held directions and, by default, kept anchors."""
    began, evaluations = time.perf_counter(), 0
    with torch.no_grad():
        divergence = AnchoredDivergence(model, data, CausalLMObjective(), cache=cache)
        with Ray(model, ParameterSpace.of(model), explicit=True) as ray:
            for index in range(n_directions):
                ray.turn(direction_seed(0, index))
                low, high, radius = 0.0, float("inf"), 1.0
                while True:
                    ray.move(1.0, radius)
                    value = divergence(model)
                    evaluations += 1
                    if abs(value / cutoff - 1) <= rtol:
                        break
                    low, high = (radius, high) if value < cutoff else (low, radius)
                    radius = 2 * radius if high == float("inf") else (low + high) / 2
    return evaluations, time.perf_counter() - began


def resident(field: str) -> int:
    """VmRSS, the present resident size, or VmHWM, the largest since the last reset, bytes; Linux only."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def print_memory(work: str) -> None:
    """Growth of the largest resident size, bytes, in a process of its own: a used heap hides what is allocated."""
    model, _ = trained(12, 768, 0)
    data = batches(1)
    with torch.no_grad():  # libraries allocate their workspaces on first use
        CausalLMObjective().logits_and_targets(model, {key: value[:1] for key, value in data[0].items()})
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
    before = resident("VmRSS")
    if work == "forward":
        with torch.no_grad():
            for batch in data:
                torch.log_softmax(CausalLMObjective().logits_and_targets(model, batch).logits, -1)
    else:
        basin_volume(model, data, n_directions=2, directions=work)
    print(resident("VmHWM") - before)


def memory(work: str) -> int:
    command = [sys.executable, __file__, "--memory", work]
    # Freed memory goes back at once, or what the heap happens to keep adds tens of MiB.
    heap = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | heap).stdout)


def compare(model: torch.nn.Module, data: list, n_directions: int) -> None:
    """Prints how much longer doubling and bisection takes, by what it promises and by what it keeps."""
    # A radius that basin_volume returns is good to a tenth of rtol; the reference's, to the cost that it accepted.
    cases: list[tuple[str, float, Cache, int]] = [
        ("to the same tolerance of the returned radius", 1e-3, "auto", 3),
        ("to the same tolerance of the last evaluated cost", 1e-2, "auto", 3),
        ("the same, and both models run at every evaluation", 1e-2, "none", 1),
    ]
    for meaning, rtol, cache, repetitions in cases:
        ratios = []
        for _ in range(repetitions):
            began = time.perf_counter()
            mine = basin_volume(model, data, n_directions=n_directions).total_evaluations
            seconds = time.perf_counter() - began
            evaluations, plain = reference(model, data, n_directions, 1e-2, rtol, cache=cache)
            ratios.append(plain / seconds)
        print(
            f"doubling and bisection, {meaning}: {evaluations} evaluations against {mine}, "
            f"{statistics.median(ratios):.2f} x as long (>= 5)"
        )


def bridges(seeds: range, dimensions: Sequence[int], path: Crossing) -> None:
    """Prints how bridges meet quadratics whose curvature is known up to lognormal noise, and how often errors cover."""
    # Of the tests: the exact volumes, by inverting the tilted characteristic function.
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.references.volume import quadratic_volume_reference

    for dimension in dimensions:
        misses, errors, inside, gradients, began = [], [], 0, 0, time.perf_counter()
        for seed in seeds:
            generator = torch.Generator().manual_seed(1000 + seed)
            curvature = torch.logspace(-3, 3, dimension, dtype=torch.float64)
            anchor = torch.randn(dimension, generator=generator, dtype=torch.float64)
            noise = torch.randn(dimension, generator=generator, dtype=torch.float64).exp()
            truth = quadratic_volume_reference(curvature, anchor, 1e-2)
            result = quadratic_bridge(anchor, curvature, curvature * noise, seed, path=path)
            misses.append(result.log_volume - truth)
            errors.append(result.error)
            gradients += result.gradients
            low, high = result.interval()
            inside += low <= truth <= high
            assert abs(misses[-1]) < 3 + 2 * result.error
        print(
            f"bridge, quadratic of {dimension}: {len(seeds)} seeds, largest miss {max(map(abs, misses)):.2f} nats "
            f"(<= 3 + 2 errors), largest error {max(errors):.2f}, "
            f"{inside} of {len(seeds)} intervals hold the truth (>= 90 %), "
            f"{gradients // len(seeds)} gradients and {(time.perf_counter() - began) / len(seeds):.1f} s each",
            flush=True,
        )
        assert inside >= 0.9 * len(seeds)


def quadratic_bridge(
    anchor: torch.Tensor, curvature: torch.Tensor, believed: torch.Tensor, seed: int, *, path: Crossing = "auto"
) -> BridgeResult:
    """The bridge around a quadratic, with a curvature that is believed."""

    class Quadratic:
        def of_points(self, points: torch.Tensor) -> torch.Tensor:
            return 0.5 * (curvature * (points - anchor).square()).sum(-1)

        def __call__(self, module: torch.nn.Module) -> torch.Tensor:
            return self.of_points(next(module.parameters())[None])[0]

    module = torch.nn.ParameterDict({"point": torch.nn.Parameter(anchor.clone())})
    vector = ParameterVector(ParameterSpace.of(module), {"point": believed})
    settings = BridgeSettings(chains=8, max_gradients=6000, path=path)
    options = {"cutoff": 1e-2, "sigma": 1.0, "curvature": vector, "seed": seed}
    return local_volume(module, Quadratic(), method="bridge", bridge=settings, **options)


def sentences(count: int, length: int, seed: int) -> torch.Tensor:
    """Word by word: two articles, adjectives, nouns and a verb, each any of its kind, and a full stop."""
    generator = torch.Generator().manual_seed(seed)
    kinds = ((0, 2), (2, 4), (6, 4), (10, 4), (0, 2), (2, 4), (6, 4), (14, 1))
    wanted = [kinds[place % len(kinds)] for place in range(length)]
    columns = [first + torch.randint(many, (count,), generator=generator) for first, many in wanted]
    return torch.stack(columns, dim=1)


def letters(count: int, length: int, seed: int) -> torch.Tensor:
    """Letters of 17, each drawn as the two before it ask for: a table of 289 rows, so that most parameters matter."""
    weights = np.random.default_rng(7).gamma(0.3, size=(17, 17, 17))
    table = torch.from_numpy(weights / weights.sum(-1, keepdims=True)).float()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(17, (count, length), generator=generator)
    for place in range(2, length):
        rows = table[ids[:, place - 2], ids[:, place - 1]]  # [count, 17]
        ids[:, place] = torch.multinomial(rows, 1, generator=generator)[:, 0]
    return ids


LANGUAGES = {"sentences": (sentences, 16), "letters": (letters, 17)}
"""What draws samples, and its vocabulary."""


def small_network(family: str, width: int, steps: int, language: str = "sentences") -> torch.nn.Module:
    """Two trained blocks on generated text: a Llama of width 24 has 13,560 parameters, on letters 13,608."""
    torch.manual_seed(0)
    draw, vocabulary = LANGUAGES[language]
    names = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        config = GPT2Config(n_layer=2, n_head=4, n_embd=width, n_positions=64, **names, **off)
        model: torch.nn.Module = GPT2LMHeadModel(config)
    else:
        sizes = {"hidden_size": width, "intermediate_size": width * 7 // 3, "max_position_embeddings": 64}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
        config = LlamaConfig(**sizes, **heads, **names, tie_word_embeddings=False)
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    for step in range(steps):
        ids = draw(16, 32, step)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def pretrained(folder: Path, text: Path, samples: int) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """A folder of ``save_pretrained``, and passages of 16 tokens of a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text.read_text()[:100_000])["input_ids"])
    starts = torch.linspace(0, len(ids) - 17, samples).long().tolist()
    passages = torch.stack([ids[start : start + 16] for start in starts])
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), [{"input_ids": passages}]


class Together:
    """The divergence of a small network's predictions from what they are, at many points of its parameters at once."""

    def __init__(self, model: torch.nn.Module, ids: torch.Tensor, space: ParameterSpace) -> None:
        self.model, self.ids, self.shapes = model, ids, dict(zip(space.names, space.shapes, strict=True))
        model.set_attn_implementation("eager")
        with torch.no_grad():
            self.anchor = self._predicted(dict(model.named_parameters()))
        self.batched = torch.func.vmap(self._cost)

    def _predicted(self, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        options = {"input_ids": self.ids, "use_cache": False}
        return torch.func.functional_call(self.model, parameters, kwargs=options).logits[:, :-1].log_softmax(-1)

    def _cost(self, flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([math.prod(shape) for shape in self.shapes.values()])
        named = {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
        return (self.anchor.exp() * (self.anchor - self._predicted(named))).sum(-1).mean()

    def of_points(self, points: torch.Tensor) -> torch.Tensor:
        """Costs, shape ``[points]``, nats."""
        return self.batched(points)

    def __call__(self, module: torch.nn.Module) -> torch.Tensor:
        """At the module's parameters."""
        parameters = dict(module.named_parameters())
        return self.of_points(torch.cat([parameters[name].reshape(-1) for name in self.shapes])[None])[0]


def network(
    family: str,
    model: torch.nn.Module,
    data: list[dict[str, torch.Tensor]],
    gradients: Sequence[int],
    seeds: range,
    *,
    space: ParameterSpace,
    settings: BridgeSettings,
    together: bool = False,
) -> None:
    """Prints bridges around a network by seed and budget, beside rays on the same samples.

    Args:
        family: What is printed first.
        model: The network.
        data: Its samples.
        gradients: Budgets.
        seeds: Of bridges.
        space: What moves.
        settings: Of bridges.
        together: Whether a small network is evaluated at all chains at once.
    """
    proposals = {"none": None} | {
        f"kronecker {eps:g}": kronecker_preconditioner(model, data, eps=eps, space=space) for eps in (1e-3, 1e-2, 1e-1)
    }
    for name, proposal in proposals.items():
        rays = basin_volume(model, data, n_directions=8, preconditioner=proposal, space=space)
        print(f"{family}, {rays.dimension} parameters, rays, {name}: {rays.log_volume:.0f}", flush=True)
    fisher = kronecker_fisher(model, data, space=space) if together else None
    for budget in gradients:
        for seed in seeds:
            options = {"method": "bridge", "bridge": replace(settings, max_gradients=budget), "seed": seed}
            if together:
                cost = Together(model, data[0]["input_ids"], space)
                found = local_volume(model, cost, space=space, cutoff=1e-2, curvature=fisher, **options)
            else:
                found = basin_volume(model, data, space=space, **options)
            parts = ", ".join(f"{name} {value:.1f}" for name, value in found.parts.items())
            print(
                f"{family}, bridge, seed {seed}: {found.log_volume:.0f} +- {found.error:.0f} ({parts}), exponent "
                f"{found.scaling_exponent:.0f}, {found.gradients} gradients, {found.seconds:.0f} s, "
                f"tether from {found.tether:g}, peak {resident('VmHWM') / 2**30:.1f} GiB, weak: {found.weak or 'no'}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directions", type=int, default=20)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=20, help="of each quadratic that a bridge is walked around")
    parser.add_argument("--first-seed", type=int, default=0, help="of those")
    parser.add_argument("--dimensions", type=int, nargs="+", default=[50, 200, 1000, 2000], help="of the quadratics")
    parser.add_argument("--path", choices=("auto", "cost", "tether"), default="auto", help="around quadratics")
    parser.add_argument("--only", choices=("rays", "bridge", "network"), help="one of the two methods, or networks")
    parser.add_argument("--family", choices=("llama", "gpt2"), default="llama", help="of the network")
    parser.add_argument("--width", type=int, default=24, help="of the network")
    parser.add_argument("--language", choices=tuple(LANGUAGES), default="sentences", help="that it is trained on")
    parser.add_argument("--network-steps", type=int, default=600, help="of its training")
    parser.add_argument("--samples", type=int, default=4, help="that the network is looked at on")
    parser.add_argument("--model", type=Path, help="a folder of save_pretrained in its place")
    parser.add_argument("--text", type=Path, help="whose passages that is looked at on")
    parser.add_argument("--last-layers", type=int, help="only so many blocks of it move")
    parser.add_argument("--chains", type=int, default=4, help="of each bridge around a network")
    parser.add_argument("--together", action="store_true", help="small networks at all chains at once, which is faster")
    parser.add_argument("--keep-in", help="folder in which interrupted bridges around networks go on")
    parser.add_argument("--gradients", type=int, nargs="+", default=[10_000, 20_000], help="of each of its bridges")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", choices=("forward", "implicit", "explicit"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        print_memory(arguments.memory)
        return
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    if arguments.only == "network":
        if arguments.model:
            model, data = pretrained(arguments.model, arguments.text, arguments.samples)
        else:
            model = small_network(arguments.family, arguments.width, arguments.network_steps, arguments.language)
            data = [{"input_ids": LANGUAGES[arguments.language][0](arguments.samples, 32, 99_999)}]
        space = ParameterSpace.of(model, last_layers=arguments.last_layers)
        settings = BridgeSettings(chains=arguments.chains, keep_in=arguments.keep_in)
        name = arguments.model.name if arguments.model else arguments.family
        together = arguments.together and not arguments.model
        network(name, model, data, arguments.gradients, seeds, space=space, settings=settings, together=together)
        return
    if arguments.only != "rays":
        bridges(seeds, arguments.dimensions, arguments.path)
    if arguments.only == "bridge":
        return
    model, optimizer = trained(4, 128, arguments.steps)
    data, space = batches(), ParameterSpace.of(model)
    objective = CausalLMObjective()
    with torch.no_grad():
        loss = statistics.mean(float(objective.loss(model, batch)) for batch in data)
    print(f"{space.numel / 1e6:.2f} M parameters, loss {loss:.3f} nats, {arguments.directions} directions, rtol 1e-2")

    proposals = {
        "none": None,
        "adam": adam_preconditioner(optimizer, space, module=model),
        "kronecker": kronecker_preconditioner(model, data),
    }
    for cutoff in (1e-3, 1e-2, 1e-1):
        for name, bound in (("none", 2.5), ("adam", 3.5), ("kronecker", 3.5)):
            result = basin_volume(
                model, data, cutoff=cutoff, n_directions=arguments.directions, preconditioner=proposals[name]
            )
            median = statistics.median(result.evaluations.tolist())
            print(
                f"cutoff {cutoff:g}, {name}: {median} evaluations a direction (median, <= {bound}), "
                f"{result.total_evaluations} in all; log-volume {result.log_volume:.0f}, "
                f"bound {result.lower_bound:.0f}, spread {result.spread:.0f}, tolerance {result.tolerance:.1f} nats"
            )

    compare(model, data, arguments.directions)

    size = 4 * sum(parameter.numel() for parameter in trained(12, 768, 0)[0].parameters())
    anchors = 4 * 256 * 8 * 127
    forward = memory("forward")
    for directions in ("implicit", "explicit"):
        extra = memory(directions) - forward - anchors
        print(
            f"memory({directions}): {extra / size:.3f} x the parameters beside forward and anchors, which is "
            f"{(extra - size) / 2**20:.1f} MiB more than one copy (implicit: a block of a direction, 4 MiB)"
        )


if __name__ == "__main__":
    main()
