"""The report page of a very large run: bytes, seconds to write, and seconds until a browser has loaded it.

    python benchmarks/report.py [--layers 80] [--heads 64] [--analyses 500]

Synthetic rows of the shape that callbacks write: a snapshot of every tensor and the statistics of every head at each
analysis, and one attribution at the end. The page has to stay below 8 MB and to open in 2 s.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lightning_goldy.analysis.attention import (
    STATISTICS,
    AttentionMaps,
    AttentionStatistics,
    PromptAttention,
    TrackedAttention,
)
from lightning_goldy.analysis.attention.statistics import strongest_heads
from lightning_goldy.analysis.result import Cost

KINDS = {"attention": 4, "mlp": 3, "norm": 2}


def row(analysis: str, step: int, metrics: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """A row as callbacks write it."""
    cost = {"seconds": 0.1, "forwards": 16, "backwards": 0, "peak_memory_bytes": 2**30}
    fixed = {"format": 2, "epoch": 0, "trigger": "step", "weights": "training", "headline": "", "files": {}}
    told = {"analysis": analysis, "name": analysis, "step": step, "metrics": metrics, "result": result, "cost": cost}
    return {**fixed, **told}


def snapshot(step: int, layers: int, numbers: random.Random) -> dict[str, Any]:
    """Every tensor of every block."""
    tensors = []
    for layer in range(layers):
        for kind, count in KINDS.items():
            for index in range(count):
                change = numbers.random() * 0.1
                name = f"model.layers.{layer}.{kind}.{index}.weight"
                sizes = {"numel": 10**6, "base_norm": 10.0, "delta_norm": 10 * change, "relative_change": change}
                tensors.append({"name": name, "block": f"model.layers.{layer}", "kind": kind, **sizes})
    edges = [float(edge) for edge in range(-12, 1)]
    histogram = {"edges": edges, "counts": [numbers.randrange(10**6) for _ in edges[1:]], "zero": 0}
    metrics = {"delta_norm": step * 0.01, "relative_change": step * 1e-4, "unchanged_share": 0.0}
    metrics |= {f"relative_change/model.layers.{layer}": numbers.random() for layer in range(layers)}
    return row("golden_snapshot", step, metrics, {"tensors": tensors, "histogram": histogram})


def attention(step: int, layers: int, heads: int) -> dict[str, Any]:
    """Every statistic of every head, and the patterns of a prompt of 12 tokens, as the analysis makes its row."""
    generator = torch.Generator().manual_seed(step)
    values = {name: torch.rand(layers, heads, generator=generator).double() for name in (*STATISTICS, "drift")}
    queries = torch.full((layers, len(STATISTICS)), 50)
    statistics = AttentionStatistics(**values, queries=queries, n_samples=16)
    tokens = tuple(f"word{place}" for place in range(12))
    scores = torch.randn(layers, 1, heads, 12, 12, generator=generator) + torch.full((12, 12), -math.inf).triu(1)
    patterns = tuple(torch.softmax(scores, dim=-1))
    maps = AttentionMaps(tuple(range(layers)), patterns, torch.ones(1, 12, dtype=torch.bool), (tokens,))
    prompts = (PromptAttention("probe", 12, maps, None),)
    found = TrackedAttention(statistics, prompts, strongest_heads(statistics), 3, Cost(forwards=4)).row()
    return found.at(step=step, trigger="step", seconds=0.1, peak_memory_bytes=2**30).to_dict()


# So many rows of each kind differ, more than a slider shows; those after them are the same ones at later steps.
DISTINCT = 47


def write_run(folder: Path, layers: int, heads: int, analyses: int) -> None:
    """The rows of the run."""
    numbers = random.Random(0)
    for name in ("golden_snapshot", "attention_tracker"):
        (folder / "goldy" / name).mkdir(parents=True)
        texts: list[str] = []
        with (folder / "goldy" / name / "results.jsonl").open("w") as file:
            for place in range(analyses):
                step = 10 * place
                if place < DISTINCT:
                    of = snapshot(step, layers, numbers) if name == "golden_snapshot" else None
                    texts.append(json.dumps(of or attention(step, layers, heads)))
                written = f'"step": {10 * (place % DISTINCT)},'
                file.write(texts[place % DISTINCT].replace(written, f'"step": {step},', 1) + "\n")


def seconds_to_open(page: Path) -> float | None:
    """Until the browser has loaded the page and drawn its first figure; None without a browser."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        return None
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        window = started.new_page(viewport={"width": 1280, "height": 900})
        begin = time.perf_counter()
        window.goto(page.as_uri(), timeout=120_000)
        taken = time.perf_counter() - begin
        started.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--analyses", type=int, default=500)
    options = parser.parse_args()
    from lightning_goldy.report import write_report

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_run(folder, options.layers, options.heads, options.analyses)
        rows = sum(path.stat().st_size for path in folder.rglob("results.jsonl"))
        begin, processor = time.perf_counter(), time.process_time()
        page = write_report(folder)
        written, processor = time.perf_counter() - begin, time.process_time() - processor
        size = page.stat().st_size
        opened = seconds_to_open(page)
    print(f"{options.layers} layers, {options.heads} heads, {options.analyses} analyses of two kinds")
    print(
        f"rows {rows / 1e6:.1f} MB; page {size / 1e6:.2f} MB, written in {written:.1f} s ({processor:.1f} s processor)"
    )
    print("no browser to open it with" if opened is None else f"opened in {opened:.2f} s")


if __name__ == "__main__":
    main()
