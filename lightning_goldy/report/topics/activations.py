"""What a finetune left in the residual stream: how far it moved by layer, the words that this spells, steered texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_goldy.report.builders import Line, Lines, arrange, heads_style, heat_map, lines
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.figures import Figure, Row, naming, register_figure, register_table
from lightning_goldy.report.formatting import format_number, texts_html

_LACKS = "a row of activation_differences lacks what its figure needs:"
_SHOWN = 10


@register_figure("activation_differences", "layers", heading="How far the residual stream moved")
def chart_stream_change(row: Row) -> Figure:
    """By layer the norm of the mean difference against its null, and the agreement between two halves of the text.

    Args:
        row: Of the analysis ``activation_differences``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> result = {"layers": [0, 1], "norms": [[0.1], [0.2]], "nulls": [[0.05], [0.04]]}
        >>> chart_stream_change({"result": {**result, "agreements": [[0.9], [1.0]]}}).data["points_0"]["y"]
        [0.1, 0.2, 0.05, 0.04]
    """
    with naming(_LACKS):
        result = row["result"]
        layers = result["layers"]
        spans = result.get("norm_intervals")
        low, high = (None, None) if spans is None else map(list, zip(*spans, strict=True))
        norms, nulls, same = ([values[-1] for values in result[name]] for name in ("norms", "nulls", "agreements"))
    style = Lines(x="block", y="of the stream's norm", scale="auto", height=200)
    upper = lines({"moved": Line(layers, norms, low, high), "another text": Line(layers, nulls, shape="dashed")}, style)
    lower = lines({"agreement": Line(layers, same)}, Lines(x="block", y="cosine of two halves", zero=True, height=120))
    return arrange([upper, lower], caption=stream_caption(row))


@register_figure("activation_differences", "positions", heading="Positions alike")
def chart_position_cosines(row: Row) -> Figure:
    """Cosine between the mean differences at early positions, and of all, after the clearest block.

    Args:
        row: Of the analysis ``activation_differences``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> chart_position_cosines({"result": {"cosines": [[1.0, 0.5], [0.5, 1.0]]}}).data["cells"]["value"]
        [1.0, 0.5, 0.5, 1.0]
    """
    with naming(_LACKS):
        table = row["result"]["cosines"]
    names = [*map(str, range(len(table) - 1)), "all"]
    style = heads_style("cosine", rows="position", columns="position", colours="diverging", cell=(34, 22))
    pairs = ((table[place][other], other, place) for place in range(len(table)) for other in range(place))
    low, first, second = min(pairs)
    caption = (
        f"Least alike are {names[first]} and {names[second]}, with {low:.2f}. Where all are near 1 the finetune added "
        "one direction, whatever the place."
    )
    if not table[-1][-1]:
        caption = "Nothing differs, so that no position is like another."
    return heat_map(table, names, names, style, extent=(-1.0, 1.0), caption=caption)


def stream_caption(row: Row) -> str:
    """What a reader should see: the words that are spelled where the difference is clearest."""
    with naming(_LACKS):
        result = row["result"]
        metrics = row.get("metrics", {})
        layer = metrics.get("clearest_layer")
        entries = [e for e in result.get("spelled", ()) if e["layer"] == layer and e["position"] == -1]
    where = f"Clearest after block {format_number(layer)}. " if layer is not None else ""
    words = [repr(word) for word in entries[0].get("words", ())[:_SHOWN]] if entries else []
    spelled = f"The difference spells {', '.join(words)}." if words else ""
    bands = (
        "The band is the 95 % interval over texts, without what their scatter adds to the norm. "
        if result.get("norm_intervals") is not None
        else ""
    )
    return f"{where}{bands}The difference between two texts is the null: below it nothing is told. {spelled}".strip()


@register_table
def spelled_html(row: Row) -> str:
    """The words by layer, where the models disagree, and steered texts; nothing for rows of other analyses.

    Args:
        row: Any; its result may hold ``spelled``.

    Raises:
        ReportError: One of them lacks something.

    Example:
        >>> entry = {"layer": 3, "position": -1, "promoted": [7], "words": ["<b>"]}
        >>> page = spelled_html({"result": {"spelled": [entry], "divergent": []}})
        >>> "&lt;b&gt;" in page, spelled_html({"result": {}})
        (True, '')
    """
    result = row["result"]
    if "spelled" not in result:
        return ""
    with naming(_LACKS):
        every = [e for e in result["spelled"] if e["position"] == -1]
        spelled = [(str(e["layer"]), "  ".join(map(_shown, e.get("words", e["promoted"])))) for e in every]
        divergent = _places_apart(result["divergent"])[:_SHOWN]
        texts = [
            (t["state"], t["prompt"], t["plain"], t["steered"], f"{t['strength']:g}")
            for t in result.get("steering", {"texts": ()})["texts"]
        ]
    tables = (
        ("What the mean difference spells", ("block", "most promoted tokens"), spelled, None),
        ("Where the models disagree most", ("text", "base says", "now says", "KL, nats"), divergent, 3),
        ("Steered texts", ("model", "prompt", "plain", "steered", "strength"), texts, 4),
    )
    return "".join(
        f"<h3>{title}</h3>{texts_html(headings, lines, numbers_from=numbers)}"
        for title, headings, lines, numbers in tables
        if lines
    )


def _places_apart(divergent: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Text, both tokens and the divergence of each place; places that read the same are one line."""
    found: dict[tuple[str, ...], list[float]] = {}
    for place in divergent:
        words = map(_shown, place.get("words", (place["base"], place["now"])))
        found.setdefault((str(place.get("text", place["context"])), *words), []).append(place["kl"])
    return [
        (f"{words[0]} ({len(sizes)} places)" if len(sizes) > 1 else words[0], *words[1:], f"{max(sizes):.3g}")
        for words, sizes in found.items()
    ]


def _shown(token: Any) -> str:
    return repr(token) if isinstance(token, str) else str(token)


_ACTIVATION_DIFFERENCES = Description(
    title="What the finetune left in the activations",
    measures=(
        "The mean difference of the residual streams of the model and its base on text that has nothing to do with the "
        "finetune, over all positions but the first, read through the final norm and the unembedding as tokens."
    ),
    reading=(
        "Where the difference stands above its null and both halves of the text agree, the finetune added a constant "
        "trace; its words say what the finetune was about. Below the null, the words say nothing."
    ),
    metrics={
        "stream_change": "norm of the mean difference over the stream's norm, where it is clearest, a fraction",
        "stream_null": "the same between two texts in the base, a fraction",
        "half_agreement": "cosine between the mean differences of two halves of the text",
        "clearest_layer": "block after which the difference stands farthest above its null",
        "kl_from_base": "KL(p_base || p) on the unrelated text, nats",
    },
    headline=("stream_change", "kl_from_base"),
    method=(
        "Mean differences of the residual stream to the base on unrelated text were read through the unembedding "
        "(Minder et al. 2025, arXiv 2510.13900), beside the differences of two halves of that text."
    ),
)
describe("activation_differences", _ACTIVATION_DIFFERENCES)
