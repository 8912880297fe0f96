"""From the options of ``goldy coupling`` to its folder: model, measurements, files, summary."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

import lightning_goldy
from lightning_goldy.analysis.coupling import coupling_picture
from lightning_goldy.analysis.result import Row
from lightning_goldy.callbacks.store import ResultStore, peak_memory_bytes
from lightning_goldy.commands.coupling.options import Options
from lightning_goldy.commands.coupling.pairs import StrongPairs, strong_pairs, write_pairs
from lightning_goldy.commands.coupling.readiness import readiness
from lightning_goldy.commands.coupling.report import (
    coupling_analysis,
    cross_question_analysis,
    gradient_analysis,
    high_coupling_pairs,
    knowledge_pieces,
)
from lightning_goldy.commands.coupling.run import Clock, Findings, measure, read_material
from lightning_goldy.core.files import atomic_path, atomic_write, finite
from lightning_goldy.core.naming import model_class
from lightning_goldy.report.figures import draw_figures
from lightning_goldy.report.formatting import format_bytes, format_number, format_percent, format_seconds
from lightning_goldy.report.page import write_report
from lightning_goldy.report.topics.coupling import readiness_lines, readiness_table
from lightning_goldy.training.quiet import progress_only, without_known_warnings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SCHEMA_VERSION = 2
TENSORS = "coupling.safetensors"
SUMMARY = "coupling.json"
PAIRS = "pairs.csv"
REPORT = "report.html"
_PICTURES = {
    ("knowledge_coupling", "heat_map"): ("heat_map.png", "cosines in the order of the clusters"),
    ("knowledge_coupling", "distribution"): ("distribution.png", "distribution of the cosines, with the thresholds"),
    ("ripple_effects", "prediction"): ("ripple.png", "predicted against measured changes by the edits"),
}


def run_coupling(options: Options) -> Path:
    """Measures the coupling of a model's knowledge and writes everything about it into a folder.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder holds something.
        ValueError: Model, pieces or options do not work.
    """
    folder = _folder(options)
    console = Console()
    with (
        without_known_warnings(),
        progress_only(),
        console.status("") as status,
        peak_memory_bytes(options.model.placed) as peak,
    ):
        clock = Clock(status)
        with clock.phase("pieces"):
            material = read_material(options)
        with clock.phase("model"):
            model, tokenizer = options.model.load()
        found = measure(model, tokenizer, material, options, clock)
    prompt = options.pieces.prompt
    unknown = _unknown_tokens(tokenizer, [prompt.replace("{question}", piece.question) for piece in material.chosen])
    settings = {"template": prompt, "form": options.pieces.form, "unknown_tokens": unknown}
    pairs = strong_pairs(found.result, found.statistics.thresholds["high"])
    parts: dict[str, Any] = {
        "metadata": _metadata(options, model, tokenizer),
        "knowledge_pieces": knowledge_pieces(found, settings),
        "gradient_analysis": gradient_analysis(found),
        "coupling_analysis": coupling_analysis(found),
        "high_coupling_pairs": high_coupling_pairs(found, pairs, PAIRS),
        "cross_question_analysis": cross_question_analysis(found),
        "generated_files": None,
        "performance": _performance(found, model, clock, peak()),
        "readiness": readiness(found, unknown),
    }
    parts["generated_files"] = _write_files(found, pairs, parts, folder, clock)
    # A number that is not finite becomes null.
    text = json.dumps(finite(parts), indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(folder / SUMMARY, (text + "\n").encode("utf-8", "replace"))
    _print(console, found, parts, folder)
    return folder


def _write_files(
    found: Findings, pairs: StrongPairs, parts: Mapping[str, Any], folder: Path, clock: Clock
) -> dict[str, Any]:
    """Writes all files but the summary, and returns what it lists of them."""
    files = {TENSORS: "the matrix, norms, log-probabilities and ripples", PAIRS: "the strongest pairs with their texts"}
    write_tensors(found, folder / TENSORS)
    write_pairs(found.result, pairs, folder / PAIRS)
    rows = write_rows(found, parts, folder, clock)
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
    return {"folder": str(folder), "files": listed, "left_out": missing}


def write_tensors(found: Findings, path: Path) -> Path:
    """Writes the matrix and everything else that is a tensor; ids are in the header, as JSON.

    Args:
        found: What was measured.
        path: Target.
    """
    tensors: dict[str, Tensor] = {
        "coupling": found.result.matrix,
        "norms": found.result.norms,
        "log_probs": found.result.log_probs,
        "order": torch.tensor(found.statistics.order, dtype=torch.int64),
        "clusters": torch.tensor(found.statistics.clusters, dtype=torch.int64),
        "answer_log_probs": found.scores.log_prob,
        "answer_ranks": found.scores.rank,
        "answer_exact": found.scores.exact,
    }
    if found.activation is not None:
        tensors["activation"] = found.activation.matrix
    header = {"schema_version": SCHEMA_VERSION, "ids": list(found.result.ids)}
    if found.ripple is not None:
        tensors |= {f"ripple/{name}": part for name, part in vars(found.ripple).items() if isinstance(part, Tensor)}
        header["ripple_ids"] = list(found.ripple.pieces)
        header["ripple_edits"] = [{name: list(value) for name, value in each.items()} for each in found.ripple.edits]
    # Copies, because safetensors refuses tensors that share memory.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={"goldy_coupling": json.dumps(header)})
    return path


def write_rows(found: Findings, parts: Mapping[str, Any], folder: Path, clock: Clock) -> list[dict[str, Any]]:
    """Writes the rows that the report is made of, and returns them.

    Args:
        found: What was measured.
        parts: ``high_coupling_pairs``, ``readiness`` and ``performance`` of the summary.
        folder: Of all results.
        clock: Has timed the phases.
    """
    statistics = found.statistics
    coupling = Row(
        "knowledge_coupling",
        statistics.metrics(),
        {
            "measure": found.result.measure,
            **{name: getattr(statistics, name) for name in ("n_pieces", "n_pairs", "n_clusters", "thresholds")},
            **coupling_picture(found.result, statistics).details(),
            "top": parts["high_coupling_pairs"]["top"],
            "readiness": parts["readiness"],
        },
        cost=found.cost,
    )
    rows = [coupling.at(seconds=clock.seconds["coupling"])]
    if found.ripple is not None:
        rows.append(found.ripple.row().at(seconds=clock.seconds["ripple"]))
    peak = parts["performance"]["peak_memory_bytes"]
    return [
        ResultStore(folder / "goldy" / row.analysis, write=True).append(row.at(peak_memory_bytes=peak)) for row in rows
    ]


def write_pictures(rows: list[dict[str, Any]], folder: Path) -> tuple[dict[str, str], str | None]:
    """Draws the rows as PNG.

    Args:
        rows: As ``write_rows`` gives them.
        folder: Where.

    Returns:
        What each file shows, by name; and why there is none, where what draws them is not installed.
    """
    written = {}
    for row in rows:
        try:
            figures = draw_figures(row)
        except ImportError as error:
            return {}, str(error)
        for name, figure in figures.items():
            file, shows = _PICTURES[row["analysis"], name]
            # Nothing is trained here, so there is no step.
            atomic_write(folder / file, replace(figure, title=figure.title.removesuffix(", step 0")).png())
            written[file] = shows
    return written, None


def _folder(options: Options) -> Path:
    if options.out is None:
        number = 0
        while (folder := Path("runs") / "coupling" / f"version_{number}").exists():
            number += 1
        return folder
    folder, workspace = Path(options.out).expanduser(), options.method.workspace
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


def _metadata(options: Options, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    parameters = list(model.parameters())
    settings = {"pieces": options.pieces, "method": options.method, "editing": options.editing}
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {
            "name": options.model.name,
            "class": model_class(model),
            "n_parameters": sum(parameter.numel() for parameter in parameters),
            "dtype": str(parameters[0].dtype).removeprefix("torch."),
            "device": str(parameters[0].device),
        },
        "tokenizer": {
            "name": options.model.tokenizer or options.model.name,
            "class": type(tokenizer).__name__,
            "n_tokens": len(tokenizer),
        },
        "settings": {name: None if setting is None else dict(vars(setting)) for name, setting in settings.items()},
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
