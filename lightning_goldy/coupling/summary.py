"""From the options of ``goldy coupling`` to its folder: model, measurements, files, summary."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

import lightning_goldy
from lightning_goldy.callbacks.cost import peak_memory_bytes
from lightning_goldy.core.files import atomic_write, to_json_line
from lightning_goldy.core.naming import model_class
from lightning_goldy.coupling.analysis import Clock, Findings, measure, read_pieces_of
from lightning_goldy.coupling.edits import read_edits
from lightning_goldy.coupling.files import PAIRS, REPORT, SUMMARY, TENSORS, write_pictures, write_rows, write_tensors
from lightning_goldy.coupling.options import Editing, Method, Pieces
from lightning_goldy.coupling.pairs import strong_pairs, write_pairs
from lightning_goldy.coupling.questions import cross_question_analysis
from lightning_goldy.coupling.readiness import readiness
from lightning_goldy.coupling.report import (
    PARTS,
    SCHEMA_VERSION,
    coupling_analysis,
    gradient_analysis,
    high_coupling_pairs,
    knowledge_pieces,
)
from lightning_goldy.data.tokenization import load_tokenizer
from lightning_goldy.models import WeightDtype, check_vocabulary, load_model
from lightning_goldy.quiet import progress_only, without_known_warnings
from lightning_goldy.report.coupling_tables import readiness_lines, readiness_table
from lightning_goldy.report.formatting import format_bytes, format_number, format_percent, format_seconds
from lightning_goldy.report.page import write_report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Model:
    """Which model.

    Args:
        name: A folder or a name on the hub.
        tokenizer: Likewise, or ``bytes``; None for the model's.
        dtype: Of the weights.
        device: None for a GPU where there is one.
    """

    name: str
    tokenizer: str | None = None
    dtype: WeightDtype = "float32"
    device: str | None = None

    def load(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """The model on its device, and its tokenizer.

        Raises:
            ValueError: One of them cannot be loaded, or they do not fit.
        """
        # The tokenizer first: a mistake there is found before the weights are read.
        tokenizer = load_tokenizer(self.tokenizer or self.name)
        model = load_model(self.name, dtype=self.dtype)
        check_vocabulary(model, tokenizer)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return model.to(device), tokenizer


def run_coupling(
    model: Model, pieces: Pieces, method: Method, editing: Editing | None = None, *, out: str | Path | None = None
) -> Path:
    """Measures the coupling of a model's knowledge and writes everything about it into a folder.

    Args:
        model: Which model.
        pieces: What to compare.
        method: How.
        editing: What to edit for the ripple effects; None for nothing.
        out: An empty folder, but for a workspace in it; by default the next free ``runs/coupling/version_N``.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder holds something.
        ValueError: Model, pieces or options do not work.
    """
    folder = _folder(out, method.workspace)
    console = Console()
    with without_known_warnings(), progress_only(), console.status("") as status, peak_memory_bytes(
        torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ) as peak:  # fmt: skip
        clock = Clock(status)
        with clock.phase("pieces"):
            found, chosen = read_pieces_of(pieces)
            named = editing is not None and isinstance(editing.edits, str)
            edits = read_edits(str(editing.edits), chosen) if editing is not None and named else []
        with clock.phase("model"):
            loaded, tokenizer = model.load()
        findings = measure(
            loaded, tokenizer, found, chosen, template=pieces.prompt, method=method, editing=editing, edits=edits,
            clock=clock,
        )  # fmt: skip
    unknown = _unknown_tokens(tokenizer, [pieces.prompt.replace("{question}", piece.question) for piece in chosen])
    settings = {"template": pieces.prompt, "form": pieces.form, "unknown_tokens": unknown}
    parts: dict[str, Any] = {
        "metadata": _metadata(model, loaded, tokenizer, {"pieces": pieces, "method": method, "editing": editing}),
        "knowledge_pieces": knowledge_pieces(findings, settings),
        "performance": _performance(findings, loaded, clock, peak()),
        "readiness": readiness(findings, unknown),
    }
    summary = _written(findings, parts, folder, clock)
    _print(console, findings, summary, folder)
    return folder


def _written(found: Findings, parts: dict[str, Any], folder: Path, clock: Clock) -> dict[str, Any]:
    """Writes all files, the summary last, and returns the latter."""
    pairs = strong_pairs(found.result, found.statistics.thresholds[0])
    parts["gradient_analysis"] = gradient_analysis(found)
    parts["coupling_analysis"] = coupling_analysis(found)
    parts["high_coupling_pairs"] = high_coupling_pairs(found, pairs, PAIRS)
    parts["cross_question_analysis"] = cross_question_analysis(found)
    memory = parts["performance"]["peak_memory_bytes"]
    cost = {
        analysis: {"seconds": clock.seconds.get(phase, 0.0), "model_evaluations": count, "peak_memory_bytes": memory}
        for analysis, phase, count in (
            ("knowledge_coupling", "coupling", 2 * len(found.result)),
            ("ripple_effects", "ripple", 0 if found.ripple is None else found.ripple.after.numel()),
        )
    }
    files = {TENSORS: "the matrix, norms, log-probabilities and ripples"}
    write_tensors(found, folder / TENSORS)
    files[PAIRS] = "the strongest pairs with their texts"
    write_pairs(found.result, pairs, folder / PAIRS)
    rows = write_rows(found, parts, folder, cost)
    pictures, missing = write_pictures(rows, folder)
    files |= pictures
    files |= {f"goldy/{row['name']}/results.jsonl": "the row that the report draws" for row in rows}
    try:
        write_report(folder)
        files[REPORT] = "the page with all figures"
    except ImportError as error:
        missing = missing or str(error)
    listed = [{"file": name, "shows": shows, "bytes": (folder / name).stat().st_size} for name, shows in files.items()]
    # Its own size is not known before it is written.
    listed.append({"file": SUMMARY, "shows": "this summary", "bytes": None})
    parts["generated_files"] = {"folder": str(folder), "files": listed, "left_out": missing}
    summary = {name: parts[name] for name in PARTS}
    # Through the line's rules: a number that is not finite becomes null.
    text = json.dumps(json.loads(to_json_line(summary)), indent=1, ensure_ascii=False)
    atomic_write(folder / SUMMARY, (text + "\n").encode("utf-8", "replace"))
    return summary


def _folder(out: str | Path | None, workspace: str | None) -> Path:
    if out is None:
        number = 0
        while (folder := Path("runs") / "coupling" / f"version_{number}").exists():
            number += 1
        return folder
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--out {folder} is a file; give a folder")
    kept = None if workspace is None else Path(workspace).expanduser().resolve()
    held = [path.name for path in sorted(folder.iterdir()) if path.resolve() != kept] if folder.exists() else []
    if held:
        raise FileExistsError(f"--out {folder} is not empty: it holds {held[0]!r}; give another folder")
    return folder


def _unknown_tokens(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> float:
    """Share of the prompts with a token that the tokenizer does not know."""
    unknown = tokenizer.unk_token_id
    # Where the end of the text stands for what is unknown, as in GPT-2, every byte is known.
    if unknown is None or unknown == tokenizer.eos_token_id:
        return 0.0
    encoded = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    return sum(unknown in ids for ids in encoded) / len(prompts)


def _metadata(
    model: Model, loaded: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]
) -> dict[str, Any]:
    parameters = list(loaded.parameters())
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {
            "name": model.name,
            "class": model_class(loaded),
            "n_parameters": sum(each.numel() for each in parameters),
            "dtype": str(parameters[0].dtype).removeprefix("torch."),
            "device": str(parameters[0].device),
        },
        "tokenizer": {
            "name": model.tokenizer or model.name,
            "class": type(tokenizer).__name__,
            "n_tokens": len(tokenizer),
        },
        "settings": {name: None if each is None else dict(vars(each)) for name, each in settings.items()},
        "versions": {
            "lightning_goldy": lightning_goldy.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _performance(found: Findings, model: nn.Module, clock: Clock, peak: int) -> dict[str, Any]:
    seconds = clock.seconds["coupling"]
    return {
        "seconds": sum(clock.seconds.values()),
        "phases": [{"phase": name, "seconds": value} for name, value in clock.seconds.items()],
        "pieces_per_second": len(found.result) / seconds if seconds else None,
        "pairs_per_second": found.statistics.n_pairs / seconds if seconds else None,
        "peak_memory_bytes": peak,
        "memory_of": "device" if next(model.parameters()).is_cuda else "process",
        "device": str(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
    }


def _print(console: Console, found: Findings, summary: Mapping[str, Any], folder: Path) -> None:
    told, performance = summary["coupling_analysis"], summary["performance"]
    table = Table(title="Knowledge coupling", title_justify="left", box=SIMPLE_HEAD, show_header=False)
    table.add_column("what", overflow="fold")
    table.add_column("value", justify="right", overflow="fold")
    n_pairs = told["n_pairs"] or None
    lines = [
        ("pieces", f"{told['n_pieces']:,} ({told['n_failed']} failed)"),
        ("answers the model knows", format_percent(summary["knowledge_pieces"]["known_share"])),
        ("mean cosine", f"{format_number(told['mean'])} (std {format_number(told['std'])})"),
        *(
            (f"{name} pairs", f"{told[name]:,} ({format_percent(n_pairs and told[name] / n_pairs)})")
            for name in ("high", "moderate", "negative")
        ),
        ("clusters", format_number(told["n_clusters"])),
        ("effective rank", format_number(told["effective_rank"])),
    ]
    for each in summary["cross_question_analysis"]["contrasts"]:
        shown = f"{format_number(each['same'])}, other {format_number(each['different'])}"
        lines.append((f"same {each['same_what']}", shown))
    speed = f"{format_seconds(performance['seconds'])}, {format_number(performance['pieces_per_second'])} pieces/s"
    lines.append(("time", f"{speed}, {format_bytes(performance['peak_memory_bytes'])}"))
    for what, value in lines:
        table.add_row(what, value)
    console.print(table)
    if found.ripple is not None:
        console.print("Ripple effects", found.ripple.table(), sep="\n", markup=False, highlight=False)
    console.print(readiness_table(summary["readiness"]["checks"]))
    console.print(f"verdict: {summary['readiness']['verdict']}", markup=False, highlight=False)
    for line in readiness_lines(summary["readiness"]["checks"]):
        console.print(line, markup=False, highlight=False)
    for each in summary["generated_files"]["files"]:
        print(folder / each["file"])
    if summary["generated_files"]["left_out"]:
        print(f"left out: {summary['generated_files']['left_out']}")
