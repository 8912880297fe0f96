"""Golden parameters, the change since the snapshot, its shape, and the search for reverse golden parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_goldy.report.builders import (
    Bars,
    HeatMap,
    Histogram,
    Line,
    Lines,
    arrange,
    bars,
    heat_map,
    histogram,
    lines,
)
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.figures import (
    Figure,
    ReportError,
    Row,
    naming,
    number,
    objects_of,
    register_figure,
    result_of,
    text_of,
)
from lightning_goldy.report.formatting import MISSING, format_number, format_percent

KINDS = ("embedding", "attention", "mlp", "norm", "head", "other")


@register_figure("golden_parameters", "density", heading="Where the golden parameters are")
def chart_golden_parameters(row: Row) -> Figure:
    """Heat map of the golden density by block and tensor kind, in percent, with the density expected by chance.

    Args:
        row: Of the analysis ``golden_parameters``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> tensors = [{"name": "h.0.w", "block": "h.0", "kind": "mlp", "numel": 8, "golden": 2}]
        >>> chart_golden_parameters({"metrics": {}, "result": {"tensors": tensors}}).data["cells"]["value"]
        [25.0]
    """
    # Cividis runs from navy to gold and reads the same with colour blindness and in grey.
    return _block_map(golden_density(row), HeatMap("golden, %", colours="cividis"), golden_caption(row))


@register_figure("golden_snapshot", "relative_change", heading="Where the weights changed")
def chart_weight_changes(row: Row) -> Figure:
    """Heat map of ||Delta|| / ||theta_0|| by block and tensor kind, in percent.

    Args:
        row: Of the analysis ``golden_snapshot``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> tensors = [{"name": "h.0.w", "block": "h.0", "kind": "mlp", "base_norm": 2.0, "delta_norm": 0.5}]
        >>> chart_weight_changes({"metrics": {}, "result": {"tensors": tensors}}).data["cells"]["value"]
        [25.0]
    """
    return _block_map(relative_change(row), HeatMap("change, %"), change_caption(row))


@register_figure("golden_snapshot", "change_histogram", heading="Sizes of the changes")
def chart_change_histogram(row: Row) -> Figure | str:
    """Histogram of log10 |Delta| over the elements; unchanged ones are counted in the caption.

    Args:
        row: Of the analysis ``golden_snapshot``.

    Returns:
        The figure, or that no element has changed.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> found = {"edges": [-3, -2, -1], "counts": [4, 1], "zero": 5}
        >>> chart_change_histogram({"result": {"histogram": found}}).data["bins"]["count"]
        [4, 1]
    """
    found = change_histogram(row)
    if not found.counts.any():
        return "No element has changed."
    return histogram(found.edges, found.counts, Histogram("log10 |Delta|"), caption=histogram_caption(row))


@register_figure("reverse_golden_parameters", "history", heading="The course of the search")
def chart_search_history(row: Row) -> Figure:
    """The divergence of what was tried and kept over the iterations, and below it the sizes of mask and pool.

    Args:
        row: Of the analysis ``reverse_golden_parameters``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> entry = {"iteration": 0, "size": 4, "pool": 5, "greedy_kl": 1.0, "pool_kl": None, "kl": 1.0}
        >>> result = {"history": [entry | {"accepted": False}], "kl_divergence": 0.9, "single_shots": {"taylor": 0.2}}
        >>> list(dict.fromkeys(chart_search_history({"result": result}).data["points_0"]["line"]))
        ['kept', 'greedy', 'pool', 'pool, accepted', 'returned, evaluation samples', 'single shot by taylor']
    """
    result = row["result"]
    with naming("the row of a search lacks or spoils"):
        levels = {"returned, evaluation samples": result["kl_divergence"]}
        levels |= {f"single shot by {name}": value for name, value in result["single_shots"].items()}
        names = ("iteration", "greedy_kl", "pool_kl", "kl", "accepted", "size", "pool")
        at, greedy, pool, kept, accepted, sizes, pools = (
            [entry[name] for entry in result["history"]] for name in names
        )
    notes = [f"pool of {held:,} for {size:,}" for held, size in zip(pools, sizes, strict=True)]
    taken = [value if better else None for value, better in zip(pool, accepted, strict=True)]
    tried = {
        "kept": Line(at, kept),
        "greedy": Line(at, greedy, shape="crosses"),
        "pool": Line(at, pool, shape="points", notes=notes),
        "pool, accepted": Line(at, taken, shape="disks", notes=notes),
    }
    ends = [min(at, default=0), max(at, default=0)]
    tried |= {label: Line(ends, [level, level], shape="dashed") for label, level in levels.items()}
    upper = lines(tried, Lines(x="", y="divergence, nats", scale="linear", zero=True))
    elements = {"elements of the pool": Line(at, pools), "elements of the mask": Line(at, sizes)}
    lower = lines(elements, Lines(x="iteration", y="elements", scale="linear", zero=True, step=True, height=100))
    return arrange([upper, lower], caption=search_caption(row))


PANELS = {
    "stable_rank": "stable rank",
    "alignment_over_chance": "alignment over chance",
    "histogram_drift": "histogram drift, nats",
    "intruder_share": "intruders, share",
}
"""Columns of a parameter distribution that are drawn, with their labels."""


@register_figure("parameter_distribution", "blocks", heading="Shape of the change by block")
def chart_parameter_distribution(row: Row) -> Figure:
    """Stable rank, alignment over chance, histogram drift and intruder directions of each block.

    Args:
        row: Of the analysis ``parameter_distribution``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> tensor = {"block": "h.0", "numel": 4, "stable_rank": 2.0, "alignment_over_chance": 3.0}
        >>> chart_parameter_distribution({"result": {"tensors": [tensor]}}).data["bars_0"]["value"]
        [2.0]
    """
    panels = []
    for place, (column, label) in enumerate(PANELS.items()):
        # The embeddings' number may be hundreds of times a block's.
        ratio: dict[str, Any] = {"mark": 1.0, "scale": "auto"} if column == "alignment_over_chance" else {}
        panels.append(bars(by_block(row, column), Bars(label, colour=place, labels=place == 0, **ratio)))
    return arrange(panels, columns=len(panels), width=600, caption=distribution_caption(row))


def _block_map(grid: BlockGrid, style: HeatMap, caption: str) -> Figure:
    return heat_map(grid.values, grid.blocks, grid.kinds, style, caption=caption)


@dataclass(frozen=True, eq=False)
class BlockGrid:
    """One number for every kind of tensor in every block.

    Args:
        blocks: Row labels, in model order.
        kinds: Column labels.
        values: [blocks, kinds]; NaN where a block has no tensor of the kind or the number does not exist.
    """

    blocks: tuple[str, ...]
    kinds: tuple[str, ...]
    values: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ChangeHistogram:
    """How large the changes of the single elements are.

    Args:
        edges: [bins + 1] of log10 |Delta|, ascending.
        counts: [bins] elements.
        zero: Elements that did not change at all; they have no logarithm.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    zero: int

    @property
    def total(self) -> int:
        """All elements."""
        return int(self.counts.sum()) + self.zero


def golden_density(row: Row) -> BlockGrid:
    """Share of the parameters that is golden, in percent.

    Args:
        row: Of the analysis ``golden_parameters``.

    Raises:
        ReportError: A tensor lacks a field.

    Example:
        >>> tensor = {"name": "h.0.w", "block": "h.0", "kind": "mlp", "numel": 8, "golden": 2}
        >>> golden_density({"result": {"tensors": [tensor]}}).values
        array([[25.]])
    """
    tensors = _tensors(row, ("golden", "numel"))
    golden, numel = _sums(tensors, "golden"), _sums(tensors, "numel")
    return _grid(tensors, {cell: 100 * count / numel[cell] for cell, count in golden.items() if numel[cell]})


def relative_change(row: Row) -> BlockGrid:
    """||Delta|| / ||theta_0|| over the tensors of a kind in a block, in percent.

    Args:
        row: Of the analysis ``golden_snapshot``.

    Raises:
        ReportError: A tensor lacks a field.

    Example:
        >>> tensor = {"name": "h.0.w", "block": "h.0", "kind": "mlp", "base_norm": 5.0, "delta_norm": 1.0}
        >>> relative_change({"result": {"tensors": [tensor]}}).values
        array([[20.]])
    """
    tensors = _tensors(row, ("base_norm", "delta_norm"))
    base, delta = _sums(tensors, "base_norm", power=2), _sums(tensors, "delta_norm", power=2)
    # Where the base is zero (fresh biases, the second LoRA factor) a relative change does not exist.
    return _grid(tensors, {cell: 100 * math.sqrt(delta[cell] / base[cell]) for cell in base if base[cell] != 0})


def change_histogram(row: Row) -> ChangeHistogram:
    """The distribution of |Delta| over the elements.

    Args:
        row: Of the analysis ``golden_snapshot``.

    Raises:
        ReportError: The histogram is missing or its edges and counts do not belong together.

    Example:
        >>> change_histogram({"result": {"histogram": {"edges": [-3, -2, -1], "counts": [4, 1], "zero": 5}}}).total
        10
    """
    found = result_of(row).get("histogram")
    if not isinstance(found, Mapping) or not {"edges", "counts"} <= set(found):
        raise ReportError(f"'result.histogram' must hold 'edges' and 'counts', got {found!r:.60}")
    with naming("'result.histogram' holds something that is not a number:"):
        edges = np.asarray(found["edges"], dtype=np.float64)
        counts = np.asarray(found["counts"], dtype=np.int64)
        zero = int(found.get("zero", 0))
    if counts.ndim != 1 or edges.shape != (counts.size + 1,):
        if edges.size or counts.size:
            raise ReportError(f"'result.histogram' has {edges.size} edges for {counts.size} counts; one more is needed")
        edges = np.zeros(1)
    if not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
        raise ReportError("'result.histogram.edges' must be finite and ascending")
    if (counts < 0).any() or zero < 0:
        raise ReportError("'result.histogram' has a negative count")
    return ChangeHistogram(edges, counts, zero)


def search_caption(row: Row) -> str:
    """Settings of the search, and what it found against the single shots.

    Example:
        >>> result = {"top_k_percent": 1, "scope": "tensor", "strategy": "none", "passes": 12, "history": []}
        >>> search_caption({"result": result | {"kl_divergence": 8.5, "single_shots": {"gradient": 1.4}}})
        '1 % per tensor, strategy none, 12 passes: 8.5 nats; single shots: gradient 1.4 nats; pools accepted: 0 of 0'
    """
    result = row["result"]
    scope = {"tensor": "per tensor", "global": "of all elements"}.get(result.get("scope"), MISSING)
    singles = ", ".join(f"{name} {format_number(value)}" for name, value in result.get("single_shots", {}).items())
    history = result.get("history", ())
    accepted = sum(bool(entry.get("accepted")) for entry in history)
    return (
        f"{format_number(result.get('top_k_percent'))} % {scope}, strategy {result.get('strategy', MISSING)}, "
        f"{format_number(result.get('passes'))} passes: {format_number(result.get('kl_divergence'))} nats; "
        f"single shots: {singles or MISSING} nats; pools accepted: {accepted} of {len(history)}"
    )


def by_block(row: Row, column: str) -> dict[str, float]:
    """Mean of a column over each block's tensors, weighted by their elements, in the model's order.

    Raises:
        ReportError: The row lacks what is needed.
    """
    sums: dict[str, tuple[float, int]] = {}
    with naming("a row of parameter_distribution lacks what its figure needs:"):
        for tensor in row["result"]["tensors"]:
            total, weight = sums.setdefault(tensor["block"], (0.0, 0))
            value = tensor.get(column)
            if value is not None:
                sums[tensor["block"]] = (total + value * tensor["numel"], weight + tensor["numel"])
    return {block: total / weight if weight else 0.0 for block, (total, weight) in sums.items()}


def distribution_caption(row: Row) -> str:
    """What a reader should see."""
    ranks = {block: value for block, value in by_block(row, "stable_rank").items() if value}
    if not ranks:
        return "Nothing has changed since the snapshot."
    lowest = min(ranks, key=ranks.__getitem__)
    return (
        f"The change of {lowest} has the fewest directions, a stable rank of {format_number(ranks[lowest])}. An "
        "alignment over chance far above 1 amplifies directions that the base had; near 1 the change has its own. "
        f"{_intruders_told(row)}"
    )


def _intruders_told(row: Row) -> str:
    """How many directions resemble none of the base's, against chance."""
    found, null = (by_block(row, column) for column in ("intruder_share", "intruder_share_null"))
    most = max(found, key=found.__getitem__)
    if not any(found.values()):
        return "No top direction is an intruder, one that resembles none of the base's."
    share, chance = format_percent(found[most]), format_percent(null[most])
    own = [tensor for tensor in row["result"]["tensors"] if tensor["block"] == most]
    ranked = any(tensor.get("intruder_share_null_rank") is not None for tensor in own)
    low = (
        f", one of its low rank too {format_percent(by_block(row, 'intruder_share_null_rank')[most])}" if ranked else ""
    )
    return (
        f"Intruders, top directions that resemble none of the base's, are most in {most}, {share} of them; a random "
        f"change of its size makes {chance}{low}."
    )


def golden_caption(row: Row) -> str:
    """Settings of the analysis, the density found, and what it stands against: in older rows chance.

    Example:
        >>> result = {"top_k_percent": 5, "score": "taylor", "scope": "tensor", "quorum": 1.0, "n_samples": 2}
        >>> golden_caption({"metrics": {"density": 0.02, "chance_density": 0.0025}, "result": result})
        'top 5 % by taylor score per tensor, marked by 100 % of 2 samples: density 2 %, by chance 0.25 %'
        >>> golden_caption({"metrics": {"density": 0.02, "over_null": 0.5}, "result": result}).partition(": ")[2]
        'density 2 %, in matrices 0.5 times what shared rows and columns explain'
    """
    metrics, result = row["metrics"], row["result"]
    scope = {"tensor": "per tensor", "global": "over all tensors"}.get(result.get("scope"), MISSING)
    return (
        f"top {format_number(result.get('top_k_percent'))} % by {result.get('score', MISSING)} score {scope}, "
        f"marked by {format_percent(result.get('quorum'))} of {format_number(result.get('n_samples'))} samples: "
        f"density {format_percent(metrics.get('density'))}, {_against(metrics)}"
    )


def _against(metrics: Mapping[str, Any]) -> str:
    if "over_null" not in metrics:
        return f"by chance {format_percent(metrics.get('chance_density'))}"
    told = f"in matrices {format_number(metrics['over_null'])} times what shared rows and columns explain"
    if metrics.get("over_null_low") is not None:
        ends = (format_number(metrics[f"over_null_{end}"]) for end in ("low", "high"))
        told += f" (95 % over samples: {' to '.join(ends)})"
    if metrics.get("control_count") is not None:
        counts = (format_number(metrics.get(name)) for name in ("control_count", "count"))
        told += "; golden with random tokens {}, with these samples {}".format(*counts)
    return told


def change_caption(row: Row) -> str:
    """How far everything that was trained has moved.

    Example:
        >>> change_caption({"metrics": {"relative_change": 0.01, "delta_norm": 2.5}})
        'the whole model moved by 1 % of its base norm (||Delta|| = 2.5)'
        >>> change_caption({"metrics": {"relative_change": 0.01, "delta_norm": 2.5}, "result": {"space": "merged"}})
        'the weights with adapters moved by 1 % of their base norm (||Delta|| = 2.5)'
    """
    metrics = row["metrics"]
    relative, norm = format_percent(metrics.get("relative_change")), format_number(metrics.get("delta_norm"))
    what = _MOVED.get(row.get("result", {}).get("space"), "the whole model moved by {} of its")
    floor = metrics.get("rounding_floor")
    beside = "" if floor is None else f"; rounding alone makes {format_percent(floor)}"
    return f"{what.format(relative)} base norm (||Delta|| = {norm}{beside})"


_MOVED = {
    "merged": "the weights with adapters moved by {} of their",
    "adapters": "the adapters moved by {} of their",
}


def histogram_caption(row: Row) -> str:
    """How many elements moved, and how many did not.

    Example:
        >>> histogram_caption({"result": {"histogram": {"edges": [-3, -2, -1], "counts": [4, 1], "zero": 15}}})
        '5 elements changed, 15 did not at all (75 %)'
    """
    found = change_histogram(row)
    share = format_percent(found.zero / found.total if found.total else None)
    return f"{found.total - found.zero:,} elements changed, {found.zero:,} did not at all ({share})"


def _tensors(row: Row, numbers: tuple[str, ...]) -> list[Mapping[str, Any]]:
    tensors = objects_of(row, "tensors", "a list with at least one tensor")
    for index, tensor in enumerate(tensors):
        where = f"result.tensors[{index}]"
        for field in ("block", "kind"):
            text_of(tensor, field, where)
        for field in numbers:
            number(tensor.get(field, "nothing"), f"{where}.{field}")
    return tensors


def _sums(tensors: list[Mapping[str, Any]], field: str, *, power: int = 1) -> dict[tuple[str, str], float]:
    sums: dict[tuple[str, str], float] = {}
    for tensor in tensors:
        cell = tensor["block"], tensor["kind"]
        sums[cell] = sums.get(cell, 0.0) + number(tensor[field], field) ** power
    return sums


def _grid(tensors: list[Mapping[str, Any]], cells: Mapping[tuple[str, str], float]) -> BlockGrid:
    blocks = tuple(dict.fromkeys(tensor["block"] for tensor in tensors))
    present = dict.fromkeys(tensor["kind"] for tensor in tensors)
    kinds = (*(kind for kind in KINDS if kind in present), *(kind for kind in present if kind not in KINDS))
    values = np.full((len(blocks), len(kinds)), np.nan)
    for (block, kind), value in cells.items():
        values[blocks.index(block), kinds.index(kind)] = value
    return BlockGrid(blocks, kinds, values)


_GOLDEN_SNAPSHOT = Description(
    title="Change since the snapshot",
    measures="How far the weights have moved from the base model that was kept when the finetune began.",
    reading=(
        "A small relative change is a small step; blocks that stand out in the heat map are where the finetune "
        "happened. A cosine near 1 between successive updates means a steady direction, near 0 wandering, below 0 "
        "going back and forth."
    ),
    metrics={
        "delta_norm": "||Delta||; the distance from the snapshot",
        "relative_change": "||Delta|| / ||base||; by block, of all that the block holds",
        "update_cosine": "cosine between this update and the one before",
        "rounding_floor": "||Delta|| / ||base|| that rounding to the training's precision alone makes",
        "lost_share": "share of the changed elements whose change is below half a step of that precision",
    },
    headline=("relative_change", "delta_norm", "update_cosine"),
)
describe("golden_snapshot", _GOLDEN_SNAPSHOT)
_GOLDEN_PARAMETERS = Description(
    title="Golden parameters",
    measures=(
        "Which parameters matter to every sample: for each one the top k % by gradient score are marked, and a "
        "parameter is golden when enough of the samples mark it."
    ),
    reading=(
        "Gradients are large in whole rows and columns, those of active channels, so many elements are golden whatever "
        "the samples say. Near 1 over the null, and with as many golden for random tokens, the set tells of the model "
        "and not of the samples. A delta share above the density (a ratio above 1) means that the finetune moved the "
        "golden parameters more than the others; a Jaccard index near 1 that the set is stable."
    ),
    metrics={
        "count": "parameters in the mask; the golden ones",
        "density": "parameters in the mask divided by all",
        "null_count": "golden elements of matrices that shared rows and columns explain",
        "over_null": "golden elements of matrices, as a multiple of those; 1 = nothing but rows and columns is shared",
        "over_null_low": "lower end of its 95 % interval over samples",
        "over_null_high": "upper end of that interval",
        "control_count": "golden elements when the tokens are random, of the same lengths",
        "control_over_null": "over the null, with random tokens",
        "shared_with_control": "share of the golden elements of matrices that are golden with random tokens, too",
        "chance_density": "density expected if samples marked parameters independently",
        "density_over_chance": "density divided by the one expected by chance",
        "jaccard_previous": "overlap with the mask of the analysis before (intersection over union)",
        "delta_share": "share of ||Delta||^2 inside the mask",
        "delta_share_over_density": "that share divided by the density; 1 = no more than their number",
    },
    headline=("over_null", "control_count", "jaccard_previous", "delta_share"),
    method=(
        "Golden parameters are those that a quorum of samples each rank among the strongest by gradient score; their "
        "count stands against a null of row and column rates fitted to each tensor, and against random tokens."
    ),
)
describe("golden_parameters", _GOLDEN_PARAMETERS)
_REVERSE_GOLDEN_PARAMETERS = Description(
    title="Reverse golden parameters",
    measures=(
        "Which few parameters the predictions hang on: the mask of a given size whose zeroing moves the model's "
        "distribution most, searched for on one half of the probe and measured on the other."
    ),
    reading=(
        "Compare the divergence with those of the single-shot masks of the same size: how much more the search "
        "has found than a score of the unmasked model. It is a lower bound of what zeroing so many can do. "
        "A Jaccard index near 1 means that the predictions hang on the same elements as before."
    ),
    metrics={
        "kl_divergence": (
            "mean KL(model || what stands in for it), nats per target; the masked model, on samples without "
            "a part in the search"
        ),
        "search_divergence": "the same on the samples that chose; far above, the mask fits those samples alone",
        "single_shot": "divergence of a mask of the same size by this score of the unmasked model, nats per target",
        "over_gradient": "the divergence as a multiple of the mask's of the largest gradients",
        "count": "parameters in the mask; the zeroed ones",
        "density": "parameters in the mask divided by all",
        "accepted_pools": "iterations in which the pool's mask beat the greedy one",
        "token_agreement": "share of positions at which the masked model writes the same token",
        "kl_per_token": (
            "mean KL(model || the other) along what the model writes, nats per token; the whole one, the masked one"
        ),
        "jaccard_previous": "overlap with the mask of the analysis before (intersection over union)",
        "delta_share": "share of ||Delta||^2 inside the mask",
        "delta_share_over_density": "that share divided by the density; 1 = no more than their number",
    },
    headline=("kl_divergence", "over_gradient", "jaccard_previous"),
    method=(
        "Reverse golden parameters are the mask of a given size, found by exchanging elements by first-order scores, "
        "whose zeroing moves the predictions most, as a KL divergence on samples that did not choose."
    ),
)
describe("reverse_golden_parameters", _REVERSE_GOLDEN_PARAMETERS)
_PARAMETER_DISTRIBUTION = Description(
    title="Shape of the change",
    measures=(
        "What the change of each matrix looks like: how many directions it has, whether it lies along the base's "
        "strongest directions, how far the distribution of the weights has drifted, and how many of its own top "
        "directions resemble none of the base's."
    ),
    reading=(
        "A stable rank near 1 means that the change is one direction, as of a low-rank adapter. An alignment over "
        "chance near 1 means that the finetune found directions of its own; far above, that it amplified those "
        "that the base had. Intruders beyond what a random change of that size makes are new directions that the "
        "finetune put above the base's own."
    ),
    metrics={
        "stable_rank": "||Delta||_F^2 / ||Delta||_2^2, mean over the matrices weighted by size; by block",
        "effective_rank": "exponential of the entropy of the normalised spectrum; of matrices' changes, by block",
        "alignment_over_chance": "share of ||Delta||^2 along the base's top directions, over chance",
        "histogram_drift": "Jensen-Shannon divergence of the weights' histograms, nats; by block",
        "relative_change": "||Delta|| / ||base||; by block, of all that the block holds",
        "intruder_share": "share of the weights' top singular directions that resemble none of the base's; by block",
        "intruder_share_null": "the same after a random change of equal norm, of adapters of their rank",
        "intruder_share_null_rank": "the same after one of the change's own rank, where that is low",
    },
    headline=("stable_rank", "effective_rank", "alignment_over_chance", "intruder_share"),
    method=(
        "The shape of each matrix's change was told by its singular values, its stable rank and its intruder "
        "directions (Shuttleworth et al. 2024, arXiv 2410.21228)."
    ),
)
describe("parameter_distribution", _PARAMETER_DISTRIBUTION)
