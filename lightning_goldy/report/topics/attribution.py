"""What carries a finetune's effect: contributions by block, kind and head, and what grafts of the change recover."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_goldy.core.naming import kind_of
from lightning_goldy.report.builders import (
    Bars,
    HeatMap,
    Line,
    Lines,
    Points,
    Scatter,
    arrange,
    bars,
    heads_style,
    heat_map,
    lines,
    scatter,
)
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.figures import Figure, Row, naming, register_figure, register_table
from lightning_goldy.report.formatting import format_number, format_percent, percent, texts_html

_LACKS = "a row of change_attribution lacks what its figure needs:"
# Neurons and tokens that are listed.
_SHOWN = 10
_NOTE = "95 % interval over passages"
# Recovered effects that are drawn; thinning to a thousandth and rescaling ends far outside.
_FARTHEST = (-0.5, 2.0)
_LABELS = {
    "attribution": "by attribution",
    "magnitude": "by size of the change",
    "random": "at random",
    "gradient": "by the first order",
    "interpolation": "interpolation",
    "drop_and_rescale": "drop and rescale",
    "learned": "a learned mask",
    "greedy": "greedy search of blocks",
    "finetune": "the finetune",
}


@register_figure("change_attribution", "places", heading="Where the effect sits")
def chart_attribution_places(row: Row) -> Figure:
    """What each block's parameters of each kind contribute to the change of the metric.

    Args:
        row: Of the analysis ``change_attribution``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> tensors = [{"block": "h.0", "kind": "mlp", "contribution": -0.5}]
        >>> row = {"result": {"metric": "loss", "tensors": tensors, "kinds": [], "total": -0.5}, "metrics": {}}
        >>> chart_attribution_places(row).data["cells"]["value"]
        [-0.5]
    """
    table, unit = places(row), _unit(row)
    blocks, kinds = (list(dict.fromkeys(pair[side] for pair in table)) for side in (0, 1))
    values = [[table.get((block, kind), math.nan) for kind in kinds] for block in blocks]
    spans = _place_spans(row)
    style = HeatMap(unit, rows="block", columns="kind", colours="diverging", cell=(64, 18), note=_NOTE if spans else "")
    notes = [[spans.get((block, kind), "") for kind in kinds] for block in blocks]
    return heat_map(values, blocks, kinds, style, notes=notes, caption=places_caption(row))


@register_figure("change_attribution", "heads", heading="Attention heads")
def chart_attribution_heads(row: Row) -> Figure | str:
    """What each head's query and output weights contribute.

    Args:
        row: Of the analysis ``change_attribution``.

    Returns:
        The figure, or that the model's heads are not described.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> units = [{"kind": "head", "place": "h.0", "values": [0.1, -0.2], "low": [0.0, -0.3], "high": [0.2, -0.1]}]
        >>> cells = chart_attribution_heads({"result": {"metric": "loss", "units": units}}).data["cells"]
        >>> cells["value"], cells["note"]
        ([0.1, -0.2], ['0 to 0.2', '-0.3 to -0.1'])
    """
    with naming(_LACKS):
        units = [unit for unit in row["result"]["units"] if unit["kind"] == "head"]
        heads = [(unit["place"], unit["values"]) for unit in units]
        notes = [[f"{low} to {high}" if low else "" for low, high in _unit_spans(unit)] for unit in units]
    if not heads:
        return "The heads of this model are not described, or none of their weights were trained."
    width = max(len(values) for _, values in heads)
    table = [[*values, *[math.nan] * (width - len(values))] for _, values in heads]
    # A few heads have room for cells in which the labels stand apart.
    side = min(26, max(13, 416 // width))
    style = heads_style(
        _unit(row), colours="diverging", cell=(side, min(side, 20)), note=_NOTE if any(map(any, notes)) else ""
    )
    notes = [[*told, *[""] * (width - len(told))] for told in notes]
    return heat_map(table, [place for place, _ in heads], range(width), style, notes=notes, caption=heads_caption(row))


@register_figure("change_attribution", "neurons", heading="MLP neurons")
def chart_attribution_neurons(row: Row) -> Figure | str:
    """What each block's neurons contribute, from the strongest one to the many behind it, in steps that double.

    Args:
        row: Of the analysis ``change_attribution``.

    Returns:
        The figure, or that the model's neurons are not described.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> unit = {"kind": "neuron", "place": "h.0", "count": 4, "total": -1.0, "ranks": [-0.5, -0.4, -0.1]}
        >>> unit["sizes"] = [0.5, 0.4, 0.1]
        >>> figure = chart_attribution_neurons({"result": {"metric": "loss", "units": [unit]}})
        >>> figure.data["cells"]["x"], figure.data["cells"]["value"]
        (['0|1', '1|2 to 3', '2|from 4'], [-0.5, -0.4, -0.1])
    """
    with naming(_LACKS):
        units = [(unit["place"], unit["ranks"]) for unit in row["result"]["units"] if _has_ranks(unit)]
    if not units:
        return "The neurons of this model are not described, or none of their weights were trained."
    steps = max(len(ranks) for _, ranks in units)
    table = [[*ranks, *[math.nan] * (steps - len(ranks))] for _, ranks in units]
    ranks = ["1", *(f"{1 << step} to {(2 << step) - 1}" for step in range(1, steps - 1))]
    style = HeatMap(_unit(row), columns="neurons by rank", colours="diverging", numbers=False, cell=(26, 13), axes=True)
    columns = [*ranks, f"from {1 << steps - 1}"][:steps]
    return heat_map(table, [place for place, _ in units], columns, style, caption=neurons_caption(row))


@register_figure("change_attribution", "graft", heading="What a part of the change recovers")
def chart_graft(row: Row) -> Figure | str:
    """Recovered effect against the share of the change that is kept, and against the harm to other text.

    Args:
        row: Of the analysis ``change_attribution``.

    Returns:
        The figure, or that no grafts were tried.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> point = {"method": "attribution", "share": 0.1, "factor": 1, "recovered": 0.8, "low": 0.7, "high": 0.9}
        >>> figure = chart_graft({"result": {"graft": {"points": [{**point, "harm": None, "on_frontier": False}]}}})
        >>> figure.data["points_0"]["y"]
        [0.8]
    """
    points = [point for point in graft_points(row) if _is_shown(point)]
    if not points:
        return "No grafts were tried."
    methods = list(dict.fromkeys(point["method"] for point in points))
    series = {}
    for method in methods:
        own = sorted((p for p in points if p["method"] == method), key=lambda p: p["share"])
        if method not in ("interpolation", "finetune"):
            columns = {name: [p[name] for p in own] for name in ("recovered", "low", "high")}
            for name, end in (("low", min), ("high", max)):
                columns[name] = [end(p["draws"]) if len(p.get("draws") or ()) > 1 else p[name] for p in own]
            shares = [100 * p["share"] for p in own]
            series[_label(method)] = Line(shares, columns["recovered"], columns["low"], columns["high"])
    style = Lines(x="share of elements kept, percent", y="recovered", scale="linear", whole=False, across="log")
    panels = [lines(series, style)] if series else []
    groups = {
        _label(method): Points(
            [p["harm"] for p in points if p["method"] == method],
            [p["recovered"] for p in points if p["method"] == method],
            [_point_name(p) for p in points if p["method"] == method],
        )
        for method in methods
    }
    if any(point["harm"] is not None for point in points):
        panels.append(scatter(groups, Scatter("harm to other text, nats", "recovered", "graft", size=(420, 300))))
    return arrange(panels, caption=graft_caption(row))


@register_figure("change_attribution", "interactions", heading="Blocks alone and left out")
def chart_interactions(row: Row) -> Figure | str:
    """The exact effect of each block's change alone, and of leaving it out, beside its contribution.

    Args:
        row: Of the analysis ``change_attribution``.

    Returns:
        The figure, or that it was not measured.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> block = {"block": "h.0", "contribution": -0.2, "alone": -0.1, "removed": -0.3}
        >>> result = {"metric": "loss", "total": -0.2, "interactions": [block]}
        >>> chart_interactions({"result": result, "metrics": {"interaction": 0.5}}).data["bars_1"]["value"]
        [-0.2]
    """
    with naming(_LACKS):
        blocks = row["result"].get("interactions", [])
        columns = {
            name: {block["block"]: block[name] for block in blocks} for name in ("alone", "contribution", "removed")
        }
    if not blocks:
        return "Blocks were not measured alone: interactions: true does."
    unit = "nats" if row["result"]["metric"] != "function" else "value"
    labels = {"alone": "its change alone", "contribution": "contribution", "removed": "lost without it"}
    panels = [
        bars(columns[name], Bars(f"{label}, {unit}", colour=place, labels=place == 0))
        for place, (name, label) in enumerate(labels.items())
    ]
    return arrange(panels, columns=len(panels), width=600, caption=interactions_caption(row))


@register_figure("change_attribution", "links", heading="What other masks hold of it")
def chart_links(row: Row) -> Figure | str:
    """The share of the effect inside other masks, beside that inside random masks of their size.

    Args:
        row: Of the analysis ``change_attribution``.

    Returns:
        The figure, or that there were no masks.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> link = {"mask": "golden", "elements": 0.05, "attribution": 0.2, "null": 0.05, "jaccard": 0.1}
        >>> link |= {"null_low": 0.04, "null_high": 0.06, "jaccard_null": 0.03}
        >>> chart_links({"result": {"links": [link]}}).data["bars_0"]["value"]
        [20.0]
    """
    with naming(_LACKS):
        links = row["result"].get("links", [])
        inside = {link["mask"]: 100 * link["attribution"] for link in links}
        null = {link["mask"]: 100 * link["null"] for link in links}
        overlap = {link["mask"]: 100 * link["jaccard"] for link in links}
    if not links:
        return "No other callback found a mask that could be compared."
    panels = [
        bars(inside, Bars("effect inside, %")),
        bars(null, Bars("inside a random mask, %", colour=1, labels=False)),
        bars(overlap, Bars("Jaccard with the strongest, %", colour=2, labels=False)),
    ]
    return arrange(panels, columns=len(panels), width=600, caption=links_caption(row))


@register_table
def units_html(row: Row) -> str:
    """The MLP neurons and the rows of token tables that contribute most; nothing for rows of other analyses.

    Args:
        row: Any; one of change attribution holds ``kinds`` and ``units``.

    Raises:
        ReportError: A unit lacks something.

    Example:
        >>> unit = {"kind": "row", "place": "wte", "top": [[7, -0.25], [3, 0.5]], "words": ["<b>", "of"]}
        >>> page = units_html({"result": {"kinds": [], "metric": "loss", "units": [unit]}})
        >>> page.index("of") < page.index("&lt;b&gt;"), units_html({"result": {}})
        (True, '')
    """
    if not {"kinds", "units"} <= set(row["result"]):
        return ""
    unit, pages = _unit(row), []
    for kind, title, place, named in (
        ("neuron", "MLP neurons that contribute most", "block", "neuron"),
        ("row", "Tokens whose rows contribute most", "table", "token"),
    ):
        with naming(_LACKS):
            found = [
                (value, held["place"], str(number) if words is None else repr(words[index]))
                for held in row["result"]["units"]
                if held["kind"] == kind
                for words in (held.get("words"),)
                for index, (number, value) in enumerate(held["top"])
            ]
        strongest = sorted(found, key=lambda entry: -abs(entry[0]))[:_SHOWN]
        lines = [(where, word, format_number(value)) for value, where, word in strongest]
        pages += [f"<h3>{title}</h3>{texts_html((place, named, unit), lines, numbers_from=2)}"] if lines else []
    return "".join(pages)


def interactions_caption(row: Row) -> str:
    """How much of the change no block makes alone, and where blocks need others most."""
    with naming(_LACKS):
        blocks, share = row["result"]["interactions"], row["metrics"].get("interaction")
        most = max(blocks, key=lambda block: abs(block["removed"] - block["alone"]))
        gap = most["removed"] - most["alone"]
        span, weak = row["result"].get("interaction_interval"), row["result"].get("weak")
    told = f" [{format_percent(span[0])}, {format_percent(span[1])}]" if span and None not in span else ""
    whole = "" if share is None else f"{format_percent(share)}{told} of the change is made by no block alone. "
    return (
        f"{whole}Where blocks do not interact the three agree; most apart in {most['block']}, by {format_number(gap)}, "
        f"what its change and those of other blocks do only together.{f' WEAK: {weak}.' if weak else ''}"
    )


def links_caption(row: Row) -> str:
    """Each mask against chance."""
    with naming(_LACKS):
        told = []
        for link in row["result"]["links"]:
            inside, null, low, high = (
                format_percent(link[name]) for name in ("attribution", "null", "null_low", "null_high")
            )
            shared, chance = format_number(link["jaccard"]), format_number(link["jaccard_null"])
            told.append(
                f"{link['mask']} ({format_percent(link['elements'])} of the elements): {inside}, at random {null} "
                f"[{low}, {high}]; Jaccard {shared}, at random {chance}"
            )
    return f"Share of the effect inside. {'. '.join(told)}. Random masks have as many elements of each tensor."


def places(row: Row) -> dict[tuple[str, str], float]:
    """Contributions by block and kind, in the model's order.

    Raises:
        ReportError: The row lacks them.
    """
    table: dict[tuple[str, str], float] = {}
    with naming(_LACKS):
        for tensor in row["result"]["tensors"]:
            place = (tensor["block"], tensor["kind"])
            table[place] = table.get(place, 0.0) + tensor["contribution"]
    return table


def _place_spans(row: Row) -> dict[tuple[str, str], str]:
    """The intervals of contributions by block and kind, in words; empty where the row has none."""
    with naming(_LACKS):
        return {
            (held["block"], held["kind"]): f"{format_number(held['low'])} to {format_number(held['high'])}"
            for held in row["result"].get("places", ())
            if held["low"] is not None and held["high"] is not None
        }


def _unit(row: Row) -> str:
    with naming(_LACKS):
        return "contribution, nats" if row["result"]["metric"] != "function" else "contribution"


def places_caption(row: Row) -> str:
    """What a reader should see: kinds with their share of the effect and of the elements."""
    with naming(_LACKS):
        total, kinds = row["result"]["total"], row["result"]["kinds"]
        shown = sorted(kinds, key=lambda kind: -kind["contribution"] / total) if total else []
        told = [
            f"{kind['group']} {percent(kind['contribution'] / total)}{_span(kind)} of it with "
            f"{percent(kind['elements'])} of the elements"
            for kind in shown
        ]
        cancels = bool(shown) and shown[0]["contribution"] / total >= 1.005
        weak = f" WEAK: {row['result']['weak']}." if row["result"].get("weak") else ""
    if not told:
        return "Nothing to attribute."
    back = " Parts of opposite sign cancel, so that one is more than the whole." if cancels else ""
    return f"Contributions add up to the change of the metric.{back} {'; '.join(told)}.{weak}"


def _span(kind: Mapping[str, Any]) -> str:
    """The interval of a kind's share, where the row has one."""
    low, high = kind.get("share_low"), kind.get("share_high")
    return "" if low is None or high is None else f" [{percent(low)}, {percent(high)}]"


def heads_caption(row: Row) -> str:
    """The head that contributes most, with its interval."""
    with naming(_LACKS):
        heads = [
            (value, unit["place"], head, *span)
            for unit in row["result"]["units"]
            if unit["kind"] == "head"
            for head, (value, span) in enumerate(zip(unit["values"], _unit_spans(unit), strict=True))
        ]
        weak = f" WEAK: {row['result']['weak']}." if row["result"].get("weak") else ""
    value, place, head, low, high = max(heads, key=lambda found: abs(found[0]))
    span = f" [{low}, {high}]" if low else ""
    return (
        f"Query and output weights of each head; most by head {head} of {place}, {format_number(value)}{span}."
        f"{_undivided(row)}{weak}"
    )


def _undivided(row: Row) -> str:
    """What of attention's projections is no head's, because no family describes how heads divide it."""
    found = [
        unit["place"]
        for unit in row["result"]["units"]
        if unit["kind"] == "rest" and unit["place"].endswith(".weight") and kind_of(unit["place"]) == "attention"
    ]
    if not found:
        return ""
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f" How heads divide {found[0]}{more} is not described: queries, keys and values are no head's there."


def _unit_spans(unit: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Both ends of each unit's interval in words; empty ones where the row has none."""
    ends = [unit.get(name) or [None] * len(unit["values"]) for name in ("low", "high")]
    return [
        ("", "") if None in span else (format_number(span[0]), format_number(span[1]))
        for span in zip(*ends, strict=True)
    ]


def _has_ranks(unit: Mapping[str, Any]) -> bool:
    """Whether a unit of a row is of neurons with their sums by rank."""
    return unit["kind"] == "neuron" and bool(unit.get("sizes"))


def neurons_caption(row: Row) -> str:
    """How much of what neurons contribute a few of each block make, beside as many that are all alike."""
    with naming(_LACKS):
        units = [unit for unit in row["result"]["units"] if _has_ranks(unit)]
        # Full steps alone, within a twentieth of a block's neurons.
        steps = [max((unit["count"] // 20 + 1).bit_length() - 1, 1) for unit in units]
        inside = math.fsum(sum(unit["ranks"][:step]) for unit, step in zip(units, steps, strict=True))
        count = sum(min((1 << step) - 1, unit["count"]) for unit, step in zip(units, steps, strict=True))
        total, whole = math.fsum(unit["total"] for unit in units), sum(unit["count"] for unit in units)
        sizes = [math.fsum(sum(unit["sizes"][:step]) for unit, step in zip(units, steps, strict=True))]
        sizes.append(math.fsum(sum(unit["sizes"]) for unit in units))
    share = format_percent(sizes[0] / sizes[1]) if sizes[1] else "nothing"
    return (
        "Each block's neurons by the size of what they contribute, from the left: sums over steps that double. "
        f"The {count} strongest of {whole} (as many of each block of one width) have {share} of the sum of all "
        f"sizes, and {format_percent(count / whole)} if all were alike; with their signs they make "
        f"{format_number(inside)} of the {format_number(total)} of all neurons."
    )


def graft_points(row: Row) -> list[Mapping[str, Any]]:
    """The grafts whose effect is known; empty where none was tried.

    Raises:
        ReportError: The row's are broken.
    """
    with naming(_LACKS):
        points = row["result"].get("graft", {"points": []})["points"]
        return [point for point in points if point["recovered"] is not None]


def _is_shown(point: Mapping[str, Any]) -> bool:
    """Whether a graft is near enough to base and finetune to share a figure with the others."""
    return _FARTHEST[0] <= float(point["recovered"]) <= _FARTHEST[1]


def graft_caption(row: Row) -> str:
    """Between what the points lie, and which methods are best in gain against harm."""
    points, graft = graft_points(row), row["result"].get("graft", {})
    weak = "; ".join(graft[name] for name in ("weak", "harm_weak") if graft.get(name))
    best = sorted({_chosen(p["method"]) for p in points if p["on_frontier"] and p["method"] != "finetune"})
    drawn = max((len(p.get("draws") or ()) for p in points), default=0)
    draws = f", of random elements all of {drawn} draws" if drawn > 1 else ""
    far = [point for point in points if not _is_shown(point)]
    told = ", ".join(f"{_label(p['method'])} of {_point_name(p)} ({p['recovered']:.3g})" for p in far)
    left = f" Too far off to be drawn: {told}." if far else ""
    frontier = f" Where nothing else recovers as much with less harm: {', '.join(best)}." if best else ""
    return (
        "Measured on samples that did not choose the elements; bands are 95 % intervals over samples"
        f"{draws}. 0 is the base, 1 the whole finetune.{frontier}{left}{f' WEAK: {weak}.' if weak else ''}"
    )


def _label(method: str) -> str:
    """A method in words; of a mask that was given, its name."""
    return _LABELS.get(method, f"the {method} mask")


def _chosen(method: str) -> str:
    """What a method chose, in words that stand alone."""
    label = _label(method)
    return f"elements {label}" if label.startswith(("by ", "at ")) else label


def _point_name(point: Mapping[str, Any]) -> str:
    if point["method"] == "interpolation":
        return f"{point['factor']:g} of the change"
    return f"{100 * point['share']:.3g} % of the elements"


_CHANGE_ATTRIBUTION = Description(
    title="What carries the change",
    measures=(
        "Which parameters carry what the finetune did to the metric: the gradient integrated along the straight line "
        "from the base, times the change of each element. The parts add up to the whole effect. Grafts test it: the "
        "base with the strongest elements alone, on samples that did not choose them."
    ),
    reading=(
        "Believe a carrier where its graft recovers the effect on held-out samples and random elements and the largest "
        "changes of equal number do not. Where interpolation lies on the frontier and grafts do not, a smaller step "
        "everywhere is the gentler finetune, however sparse the carriers are."
    ),
    headline=("share_for_95", "effect", "gap", "harm"),
    metrics={
        "effect": "the metric now less at the base, nats",
        "base_value": "the metric at the base, nats",
        "value": "the metric now, nats",
        "gap": "how far the parts are from adding up to the change, a fraction of it",
        "n_nodes": "nodes of the quadrature",
        "interaction": "part of the effect that no block's change makes alone, a fraction; 0 where blocks add up",
        "inside": "part of the effect inside this callback's mask, a fraction",
        "inside_null": "the same inside a random mask with as many elements of each tensor",
        "share": "part of the effect that this kind of parameter carries, a fraction",
        "share_for_95": "smallest share of the elements tried that recovers 95 % of the effect on held-out samples",
        "share_for_50": "smallest share tried that recovers half of it",
        "magnitude_share_for_50": "smallest share of the largest changes that recovers half of it",
        "interpolated_half": "what half of the change everywhere recovers, a fraction",
        "harm": "loss on other text less that of the base, nats",
    },
    method=(
        "The change of the metric was divided among the parameters by integrating its gradient along the straight "
        "line from the base (integrated gradients, Sundararajan et al. 2017, arXiv 1703.01365), and checked by grafts "
        "on held-out samples (Panigrahi et al. 2023, arXiv 2302.06600)."
    ),
)
describe("change_attribution", _CHANGE_ATTRIBUTION)
