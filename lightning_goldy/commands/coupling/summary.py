"""What ``goldy coupling`` answers and writes: rows, pictures, tensors, and the summary with every answer."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lightning_goldy
from lightning_goldy.analysis.agreement import EVERYTHING, Agreement, agreement_of, spaced_places
from lightning_goldy.analysis.coupling import CouplingResult, coupling_picture
from lightning_goldy.analysis.coupling.statistics import codes_of
from lightning_goldy.analysis.ripple import EDITED, Predictor, RippleResult
from lightning_goldy.callbacks.engine.store import ResultStore, peak_memory_bytes
from lightning_goldy.commands.coupling.options import Options
from lightning_goldy.commands.coupling.run import (
    Clock,
    Findings,
    StrongPairs,
    layer_error,
    measure,
    pair_kinds,
    pair_texts,
    read_material,
    readiness,
    saturated_share,
    strong_pairs,
    write_pairs,
)
from lightning_goldy.commands.output import joined_ranks, next_version
from lightning_goldy.core import store
from lightning_goldy.core.files import atomic_write, finite, printable, require_local
from lightning_goldy.core.naming import model_class
from lightning_goldy.report import readiness_lines, readiness_table
from lightning_goldy.report.figures import draw_figures
from lightning_goldy.report.formatting import format_bytes, format_number, format_percent, format_seconds
from lightning_goldy.report.page import write_report
from lightning_goldy.report.rendering import RenderError
from lightning_goldy.training.quiet import progress_only, without_known_warnings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_ENDS = 10
_CLUSTERS = 10
_TOP = 20
_CATEGORIES = 12
_GROUPS = 10
_CHANGES = 5
# Pairs that two similarities are compared on; more would take longer than they tell.
_MOST_PAIRS = 1_000_000


def knowledge_pieces(found: Findings, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What was compared, piece by piece.

    Args:
        found: What was measured.
        settings: ``template`` and ``form``, as given to the tokenizer, and ``unknown_tokens``, a share.
    """
    result, scores = found.result, found.scores
    reasons = {each["index"]: each["reason"] for each in result.failed}
    listed = [
        {
            **piece,
            **_sized(result, index),
            "known": None if index in reasons else bool(scores.exact[index]),
            "rank": None if index in reasons else int(scores.rank[index]),
            "failure": reasons.get(index),
        }
        for index, piece in enumerate(result.pieces)
    ]
    return {
        "source": found.source.source,
        "format": found.source.format,
        **settings,
        "records": found.source.records,
        "available": len(found.source.pieces),
        "compared": len(result),
        "left_out": [{"reason": reason, "count": count} for reason, count in found.source.skipped.items()],
        "incomplete": [{"reason": reason, "count": count} for reason, count in found.source.incomplete.items()],
        "failed": list(result.failed),
        "known_share": found.known_share,
        "distinct_answers": len(set(codes_of(result.column("answer"), fold=True).tolist())),
        "categories": _counted(result.column("category")),
        "n_groups": len({group for group in result.column("group") if group is not None}),
        "hops": _counted(result.column("hop")),
        "pieces": listed,
    }


def gradient_analysis(found: Findings) -> dict[str, Any]:
    """How large gradients are, where they lie, and how that goes with how sure the model is.

    Args:
        found: What was measured.
    """
    result = found.result
    good = result.valid.numpy()
    norms, log_probs = result.norms.numpy(), result.log_probs.numpy()
    order = np.flatnonzero(good)[np.argsort(norms[good], kind="stable")].tolist()
    relation = agreement_of(np.log10(norms[good]), log_probs[good], "log10 norm")
    return {
        "parameters": list(result.parameters),
        "blocks": list(result.layers),
        "centered": result.center,
        "norms": _spread(norms[good]),
        "log_probs": _spread(log_probs[good]),
        **{
            end: [{**_texts(result.pieces[index]), **_sized(result, index)} for index in places[:_ENDS]]
            for end, places in (("smallest", order), ("largest", order[::-1]))
        },
        "log_prob_relation": _told(relation, "pearson", "spearman", "n", "reason"),
        "by_layer": _by_layer(found),
        "by_layer_pieces": len(found.layered),
        "backward_error": layer_error(found),
        "by_category": _by_category(result),
    }


def coupling_analysis(found: Findings) -> dict[str, Any]:
    """The distribution of the cosines, their clusters and their spectrum.

    Args:
        found: What was measured.
    """
    result, statistics = found.result, found.statistics
    plain = ("n_pieces", "n_failed", "n_pairs", "mean", "std", "minimum", "maximum", "high", "moderate", "low")
    more = ("negative", "n_clusters", "effective_rank", "participation_ratio")
    return {
        **{name: getattr(result, name) for name in ("measure", "projection", "projection_error")},
        **{name: getattr(statistics, name) for name in (*plain, *more)},
        "thresholds": dict(statistics.thresholds),
        "quantiles": [{"share": float(share), "cosine": value} for share, value in statistics.quantiles.items()],
        "histogram": {
            "edges": np.linspace(-1, 1, len(statistics.histogram) + 1).round(10).tolist(),
            "counts": list(statistics.histogram),
        },
        "saturated_share": saturated_share(found),
        "clusters": _clusters(found),
        "activation": _activation(found),
    }


def high_coupling_pairs(found: Findings, pairs: StrongPairs, file: str) -> dict[str, Any]:
    """The strongest pairs, and what they share.

    Args:
        found: What was measured.
        pairs: Of the coupling.
        file: The table that lists them.
    """
    threshold = found.statistics.thresholds["high"]
    return {
        "threshold": threshold,
        "above": pairs.above,
        "listed": len(pairs),
        "file": file,
        "kinds": pair_kinds(found.result, pairs, threshold),
        "top": pair_texts(found.result, pairs, _TOP),
        "bottom": [
            {"cosine": pair["cosine"], **{side: dict(found.result.pieces[pair[side]]) for side in ("first", "second")}}
            for pair in found.statistics.bottom
        ],
    }


def cross_question_analysis(found: Findings) -> dict[str, Any]:
    """How pieces that share something differ from those that do not, between questions, and ripples of edits.

    Args:
        found: What was measured.
    """
    contrasts = [{"same_what": name, **contrast} for name, contrast in found.statistics.contrasts.items()]
    return {
        "contrasts": contrasts,
        "hops": [dict(hop) for hop in found.statistics.hops],
        "categories": category_means(found.result),
        "groups": linked_groups(found.result),
        "ripple": None if found.ripple is None else _ripple(found, found.ripple),
    }


def category_means(result: CouplingResult) -> dict[str, Any] | None:
    """Mean cosine within and between the most frequent categories; None where pieces have none.

    Args:
        result: Pieces that failed take no part.
    """
    names, blocks = _blocks(result, "category")
    if not names:
        return None
    chosen = sorted(range(len(names)), key=lambda place: (-len(blocks[place]), names[place]))[:_CATEGORIES]
    cosines = result.cosines.numpy()
    means = [
        [_mean(cosines[np.ix_(blocks[first], blocks[second])], own=first == second) for second in chosen]
        for first in chosen
    ]
    return {"names": [names[place] for place in chosen], "mean_cosine": means, "n_categories": len(names)}


def linked_groups(result: CouplingResult) -> list[dict[str, Any]]:
    """The pairs of different groups (questions) with the largest mean cosine between their pieces.

    Args:
        result: Pieces that failed take no part.
    """
    names, blocks = _blocks(result, "group")
    if len(names) < 2:
        return []
    sizes = np.array([len(block) for block in blocks], dtype=np.float64)
    order = np.concatenate(blocks)
    starts = (np.cumsum(sizes) - sizes).astype(np.int64)
    cosines = result.cosines.numpy()
    best: list[tuple[float, int, int]] = []
    for first, block in enumerate(blocks):
        sums = np.add.reduceat(cosines[np.ix_(block, order)].astype(np.float64).sum(axis=0), starts)
        means = (sums / (sizes[first] * sizes))[first + 1 :]
        # The few largest of this row are enough.
        places = np.argsort(-means, kind="stable")[:_GROUPS]
        best += [(float(means[place]), first, first + 1 + int(place)) for place in places]
        best = sorted(best, key=lambda link: (-link[0], *link[1:]))[:_GROUPS]
    return [
        {"first": names[one], "second": names[other], "mean_cosine": mean, "n_pairs": int(sizes[one] * sizes[other])}
        for mean, one, other in best
    ]


def size_of_change(found: Findings, ripple: RippleResult) -> list[dict[str, Any]]:
    """How the size of the measured changes goes with each thing that could have foretold it.

    Args:
        found: The coupling, and the similarity of activations if there is one.
        ripple: Of edits to some of its pieces.

    Returns:
        ``predictor``, ``n``, ``pearson``, ``spearman``, ``reason``: the sizes of both predictions; ``coupling_matrix``,
        the cosine of the *original* answer's gradient with the other piece's (GradSim); ``activation``.
    """
    chosen = ripple.pairs()
    sizes = ripple.measured.abs().numpy()[chosen]
    columns = {predictor: ripple.predicted(predictor).abs().numpy() for predictor in get_args(Predictor)}
    places = {name: place for place, name in enumerate(found.result.ids)}
    others = [places[name] for name in ripple.pieces]
    for name, result in (("coupling_matrix", found.result), ("activation", found.activation)):
        if result is not None:
            cosines = result.cosines.double().numpy()
            edited = [places[edit["pieces"][0]] for edit in ripple.edits]
            columns[name] = cosines[np.ix_(edited, others)]
    told = [agreement_of(values[chosen], sizes, name, EVERYTHING) for name, values in columns.items()]
    return [_told(entry, "predictor", "n", "pearson", "spearman", "reason") for entry in told]


def _ripple(found: Findings, ripple: RippleResult) -> dict[str, Any]:
    pieces, told = {piece["id"]: piece for piece in found.result.pieces}, ripple.details()
    return {
        **ripple.settings,
        "n_edits": len(ripple.edits),
        "n_pieces": len(ripple.pieces),
        **{name: told[name] for name in ("agreement", "linear_range", "slopes", "learning_rates", "scaled")},
        "size_of_change": size_of_change(found, ripple),
        "edits": [_edit(pieces, ripple, row) for row in range(len(ripple.edits))],
    }


def _edit(pieces: Mapping[str, Mapping[str, Any]], ripple: RippleResult, row: int) -> dict[str, Any]:
    edit = ripple.edits[row]
    piece = pieces[edit["pieces"][0]]
    others = np.array([place for place, name in enumerate(ripple.classes[row]) if name != EDITED], dtype=np.int64)
    changes = ripple.measured.numpy()[row, others]
    largest = others[np.argsort(-np.abs(changes), kind="stable")[:_CHANGES]].tolist()
    return {
        **_texts(piece),
        "new_answer": edit["answers"][0],
        "learned": bool(ripple.new_exact[row]),
        "new_log_prob_before": float(ripple.new_before[row]),
        "new_log_prob_after": float(ripple.new_after[row]),
        "step_norm": float(ripple.delta_norm[row]),
        "mean_change": float(changes.mean()) if len(changes) else None,
        "largest_changes": [
            {
                "id": ripple.pieces[place],
                "question": pieces[ripple.pieces[place]]["question"],
                "class": ripple.classes[row][place],
                "measured": float(ripple.measured[row, place]),
                "first_order": float(ripple.predicted_first_order[row, place]),
                "coupling": float(ripple.predicted_coupling[row, place]),
                "known_before": bool(ripple.exact_before[place]),
                "known_after": bool(ripple.exact_after[row, place]),
            }
            for place in largest
        ],
    }


def _blocks(result: CouplingResult, name: str) -> tuple[list[Any], list[NDArray[np.int64]]]:
    """The values of a column, and which pieces have each."""
    values: Sequence[Any] = result.column(name)
    codes = np.where(result.valid.numpy(), codes_of(values), -1)
    found = [(values[places[0]], places) for code in range(codes.max(initial=-1) + 1)
             if len(places := np.flatnonzero(codes == code))]  # fmt: skip
    return [value for value, _ in found], [places for _, places in found]


def _by_layer(found: Findings) -> list[dict[str, Any]]:
    squares = {name: norms.square().numpy() for name, norms in found.layers.items()}
    whole = sum(squares.values())
    return [
        {"block": name, "mean_norm": float(np.sqrt(square).mean()), "share_of_square": float((square / whole).mean())}
        for name, square in squares.items()
    ]


def _by_category(result: CouplingResult) -> list[dict[str, Any]]:
    names, blocks = _blocks(result, "category")
    norms = {name: result.norms.numpy()[places].astype(np.float64) for name, places in zip(names, blocks, strict=True)}
    return [
        {"category": name, "n": len(values), "mean_norm": float(values.mean())}
        for name, values in sorted(norms.items(), key=lambda item: (-len(item[1]), item[0]))
    ]


def _clusters(found: Findings) -> list[dict[str, Any]]:
    members: dict[int, list[int]] = {}
    for index, cluster in zip(found.statistics.order, found.statistics.clusters, strict=True):
        members.setdefault(cluster, []).append(index)
    cosines, pieces = found.result.cosines.numpy(), found.result.pieces
    return [
        {
            "cluster": cluster,
            "size": len(inside),
            "mean_cosine": _mean(cosines[np.ix_(inside, inside)], own=True),
            "answers": _counted([pieces[index]["answer"] for index in inside])[:3],
            "categories": _counted([pieces[index]["category"] for index in inside])[:3],
            "ids": [pieces[index]["id"] for index in inside[:5]],
        }
        for cluster, inside in sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))[:_CLUSTERS]
        if len(inside) > 1
    ]


def _mean(block: NDArray[Any], *, own: bool) -> float | None:
    """Mean of a block of cosines, without the pieces' own where it lies on the diagonal; None of no pair."""
    wide = block.astype(np.float64)
    n_pairs = wide.size - own * len(wide)
    return float((wide.sum() - own * np.trace(wide)) / n_pairs) if n_pairs else None


def _activation(found: Findings) -> dict[str, Any] | None:
    if found.activation is None:
        return None
    good = np.flatnonzero((found.result.valid & found.activation.valid).numpy())
    rows, columns = np.triu_indices(len(good), 1)
    places = spaced_places(len(rows), _MOST_PAIRS)
    first, second = good[rows[places]], good[columns[places]]
    gradient, activation = (each.cosines.numpy()[first, second] for each in (found.result, found.activation))
    told = agreement_of(activation, gradient, "activation")
    return {
        "mean": float(activation.mean()) if len(activation) else None,
        **_told(told, "pearson", "spearman", "reason"),
        "n_pairs": told.n,
        "n_failed": len(found.activation.failed),
    }


def _texts(piece: Mapping[str, Any]) -> dict[str, Any]:
    return {name: piece[name] for name in ("id", "question", "answer")}


def _sized(result: CouplingResult, index: int) -> dict[str, Any]:
    return {"gradient_norm": float(result.norms[index]), "log_prob": float(result.log_probs[index])}


def _spread(values: NDArray[Any]) -> dict[str, Any] | None:
    if not len(values):
        return None
    quantiles = np.quantile(values, _QUANTILES).tolist()
    return {
        "minimum": float(values.min()),
        "mean": float(values.mean()),
        "maximum": float(values.max()),
        "std": float(values.std()),
        "quantiles": [{"share": share, "value": value} for share, value in zip(_QUANTILES, quantiles, strict=True)],
    }


def _counted(values: Sequence[Any]) -> list[dict[str, Any]]:
    counts = Counter(value for value in values if value is not None)
    return [
        {"name": name, "count": count} for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def _told(agreement: Agreement, *names: str) -> dict[str, Any]:
    return {name: value for name, value in agreement.details().items() if name in names}


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

    Processes that torchrun started share out the pieces.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder holds something.
        ValueError: Model, pieces or options do not work.
    """
    with joined_ranks("goldy coupling") as ranks:
        folder = _folder(options)
        ranks.meet("the folder of the results")
        console = Console()
        with (
            without_known_warnings(),
            progress_only(),
            console.status("") as status,
            peak_memory_bytes(options.model.placed) as peak,
        ):
            clock = Clock(status, ranks)
            with clock.phase("pieces"):
                material = read_material(options)
            with clock.phase("model"):
                model, tokenizer = options.model.load()
            found = measure(model, tokenizer, material, options, clock)
        if not ranks.rank:
            prompt = options.pieces.prompt
            texts = [prompt.replace("{question}", piece.question) for piece in material.chosen]
            unknown = _unknown_tokens(tokenizer, texts)
            pairs = strong_pairs(found.result, found.statistics.thresholds["high"])
            settings = {"template": prompt, "form": options.pieces.form, "unknown_tokens": unknown}
            parts = _parts(found, pairs, settings)
            parts["metadata"] = _metadata(options, model, tokenizer)
            parts["performance"] = _performance(found, model, clock, peak())
            parts["generated_files"] = _write_files(found, pairs, parts, folder, clock)
            # A number that is not finite becomes null.
            text = json.dumps(finite(parts), indent=1, ensure_ascii=False, allow_nan=False)
            atomic_write(folder / SUMMARY, (text + "\n").encode("utf-8", "replace"))
            _print(console, found, parts, folder)
    return folder


def _parts(found: Findings, pairs: StrongPairs, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of the summary, in its order; those of the run itself are still empty."""
    return {
        "metadata": None,
        "knowledge_pieces": knowledge_pieces(found, settings),
        "gradient_analysis": gradient_analysis(found),
        "coupling_analysis": coupling_analysis(found),
        "high_coupling_pairs": high_coupling_pairs(found, pairs, PAIRS),
        "cross_question_analysis": cross_question_analysis(found),
        "generated_files": None,
        "performance": None,
        "readiness": readiness(found, settings["unknown_tokens"]),
    }


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
    store.write_tensors(path, tensors, {"goldy_coupling": json.dumps(header)})
    return path


def write_rows(found: Findings, parts: Mapping[str, Any], folder: Path, clock: Clock) -> list[dict[str, Any]]:
    """Writes the rows that the report is made of, and returns them.

    Args:
        found: What was measured.
        parts: ``high_coupling_pairs``, ``readiness`` and ``performance`` of the summary.
        folder: Of all results.
        clock: Has timed the phases.
    """
    more = {"measure": found.result.measure, **coupling_picture(found.result, found.statistics).details()}
    more |= {"top": parts["high_coupling_pairs"]["top"], "readiness": parts["readiness"]}
    coupling = found.statistics.row().extended(result=more, cost=found.result.cost)
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
    written: dict[str, str] = {}
    lacking: dict[str, str] = {}

    def tell(name: str, error: Exception) -> None:
        lacking[name] = f"{name}: {error}"

    for row in rows:
        try:
            figures = draw_figures(row, failed=tell)
        except ImportError as error:
            return {}, str(error)
        for name, figure in figures.items():
            file, shows = _PICTURES[row["analysis"], name]
            try:
                # Nothing is trained here, so there is no step.
                atomic_write(folder / file, replace(figure, title=figure.title.removesuffix(", step 0")).png())
            except RenderError as error:
                tell(name, error)
            else:
                written[file] = shows
    return written, "; ".join(lacking.values()) or None


def _folder(options: Options) -> Path:
    if options.out is None:
        return next_version(Path("runs") / "coupling")
    folder, workspace = require_local(options.out, "--out"), options.method.workspace
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
        lines_of_it = map(printable, found.ripple.table().split("\n"))
        console.print("Ripple effects", *lines_of_it, sep="\n", markup=False, highlight=False)
    console.print(readiness_table(summary["readiness"]["checks"]))
    console.print(f"verdict: {summary['readiness']['verdict']}", markup=False, highlight=False)
    for line in readiness_lines(summary["readiness"]["checks"]):
        console.print(printable(line), markup=False, highlight=False)
    for each in summary["generated_files"]["files"]:
        print(folder / each["file"])
    if summary["generated_files"]["left_out"]:
        print(printable(f"left out: {summary['generated_files']['left_out']}"))
