"""Circuits: the heads and MLPs that carry a behaviour, what their edges keep of it, and how they came to be."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_goldy.report.builders import HeatMap, Line, Lines, heat_map, lines, plain_spec, rounded
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.figures import Figure, Row, naming, register_figure, require
from lightning_goldy.report.formatting import format_number

_LACKS = "a row of circuit_tracker lacks what its figure needs:"
_EDGES = 120
_NODES = 40


@register_figure("circuit_tracker", "graph", heading="The circuit")
def chart_circuit(row: Row) -> Figure:
    """Nodes from the input (below) to the output, edges as wide as their scores are far from 0, coloured by sign.

    Args:
        row: Of the analysis ``circuit_tracker``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> nodes = [{"name": name, "layer": layer, "score": 1.0, "kept": True} for name, layer in
        ...          (("input", -1), ("a0.h0", 0), ("m0", 0))]
        >>> edge = {"source": "input", "reader": "a0.h0.v", "targets": ["a0.h0"], "score": -0.5}
        >>> figure = chart_circuit({"result": {"nodes": nodes, "edges": [edge], "n_edges_all": 8}})
        >>> figure.data["edges"]["edge"], figure.data["edges"]["does"]
        (['input -> a0.h0.v'], ['works against it'])
    """
    with naming(_LACKS):
        result = row["result"]
        nodes, edges, whole = result["nodes"], result["edges"], result["n_edges_all"]
        strongest = sorted(edges, key=lambda edge: -abs(edge["score"]))[:_EDGES]
        ends = [(edge, target) for edge in strongest for target in edge["targets"]]
        drawn = {"input", "output", *(edge["source"] for edge, _ in ends), *(target for _, target in ends)}
        places = _places(nodes, drawn)
        told: dict[str, list[Any]] = {name: [] for name in ("x", "y", "x2", "y2", "edge", "score", "does", "size")}
        largest = max((abs(edge["score"]) for edge in strongest), default=0.0) or 1.0
        for edge, target in ends:
            for name, value in zip(("x", "y"), places[edge["source"]], strict=True):
                told[name].append(value)
            for name, value in zip(("x2", "y2"), places[target], strict=True):
                told[name].append(value)
            told["edge"].append(f"{edge['source']} -> {edge['reader']}")
            told["score"].append(edge["score"])
            told["does"].append("supports the behaviour" if edge["score"] > 0 else "works against it")
            told["size"].append(abs(edge["score"]) / largest)
        scores = {node["name"]: node["score"] for node in nodes}
    points: dict[str, list[Any]] = {
        "x": [across for across, _ in places.values()],
        "y": [up for _, up in places.values()],
        "node": list(places),
        "score": rounded([scores.get(name, 0.0) for name in places]),
    }
    caption = (
        f"The {len(strongest)} strongest of {len(edges)} chosen edges, of {whole} in all, as wide as what the "
        "behaviour loses without them. The input is below, the output above; heads of a block are in a row (a3.h1: "
        "block 3, head 1), its MLP on the right (m3); blocks without such an edge are left out."
    )
    told = {**told, "score": rounded(told["score"]), "size": rounded(told["size"])}
    return Figure(_graph_chart(), {"edges": told, "nodes": points}, caption)


def _places(nodes: Sequence[Mapping[str, Any]], drawn: set[str]) -> dict[str, tuple[float, float]]:
    """Where each node that is drawn lies: across, and up in rows without gaps."""
    heads: dict[int, list[str]] = {}
    for node in nodes:
        if node["name"].startswith("a"):
            heads.setdefault(node["layer"], []).append(node["name"])
    widest = max(map(len, heads.values()), default=1)
    places = {"input": ((widest - 1) / 2, -1.0)}
    for node in nodes:
        name, layer = node["name"], node["layer"]
        if name.startswith("a"):
            places[name] = (float(heads[layer].index(name)), float(layer))
        elif name != "input":
            # Between the heads of its block and those of the next, which it may read and write.
            places[name] = (widest + 0.5, layer + 0.5)
    places["output"] = ((widest - 1) / 2, max((node["layer"] for node in nodes), default=0) + 1.5)
    shown = {name: place for name, place in places.items() if name in drawn}
    rows = sorted({up for _, up in shown.values()})
    return {name: (across, float(rows.index(up))) for name, (across, up) in shown.items()}


@functools.lru_cache(maxsize=1)
def _graph_chart() -> dict[str, Any]:
    alt = require("altair")
    plain: dict[str, Any] = {"axis": None, "scale": alt.Scale(zero=False, nice=False, padding=24)}
    across, up = (alt.X("x:Q", **plain), alt.X("x2:Q")), (alt.Y("y:Q", **plain), alt.Y("y2:Q"))
    signs = alt.Scale(domain=["supports the behaviour", "works against it"], range=["#dc5f55", "#4a90d0"])
    legend = alt.Legend(title=None, orient="top", symbolType="stroke", symbolStrokeWidth=4, symbolOpacity=1)
    edges = (
        alt.Chart(alt.NamedData("edges"))
        .mark_rule(opacity=0.85)
        .encode(
            x=across[0],
            y=up[0],
            x2="x2:Q",
            y2="y2:Q",
            color=alt.Color("does:N", scale=signs, legend=legend),
            strokeWidth=alt.StrokeWidth("size:Q", scale=alt.Scale(domain=[0, 1], range=[0.5, 6]), legend=None),
            tooltip=[alt.Tooltip("edge:N"), alt.Tooltip("score:Q", format=".4~g")],
        )
    )
    points = alt.Chart(alt.NamedData("nodes")).encode(
        x=across[0], y=up[0], tooltip=[alt.Tooltip("node:N"), alt.Tooltip("score:Q", format=".4~g")]
    )
    marks = points.mark_circle(size=150, color="#7d7f86", opacity=1)
    labels = points.mark_text(dy=-13, fontSize=11).encode(text="node:N")
    return plain_spec(alt.layer(edges, marks, labels), height=460)


@register_figure("circuit_tracker", "faithfulness", heading="What circuits of any size keep")
def chart_faithfulness(row: Row) -> Figure:
    """By the share of edges what the strongest keep of the behaviour, what is left without them, and random circuits.

    Args:
        row: Of the analysis ``circuit_tracker``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> curve = {"sizes": [1, 4], "n_edges": 8, "values": [0.4, 0.9], "complements": [0.5, 0.1],
        ...          "random": [0.0, 0.2], "band": [[-0.1, 0.1], [0.0, 0.4]]}
        >>> chart_faithfulness({"result": {"curve": curve}}).data["points"]["x"][:4]
        [0.0, 12.5, 50.0, 100.0]
    """
    with naming(_LACKS):
        curve = row["result"]["curve"]
        places = [0, *(100 * size / curve["n_edges"] for size in curve["sizes"]), 100]
        drawn = {
            "the circuit": Line(places, [0.0, *curve["values"], 1.0], *_ends(curve)),
            "without it": Line(places, [1.0, *curve["complements"], 0.0], shape="dashed"),
        }
        for name, values, band in (
            ("random circuits", "random", "band"),
            ("random, joined from end to end", "joined", "joined_band"),
            ("the circuit, its heads exchanged", "exchanged", "exchanged_band"),
            ("the circuit, its edges shuffled within layers", "shuffled", "shuffled_band"),
        ):
            if curve.get(values):
                low, high = ([0.0, *(pair[end] for pair in curve[band]), 1.0] for end in (0, 1))
                drawn[name] = Line(places, [0.0, *curve[values], 1.0], low, high)
        for task, values in (curve.get("others") or {}).items():
            drawn[f"circuit of {task}"] = Line(places, [0.0, *values, 1.0], shape="dashed")
    style = Lines(x="edges, % of all", y="of the behaviour", scale="linear", zero=True, whole=False)
    caption = (
        "1 is the whole model, 0 the model with every edge patched. The circuit's band is its 95 % interval over the "
        f"{'prompts that measure and those that chose' if curve.get('wide_intervals') else 'prompts that measure'}; "
        "those of random circuits of the same size hold 90 % of them. Every edge of the joined ones lies on a path "
        "from the input to the output. Exchanged heads are the circuit with each head's edges handed to another head "
        "of its block, shuffled edges the circuit with as many edges drawn anew between the same layers."
    )
    return lines(drawn, style, caption=caption)


def _ends(curve: Mapping[str, Any]) -> tuple[list[float] | None, list[float] | None]:
    """The lower and upper ends of the intervals, with those of none and of all edges; None where there is none."""
    pairs = curve.get("wide_intervals") or curve.get("intervals") or []
    if not pairs or any(None in pair for pair in pairs):
        return None, None
    low, high = ([0.0, *(pair[end] for pair in pairs), 1.0] for end in (0, 1))
    return low, high


@register_figure("circuit_tracker", "emergence", heading="How nodes came to matter", over="run", reads=("nodes",))
def chart_emergence(rows: Sequence[Row]) -> Figure | None:
    """By node and step what the behaviour loses when all that the node tells is patched.

    Args:
        rows: Of the analysis ``circuit_tracker``, ascending.

    Raises:
        ReportError: A row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> nodes = [{"name": "m0", "layer": 0, "score": 1.5, "kept": True}]
        >>> chart_emergence([{"step": 0, "result": {"nodes": nodes}}, {"step": 4, "result": {"nodes": nodes}}]).data
        {'cells': {'y': ['0|m0', '0|m0'], 'x': ['0|0', '1|4'], 'value': [1.5, 1.5]}}
    """
    with naming(_LACKS):
        tables = [{node["name"]: node["score"] for node in row["result"]["nodes"]} for row in rows]
        steps = [row["step"] for row in rows]
    if len(tables) < 2:
        return None
    parts = [name for name in tables[-1] if name != "input"]
    strongest = sorted(parts, key=lambda name: -max(abs(table.get(name, 0.0)) for table in tables))[:_NODES]
    names = [name for name in parts if name in strongest]
    values = [[table.get(name, float("nan")) for table in tables] for name in names]
    style = HeatMap(
        "score",
        rows="node",
        columns="step",
        colours="diverging",
        scale="emergence",
        numbers=False,
        cell=(max(6, min(34, 560 // len(steps))), 13),
        axes=True,
    )
    caption = f"The {len(names)} nodes of {len(parts)} that mattered most at some step; red supports the behaviour."
    return heat_map(values, names, steps, style, caption=caption)


@register_figure("circuit_tracker", "run", heading="Faithfulness and overlap over the run", over="run")
def chart_circuit_run(rows: Sequence[Row]) -> Figure | None:
    """What circuits of fixed sizes keep, and the overlap with the base's circuit, over the steps.

    Args:
        rows: Of the analysis ``circuit_tracker``, ascending.

    Raises:
        ReportError: A row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> rows = [{"step": step, "metrics": {"faithfulness_1_percent": 0.5, "overlap": 1.0}} for step in (0, 4)]
        >>> chart_circuit_run(rows).data["points"]["line"]
        ['1 % of the edges', '1 % of the edges', 'overlap with the base', 'overlap with the base']
    """
    with naming(_LACKS):
        steps = [row["step"] for row in rows]
        names = [name for name in rows[-1]["metrics"] if name.endswith("_percent")] if rows else []
        series = {
            f"{name.removeprefix('faithfulness_').removesuffix('_percent').replace('_', '.')} % of the edges": (
                steps,
                [row["metrics"].get(name) for row in rows],
            )
            for name in names
        }
        if any(row["metrics"].get("overlap") is not None for row in rows):
            series["overlap with the base"] = (steps, [row["metrics"].get("overlap") for row in rows])
    if len(rows) < 2:
        return None
    least = rows[-1]["metrics"].get("overlap_by_chance")
    chance = "" if least is None else f"Chance would give an overlap of {format_number(least)}."
    return lines(series, Lines(y="share", scale="linear", zero=True), caption=chance)


_CIRCUITS = Description(
    title="The circuit that carries the behaviour",
    measures=(
        "Every edge between the heads and MLPs is scored by what the behaviour loses when the edge tells what it would "
        "tell on the other prompt; then the model runs with all but the strongest edges patched so."
    ),
    reading=(
        "A circuit is worth its faithfulness: near 1 with few edges, far above what circuits of its size keep that are "
        "random, or itself with other heads, or another task's, and near 0 without it. Scores alone say little."
    ),
    metrics={
        "faithfulness_low": "lower end of what the largest circuit keeps, of its 95 % interval over the prompts",
        "faithfulness_high": "upper end of the same",
        "faithfulness_random": "what random circuits of the largest size keep, a fraction",
        "faithfulness_joined": "the same of random circuits whose every edge lies on a path from input to output",
        "faithfulness_exchanged": "the same of the circuit with each head's edges handed to another of its block",
        "faithfulness_shuffled": "the same of the circuit with its edges drawn anew between the same layers",
        "faithfulness_other_task": "the same of another task's circuit, the most that one of them keeps",
        "faithfulness_choice_error": "standard error of the same that comes of which prompts chose the edges",
        "completeness": "1 less what is kept without the largest circuit",
        "area": "area under the curve of faithfulness over the share of edges",
        "area_random": "the same of random circuits",
        "area_joined": "the same of random circuits joined from input to output",
        "area_exchanged": "the same of the circuit with exchanged heads",
        "area_shuffled": "the same of the circuit with edges drawn anew between the same layers",
        "metric_clean": "the metric of the model",
        "metric_patched": "the metric with every edge patched",
        "overlap": "edges shared with the base's circuit, of all in either",
        "overlap_by_chance": "the same of random circuits as large",
        "overlap_noise": "edges shared with the circuit of a finetune that differs in its seed alone, of all in either",
        "rank_correlation": "Spearman's, of the magnitudes of all edges' scores now and in the base",
        "node": "what the behaviour loses when all that the node tells is patched, estimated",
    },
    headline=("area", "overlap"),
    method=(
        "Circuits are edges with the largest scores of attribution patching with integrated gradients (Hanna et al. "
        "2024, arXiv 2403.17806); their faithfulness was measured with everything outside patched."
    ),
)
describe("circuit_tracker", _CIRCUITS)
