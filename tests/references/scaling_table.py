"""What every analysis needs beside a sharded training of 1, 8 and 70 billion parameters, planned on ``meta``.

``python -m tests.references.scaling_table`` renews ``docs/scaling.md``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from lightning_goldy.analysis.forecast import Plan, Run
from lightning_goldy.callbacks import AnalysisCallback
from lightning_goldy.callbacks.preflight import size_in_words
from lightning_goldy.commands.doctor import SHAPES, Question, build_shape, planned, readers

PATH = Path(__file__).parents[2] / "docs" / "scaling.md"
SHARDS, GPU = 8, 80e9
RANKS = (1, 2, 4, 8, 16, 32, 64)
# Of parameter, gradient and both moments in bfloat16; and what an allocator leaves unused.
STATE, USABLE = 8, 0.95

_INTRODUCTION = """# Scaling

What an analysis needs at 1, 8 and 70 billion parameters: Llama shapes, planned on the `meta` device without a byte
of weights, by the same forecast that a run prints before its first step and `goldy doctor` shows. The tables are
generated; a test holds them against this page (`python -m tests.references.scaling_table` renews it).

They are of bfloat16 weights, batches of 4 samples of 512 tokens, the callbacks' defaults (16 samples, 256 pieces, 5
directions; `large=True`), and FSDP2 over 8 ranks where nothing else is said. *forwards* and *backwards* are samples
of one firing, over all ranks; *memory* is the device's, on each rank while the analysis runs; *kept* the host's
between firings; *disk* what a firing writes, after what the beginning of a run does; *sent* what each rank
communicates per firing, most of it the parameters that every pass gathers. *GPUs* is the smallest number of 80 GB
ranks that hold the training (parameters, gradients and both moments in bfloat16, activations of a batch without
checkpointing) and the analysis beside it; the title says what the training takes alone. Passes that depend on the
data are what is typical ("about").

Ask for your own model and callbacks:

```bash
goldy doctor --shape 8b --dtype bfloat16 --shards 8
goldy doctor MODEL --meta --config recipes/text_finetune.yaml --config callbacks/light.yaml
```
"""

_END = """## What needs more than one H100

Of the 1 B shape everything fits beside the training on one card. At 8 B and 70 B the column *GPUs* tells where an
analysis asks for more ranks than the training itself. Those with a large share of it:

- **Reverse golden** holds scores of the size of the parameters in float32: a selection (`last_layers: 0.3`) divides
  them.
- **Taylor** holds the base, the step and, with shares, a gradient. `by: null` leaves the gradient out, `orders:
  [1]` half of the tangents. On shards, differences along the step take the place of forward mode.
- **Golden** holds one or two bytes of votes per element and a gradient's tensor; its mask is whole on every rank's
  host.
- **Parameter distribution** has one tensor at a time whole in float64 on each rank; `exclude` the embedding where
  it is the largest.
- **Change attribution** holds the base, a float32 accumulator of every element and a byte per element; with `shares:
  []` it grafts nothing.
- **Circuits** keep what every head and MLP writes on a batch of prompts; of a sharded model none are found, so where
  one rank does not hold the model the row is of what it would take. `goldy analyze --circuits` works on one device
  afterwards.
- **Coupling** needs little memory, but its passes are many: with fewer pieces (`n_pieces`), or `budget`, it stays
  short.

## After the fact, from a checkpoint

What does not fit beside the training runs afterwards, where no optimizer takes room: a checkpoint and its base need
2 to 3 copies of the parameters instead of the 4 and more of a training.

```bash
goldy analyze CHECKPOINT --config runs/NAME/version_0/config.yaml        # attribution, Taylor, attention, traces
goldy basin CHECKPOINT --config runs/NAME/version_0/config.yaml          # volumes
goldy coupling --model runs/NAME/version_0/checkpoints/step=1000 --data pieces.jsonl --projection 8192
```

They run on a CPU with enough memory, too. The pure functions of `lightning_goldy.analysis` take a model that is
sharded with FSDP2, so that a script under `torchrun` can do the same on as many ranks as the training had.
"""


def gpus_needed(plan: Plan, callback: AnalysisCallback[Any] | None = None) -> int | None:
    """Ranks of 80 GB that hold the training, and an analysis beside it; None where the largest number does not."""
    for ranks in RANKS:
        spread = dataclasses.replace(plan, shards=ranks)
        state = STATE * spread.elements() + spread.graph(512)
        beside = 0 if callback is None else callback.forecast(spread, Run(1000)).memory
        if state + beside <= USABLE * GPU:
            return ranks
    return None


def render_shape(name: str) -> str:
    """The table of one shape."""
    question = Question(shape=name, shards=SHARDS, length=512, batch_size=4)
    plan, _ = planned(build_shape(name, torch.bfloat16), None, question)
    alone = gpus_needed(plan)
    lines = [
        f"## {name.upper()}: {plan.space.numel / 1e9:.2f} billion, alone on {alone} GPU{'s' if alone != 1 else ''}",
        "",
        "| analysis | forwards | backwards | memory, 1 rank | memory, 8 ranks | kept | disk | sent | GPUs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for callback in readers():
        one, many = (callback.forecast(dataclasses.replace(plan, shards=shards), Run(1000)) for shards in (1, SHARDS))
        forwards, backwards = (
            f"about {count}" if count and not many.exact else str(count) for count in dataclasses.astuple(many.cost)
        )
        disk = " + ".join(size_in_words(size) for size in (many.disk_once, many.disk) if size) or "0"
        lines.append(
            f"| {callback.name.replace('_', ' ')} | {forwards} | {backwards} | "
            f"{size_in_words(one.memory)} | {size_in_words(many.memory)} | {size_in_words(many.kept)} | "
            f"{disk} | {size_in_words(many.communicated)} | "
            f"{gpus_needed(plan, callback) or 'more than 64'} |"
        )
    return "\n".join([*lines, ""])


def render() -> str:
    """The page."""
    return "\n".join([_INTRODUCTION, *map(render_shape, SHAPES), _END])


if __name__ == "__main__":
    PATH.write_text(render())
