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
from safetensors.torch import save_file
from torch import Tensor, nn

import lightning_goldy
from lightning_goldy.analysis.coupling import coupling_picture
from lightning_goldy.analysis.result import Cost, Row
from lightning_goldy.callbacks.store import ResultStore, peak_memory_bytes
from lightning_goldy.commands.coupling.options import Editing, Method, Pieces
from lightning_goldy.commands.coupling.questions import cross_question_analysis, strong_pairs, write_pairs
from lightning_goldy.commands.coupling.report import (
    PARTS,
    SCHEMA_VERSION,
    coupling_analysis,
    gradient_analysis,
    high_coupling_pairs,
    knowledge_pieces,
    readiness,
)
from lightning_goldy.commands.coupling.run import Clock, Findings, measure, read_edits, read_pieces_of
from lightning_goldy.core.files import atomic_path, atomic_write, to_json_line
from lightning_goldy.core.naming import model_class
from lightning_goldy.data.tokenization import load_tokenizer
from lightning_goldy.report.figures import draw_figures
from lightning_goldy.report.formatting import format_bytes, format_number, format_percent, format_seconds
from lightning_goldy.report.page import write_report
from lightning_goldy.report.topics.coupling import readiness_lines, readiness_table
from lightning_goldy.training.models import WeightDtype, check_vocabulary, load_model
from lightning_goldy.training.quiet import progress_only, without_known_warnings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TENSORS = "coupling.safetensors"
SUMMARY = "coupling.json"
PAIRS = "pairs.csv"
REPORT = "report.html"
_PICTURES = {
    ("knowledge_coupling", "heat_map"): ("heat_map.png", "cosines in the order of the clusters"),
    ("knowledge_coupling", "distribution"): ("distribution.png", "distribution of the cosines, with the thresholds"),
    ("ripple_effects", "prediction"): ("ripple.png", "predicted against measured changes by the edits"),
}
_RIPPLE = (
    "predicted_first_order", "predicted_coupling", "cosine", "before", "after", "rank_before", "rank_after",
    "exact_before", "exact_after", "new_before", "new_after", "new_exact", "delta_norm", "gradient_norm",
)  # fmt: skip


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
        tensors |= {f"ripple/{name}": getattr(found.ripple, name) for name in _RIPPLE}
        header["ripple_ids"] = list(found.ripple.pieces)
        header["ripple_edits"] = [{name: list(value) for name, value in each.items()} for each in found.ripple.edits]
    # Copies, because safetensors refuses tensors that share memory.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={"goldy_coupling": json.dumps(header)})
    return path


def write_rows(
    found: Findings, parts: Mapping[str, Any], folder: Path, costs: Mapping[str, tuple[float, Cost]], peak: int
) -> list[dict[str, Any]]:
    """Writes the rows that the report is made of, and returns them.

    Args:
        found: What was measured.
        parts: ``high_coupling_pairs`` and ``readiness`` of the summary.
        folder: Of all results.
        costs: Of each analysis its seconds and passes.
        peak: Peak of memory of them all, bytes.
    """
    coupling = Row(
        "knowledge_coupling",
        found.statistics.metrics(),
        {
            "measure": found.result.measure,
            "n_pieces": found.statistics.n_pieces,
            "n_pairs": found.statistics.n_pairs,
            "n_clusters": found.statistics.n_clusters,
            "thresholds": dict(found.statistics.thresholds),
            **coupling_picture(found.result, found.statistics).details(),
            "top": parts["high_coupling_pairs"]["top"],
            "readiness": parts["readiness"],
        },
    )
    lines = []
    for row in (coupling, *([] if found.ripple is None else [found.ripple.row()])):
        seconds, cost = costs[row.analysis]
        placed = row.extended(cost=cost).at(seconds=seconds, peak_memory_bytes=peak)
        lines.append(ResultStore(folder / "goldy" / row.analysis, write=True).append(placed))
    return lines


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
            atomic_write(folder / file, figure.png())
            written[file] = shows
    return written, None


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

    @property
    def placed(self) -> torch.device:
        """Where it goes.

        Raises:
            ValueError: A GPU is asked for and there is none.
        """
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {self.device}: PyTorch finds no GPU; leave it out, or give cpu")
        return device

    def load(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """The model on its device, and its tokenizer.

        Raises:
            ValueError: One of them cannot be loaded, or they do not fit.
        """
        # The tokenizer first: a mistake there is found before the weights are read.
        tokenizer = load_tokenizer(self.tokenizer or self.name)
        model = load_model(self.name, dtype=self.dtype)
        check_vocabulary(model, tokenizer)
        return model.to(self.placed), tokenizer


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
    with (
        without_known_warnings(),
        progress_only(),
        console.status("") as status,
        peak_memory_bytes(model.placed) as peak,
    ):
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
    pairs = strong_pairs(found.result, found.statistics.thresholds["high"])
    parts["gradient_analysis"] = gradient_analysis(found)
    parts["coupling_analysis"] = coupling_analysis(found)
    parts["high_coupling_pairs"] = high_coupling_pairs(found, pairs, PAIRS)
    parts["cross_question_analysis"] = cross_question_analysis(found)
    costs = {
        analysis: (clock.seconds.get(phase, 0.0), Cost(forwards=count))
        for analysis, phase, count in (
            ("knowledge_coupling", "coupling", 2 * len(found.result)),
            ("ripple_effects", "ripple", 0 if found.ripple is None else found.ripple.after.numel()),
        )
    }
    files = {TENSORS: "the matrix, norms, log-probabilities and ripples"}
    write_tensors(found, folder / TENSORS)
    files[PAIRS] = "the strongest pairs with their texts"
    write_pairs(found.result, pairs, folder / PAIRS)
    rows = write_rows(found, parts, folder, costs, parts["performance"]["peak_memory_bytes"])
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
