"""Which analysis works on which family of models: each cell is run, and the table of them written or read.

``python -m tests.references.models_table`` renews ``docs/models.md``.
"""

from __future__ import annotations

import linecache
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_goldy.analysis import (
    attention_statistics,
    basin_volume,
    explain_change,
    golden_parameters,
    head_importance,
    knowledge_coupling,
    reverse_golden_parameters,
    ripple_effects,
    taylor_diff,
    track_circuit,
)
from lightning_goldy.analysis.circuits import TrackingOptions
from lightning_goldy.core.objective import ClassifierObjective, Objective
from lightning_goldy.data import induction_pairs
from lightning_goldy.training.subject import find_objective
from tests.references import noted_table
from tests.references.architecture_models import VOCABULARY
from tests.references.model_zoo import ZOO, batch_for, build_family
from tests.references.ripple import TEMPLATE, facts, tokenizer

PATH = Path(__file__).parents[2] / "docs" / "models.md"
_INTRODUCTION = """# Models

What each analysis does on each family, at tiny size, with the installed transformers. The table is generated: a slow
test runs every cell and holds it against this page, and `make models` renews it.

**exact**: it runs, by its own route. **falls back**: it runs, and says how. **refused**: it ends with a message of its
own, the note. **fails**: the message is another library's.

Of an encoder-decoder both stacks have heads and MLPs: layers count through the encoder, then the decoder, whose
attention to the encoder is left out. A block without attention, as hybrids have, has no head, and NaN in tables of
heads. The MLP output of a mixture of experts is that of its routed and shared experts.
"""


@dataclass(frozen=True)
class Subject:
    """What a cell is run on."""

    model: Any
    base: Any
    batch: dict[str, Any]
    objective: Objective


def subject_of(family: str) -> Subject:
    """A model near its base, and a batch."""
    model, base = build_family(family), build_family(family)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter, before in zip(model.parameters(), base.parameters(), strict=True):
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator))
            if not parameter.requires_grad:
                before.copy_(parameter)  # which no finetune moves
    try:
        objective = find_objective(nn.Module(), model, None)  # type: ignore[arg-type]
    except ValueError:
        if not type(model).__name__.endswith("Classification"):
            raise
        objective = ClassifierObjective()
    return Subject(model, base, batch_for(model), objective)


def _ripple(subject: Subject) -> Any:
    pieces = facts()[:3]
    options: dict[str, Any] = {"tokenizer": tokenizer(), "template": TEMPLATE}
    return ripple_effects(subject.model, pieces, [(pieces[0], pieces[1].answer)], **options)


def _attention(subject: Subject) -> Any:
    """Of an encoder-decoder that of the decoder."""
    if not subject.model.config.is_encoder_decoder:
        return attention_statistics(subject.model, [subject.batch], subject.objective)
    batch = {**subject.batch, "decoder_input_ids": subject.batch["labels"]}
    return attention_statistics(subject.model, [batch], stack="decoder")


def _circuits(subject: Subject) -> Any:
    """Found, measured, and compared with the base's."""
    config = subject.model.config.get_text_config()
    vocabulary = getattr(config, "vocab_size", VOCABULARY)
    pairs = induction_pairs(range(3, min(vocabulary, VOCABULARY)), 2)
    options = TrackingOptions(steps=1, sizes=(0.2,), n_random=1)
    return track_circuit(subject.model, pairs, options, base=options.find_at_base(subject.model, subject.base, pairs))


def _linearized(variant: Any) -> Callable[[Subject], Any]:
    return lambda s: explain_change(s.model, s.base, [s.batch], s.objective, variants=(variant,))


ANALYSES: dict[str, Callable[[Subject], Any]] = {
    "golden": lambda s: golden_parameters(s.model, [s.batch], s.objective, top_k_percent=5.0),
    "reverse golden": lambda s: reverse_golden_parameters(
        s.model, [s.batch], s.objective, eval_batches=[s.batch], strategy="none"
    ),
    "Taylor": lambda s: taylor_diff(s.model, s.base, [s.batch], s.objective),
    "frozen attention": _linearized("frozen_attention"),
    "linear MLPs": _linearized("linear_mlp"),
    "tangent": _linearized("tangent"),
    "attention": _attention,
    "heads": lambda s: head_importance(s.model, [s.batch], s.objective, strategy="magnitude"),
    "coupling": lambda s: knowledge_coupling(s.model, [s.batch], objective=s.objective),
    "ripple": _ripple,
    "circuits": _circuits,
    "basin": lambda s: basin_volume(s.model, [s.batch], s.objective, n_directions=2),
}


def run_cell(family: str, analysis: str) -> str:
    """What an analysis does on a family: ``exact``, or ``falls back``, ``refused`` or ``fails`` and the message."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            ANALYSES[analysis](subject_of(family))
        except Exception as error:  # noqa: BLE001 - every way to end is an entry
            return f"{_manner(error)}: {_short(str(error))}"
    told = [str(warning.message) for warning in caught if "lightning_goldy" in (warning.filename or "")]
    return f"falls back: {_short(told[0])}" if told else "exact"


def _manner(error: BaseException) -> str:
    """An error is the project's own where the project raises it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or "lightning_goldy" not in trace.tb_frame.f_code.co_filename:
        return "fails"
    line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
    return "refused" if line.lstrip().startswith("raise ") else "fails"


def _short(message: str) -> str:
    """The first clause or two of a message, on one line, without addresses and measured numbers."""
    line = (
        re.sub(r"0x[0-9a-f]+|-?\d+\.\d{4,}(e-\d+)?", "", " ".join(message.split()))
        .partition(". Registered:")[0]
        .replace("|", "/")
    )
    return line if len(line) <= 200 else f"{line[:197].rstrip()}..."


def render(cells: Mapping[tuple[str, str], str]) -> str:
    """The page, of cells by family and analysis."""
    return noted_table.render(_INTRODUCTION, "family", ZOO, ANALYSES, cells)


if __name__ == "__main__":
    PATH.write_text(render({(family, name): run_cell(family, name) for family in ZOO for name in ANALYSES}))
