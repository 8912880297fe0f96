"""MaskedAdamW against torch.optim.AdamW(foreach=True), per step at 30 M parameters with a 5 % mask.

    python benchmarks/masked_adamw.py

Prints ratios of medians over alternating repetitions in one run; absolute times depend on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_goldy import MaskedAdamW

BLOCK = ((512, 1536), (1536,), (512, 512), (512,), (512, 2048), (2048,), (2048, 512), *[(512,)] * 5)
SHAPES = {str(index): shape for index, shape in enumerate([(8192, 512), (256, 512), *BLOCK * 8])}
RATES = {"equal rates": (1e-3, 1e-3), "nothing outside": (1e-3, 0.0), "two rates": (1e-3, 1e-5)}


class FullMaskAdamW(torch.optim.AdamW):
    """The obvious way: whole float copies of all parameters, torch's step, and a float mask to blend with."""

    def __init__(self, parameters: list[nn.Parameter], masks: list[Tensor], **options: float) -> None:
        super().__init__(parameters, **options)
        self.masks = [mask.float() for mask in masks]

    @torch.no_grad()
    def step(self, closure=None):
        before = [parameter.clone() for parameter in self.param_groups[0]["params"]]
        super().step()
        for parameter, old, mask in zip(self.param_groups[0]["params"], before, self.masks, strict=True):
            parameter.copy_(old + mask * (parameter - old))


def parameters() -> dict[str, nn.Parameter]:
    held = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    for parameter in held.values():
        parameter.grad = torch.randn_like(parameter)
    return held


def timed(steps: dict[str, Callable[[], object]], repetitions: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of wall clock and of processor time of each step, taken in turns."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in steps}
    for _ in range(repetitions + 1):
        for name, step in steps.items():
            start = time.perf_counter(), time.process_time()
            step()
            for clock, began, into in zip((time.perf_counter, time.process_time), start, times[name], strict=True):
                into.append(clock() - began)
    # The first makes the moments.
    return {name: (wall[1:], processor[1:]) for name, (wall, processor) in times.items()}


def against(found: list[float], reference: list[float]) -> float:
    """Median of the ratios round by round."""
    return statistics.median(mine / theirs for mine, theirs in zip(found, reference, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    masks = {name: torch.rand(shape) < 0.05 for name, shape in SHAPES.items()}
    count = sum(mask.numel() for mask in masks.values())
    print(f"{count / 1e6:.1f} M parameters, masks of 5 %, {torch.get_num_threads()} threads")
    steps: dict[str, Callable[[], object]] = {
        "torch AdamW(foreach=True)": torch.optim.AdamW(parameters().values(), lr=1e-3, foreach=True).step
    }
    for name, rates in RATES.items():
        steps[name] = MaskedAdamW(parameters().items(), masks, *rates, foreach=True).step
    steps["naive, nothing outside"] = FullMaskAdamW([*parameters().values()], [*masks.values()], lr=1e-3).step
    times = timed(steps, arguments.repetitions)
    wall, processor = times[next(iter(times))]
    print("ratios of wall clock, and of processor time, which other programs disturb less")
    for name, (mine, of_processor) in times.items():
        limit = " (<= 1.3)" if name in RATES else ""
        milliseconds, ratios = 1e3 * statistics.median(mine), (against(mine, wall), against(of_processor, processor))
        print(f"{name:26} {milliseconds:7.1f} ms per step, ratio {ratios[0]:.2f}, {ratios[1]:.2f}{limit}")
    optimizer = MaskedAdamW(parameters().items(), masks)
    held = sum(mask.nbytes for mask in (optimizer._masks or {}).values())
    print(f"memory beside AdamW's own: {held / count:.2f} bytes per parameter for the mask")


if __name__ == "__main__":
    main()
