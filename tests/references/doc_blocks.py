"""The fenced blocks of the documentation, and a small world in which they run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_goldy import CausalLMObjective, ParameterMask, ParameterSpace, ParameterVector
from lightning_goldy.analysis.golden.budget import STRATEGIES
from lightning_goldy.analysis.golden.golden import SCORES
from lightning_goldy.analysis.ripple.editors import EDITORS
from lightning_goldy.core.store import save_vectors
from lightning_goldy.data import byte_tokenizer
from lightning_goldy.data.formats import FORMATS
from lightning_goldy.report import answers, figures
from tests.data.question_sets import MUSIQUE
from tests.house import ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
MARK = re.compile(r"<!-- not run: (.+) -->")
# A page's numbers for a real model are too large for the small one.
SMALLER = {
    "docs/basin_volume.md": (("max_gradients=20_000", "max_gradients=1_000"),),
    "docs/circuits.md": (("n_edges=700", "n_edges=30"), ("tokenizer, 20", "tokenizer, 2")),
}
SHELL = ("bash", "sh", "shell", "console")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        page: Of the documentation.
        line: Of its first fence, from 1.
        language: After the fence; may be empty.
        code: Between the fences.
        reason: Why it does not run; empty for one that does.
    """

    page: Path
    line: int
    language: str
    code: str
    reason: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(text: str, page: Path) -> Iterator[Block]:
    """Blocks in their order; a mark in a comment right above a block is its reason."""
    lines = text.splitlines()
    start = None
    for number, line in enumerate(lines):
        if start is None and line.startswith("```"):
            start = number
        elif start is not None and line.startswith("```"):
            above = MARK.fullmatch(lines[start - 1].strip()) if start else None
            code = "\n".join([*lines[start + 1 : number], ""])
            yield Block(page, start + 1, lines[start][3:].strip(), code, above[1] if above else "")
            start = None
    assert start is None, f"{page}:{start}: a block without an end"


BLOCKS = tuple(block for page in PAGES for block in blocks_of(page.read_text(encoding="utf-8"), page))


def commands_of(block: Block) -> list[str]:
    """The commands of a shell block, without comments, continued lines joined."""
    lines = re.sub(r"\\\n\s*", " ", block.code).splitlines()
    return [command for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]


def small_model(seed: int = 0) -> GPT2LMHeadModel:
    """Four blocks of two heads over bytes: the names of GPT-2, and nothing to wait for."""
    torch.manual_seed(seed)
    sizes = {"n_embd": 8, "n_layer": 4, "n_head": 2, "n_positions": 192, "vocab_size": 260}
    # The byte tokenizer's own marks.
    marks = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
    return GPT2LMHeadModel(GPT2Config(**sizes, **marks, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)).eval()


def token_batches(seed: int, count: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(97, 123, (2, 8), generator=generator)} for _ in range(count)]


class YourModule(L.LightningModule):
    """What a reader of the README has already."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_model()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.model(**batch, labels=batch["input_ids"]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class YourData(L.LightningDataModule):
    """Likewise."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([{"input_ids": row} for row in token_batches(1)[0]["input_ids"]], batch_size=2)

    val_dataloader = train_dataloader


PIECES = """{"id": "capital of France", "question": "capital of France?", "answer": "Paris", "group": "capital"}
{"id": "capital of Spain", "question": "capital of Spain?", "answer": "Madrid", "group": "capital"}
{"id": "currency of Chad", "question": "currency of Chad?", "answer": "franc", "group": "currency"}
{"id": "currency of Cuba", "question": "currency of Cuba?", "answer": "peso", "group": "currency"}
"""


def names_of(page: str, here: Path) -> dict[str, Any]:
    """What the Python blocks of a page take for granted, and the files that they name, in the present folder."""
    before, now = small_model(), small_model()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in now.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    trainer = {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    names: dict[str, Any] = {
        "__name__": "page",
        "L": SimpleNamespace(Trainer=partial(L.Trainer, **trainer, enable_checkpointing=False, logger=False)),
        "your_module": YourModule(),
        "your_data": YourData(),
        "model": now,
        "base": ParameterVector.of(before),
        "batches": token_batches(1),
        "batch": token_batches(1)[0],
        "held_out": token_batches(4),
        "others": token_batches(4),
        "other_text": token_batches(5),
        "unrelated_batches": token_batches(5),
        "another_copy_of_the_base": small_model(),
        "tokenizer": byte_tokenizer(),
        "objective": CausalLMObjective(),
    }
    FILES.get(page, lambda names, here: None)(names, here)
    return names


def _mask_files(names: dict[str, Any], here: Path) -> None:
    space = ParameterSpace.of(names["model"])
    mask = ParameterMask.random(space, dict.fromkeys(space.names, 3), seed=1)
    for step in (0, 100):
        mask.save(here / f"mask-step={step:08d}.safetensors", model="GPT2LMHeadModel")


def _readme(names: dict[str, Any], here: Path) -> None:
    small_model().save_pretrained(here / "gpt2")
    byte_tokenizer().save_pretrained(here / "gpt2")


def _explained(names: dict[str, Any], here: Path) -> None:
    from lightning_goldy.analysis import explain_change

    path = here / "runs/analyze/version_0/goldy/explain_change/result.json"
    path.parent.mkdir(parents=True)
    path.write_text(explain_change(names["model"], names["base"], names["batches"]).to_json())


def _maps(names: dict[str, Any], here: Path) -> None:
    from lightning_goldy.analysis import attention_maps

    tokens = names["tokenizer"]("A prompt", return_tensors="pt")
    names["base_maps"] = attention_maps(small_model(), tokens, name_tokens=names["tokenizer"].convert_ids_to_tokens)


def _circuits(names: dict[str, Any], here: Path) -> None:
    from lightning_goldy.analysis import find_circuits
    from lightning_goldy.data import indirect_object_pairs

    pairs = indirect_object_pairs(names["tokenizer"], 2)
    names["circuit_of_base"] = find_circuits(small_model(), pairs, "logit_difference", n_edges=20)


def _coupling(names: dict[str, Any], here: Path) -> None:
    from lightning_goldy.analysis import knowledge_coupling
    from lightning_goldy.data import load_pieces

    (here / "pieces.jsonl").write_text(PIECES)
    names["pieces"] = load_pieces("pieces.jsonl").pieces
    options = {"tokenizer": names["tokenizer"]}
    names["coupling_at_base"] = knowledge_coupling(small_model(), names["pieces"], **options)
    names["coupling_now"] = knowledge_coupling(names["model"], names["pieces"], **options)
    path = here / "goldy/knowledge_coupling/coupling-step=00000100.safetensors"
    path.parent.mkdir(parents=True)
    tensors = {name: torch.zeros(4) for name in ("predicted", "after", "before", "cosines", "base_cosines")}
    space = ParameterSpace(tuple(tensors), *zip(*[((4,), torch.float32)] * len(tensors), strict=True))
    save_vectors(path, ParameterVector(space, tensors), kind="result", model="GPT2LMHeadModel")


def _coupling_file(names: dict[str, Any], here: Path) -> None:
    path = here / "runs/coupling/version_0/coupling.safetensors"
    path.parent.mkdir(parents=True)
    save_file({"coupling": torch.eye(2)}, path, {"goldy_coupling": '{"ids": ["a", "b"]}'})


def _musique(names: dict[str, Any], here: Path) -> None:
    lines = (json.dumps(record) for record in MUSIQUE)
    (here / "musique_ans_v1.0_dev.jsonl").write_text("\n".join(lines), encoding="utf-8")


def _pieces(names: dict[str, Any], here: Path) -> None:
    (here / "pieces.jsonl").write_text(PIECES)


def _plasticity(names: dict[str, Any], here: Path) -> None:
    path = here / "run/goldy/head_plasticity/results.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"result": {"closed": [[0, 1], [2, 0]]}}\n')


FILES = {
    "README.md": _readme,
    "docs/analyze.md": _explained,
    "docs/attention.md": _maps,
    "docs/circuits.md": _circuits,
    "docs/coupling_schema.md": _coupling_file,
    "docs/files.md": _mask_files,
    "docs/head_plasticity.md": _plasticity,
    "docs/knowledge_coupling.md": _coupling,
    "docs/knowledge_data.md": _musique,
    "docs/masked_adamw.md": _mask_files,
    "docs/masks.md": _mask_files,
    "docs/ripple_effects.md": _pieces,
}


@contextmanager
def registered_for_a_while() -> Iterator[None]:
    """Takes back whatever a block registers."""
    kept: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
    places: list[Any] = [SCORES._entries, STRATEGIES._entries, EDITORS._entries, FORMATS._entries, figures.FIGURES]
    for entries in [*places, *answers._SPEAKERS.values()]:
        kept.append((entries, dict(entries)))
    try:
        yield
    finally:
        for entries, before in kept:
            entries.clear()
            entries.update(before)
