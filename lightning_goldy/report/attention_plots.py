"""Attention as matplotlib figures: rows for the loggers, and recorded patterns for notebooks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_goldy.report.attentions import (
    SHARES,
    TITLES,
    drift_caption,
    heads_by_statistic,
    heads_caption,
    patterns,
    patterns_caption,
    spectra,
    spectra_caption,
)
from lightning_goldy.report.plots import blank_figure, register_plot, write_heading, write_titles
from lightning_goldy.report.registry import ReportError, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_goldy.analysis.attention import AttentionMaps

# Told apart with every kind of colour vision (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
# Beyond these, token names would overlap.
_MOST_NAMES = 40


@register_plot("attention_tracker", "heads")
def plot_attention_heads(row: Row) -> Figure:
    """A heat map of layers and heads for every statistic.

    Args:
        row: Of the analysis ``attention_tracker``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> result = {"statistics": {"entropy": [[0.5, 1.0]], "induction": [[0.1, None]]}}
        >>> figure = plot_attention_heads({"step": 3, "result": result})
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['entropy, nats', 'induction']
    """
    grids = heads_by_statistic(row)
    columns = min(3, len(grids))
    lines = math.ceil(len(grids) / columns)
    layers = next(iter(grids.values())).shape[0]
    # Taller than 30 inches, image plug-ins of the loggers give up.
    figure = blank_figure(3.2 * columns + 0.6, min(30.0, 1.2 + lines * (1.1 + 0.16 * layers)))
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (name, grid) in zip(panels, grids.items(), strict=False):
        top = 1.0 if name in SHARES else None
        image = axes.imshow(np.ma.masked_invalid(grid), aspect="auto", cmap="viridis", vmin=0, vmax=top)
        axes.set_title(TITLES.get(name, name), fontsize=9, parse_math=False)
        axes.set_facecolor("0.92")
        axes.tick_params(labelsize=7)
        axes.locator_params(integer=True, nbins=6)
        figure.colorbar(image, ax=axes).ax.tick_params(labelsize=7)
    for axes in panels[len(grids) :]:
        axes.set_visible(False)
    write_heading(figure, f"Attention heads, step {row['step']}", f"{heads_caption(row)} {_drift_words(row)}".strip())
    return figure


@register_plot("attention_tracker", "patterns")
def plot_attention_prompts(row: Row) -> Figure:
    """What the chosen heads attend to on the prompts, and beside it the difference to the base where there is one.

    Args:
        row: Of the analysis ``attention_tracker``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> found = {"layer": 0, "head": 1, "weights": [[1.0]], "base": None}
        >>> prompt = {"name": "probe", "tokens": ["$a"], "maps": [found]}
        >>> plot_attention_prompts({"step": 3, "result": {"prompts": [prompt]}}).axes[0].get_title()
        'probe: layer 0, head 1'
    """
    shown = patterns(row)
    if not shown:
        raise ReportError("'result.prompts' holds no pattern")
    columns = 2 if any(each.change is not None for each in shown) else 1
    figure = blank_figure(1.0 + 4.6 * columns, min(30.0, 1.0 + 3.9 * len(shown)))
    panels = figure.subplots(len(shown), columns, squeeze=False)
    for line, each in zip(panels, shown, strict=True):
        title = f"{each.prompt}: layer {each.layer}, head {each.head}"
        _pattern(figure, line[0], each.weights, each.tokens, title)
        if each.change is not None:
            # Its rows are those of the panel beside it.
            _pattern(figure, line[1], each.change, each.tokens, "minus the base", signed=True, rows=False)
        elif columns == 2:
            line[1].set_visible(False)
    write_heading(figure, f"What heads attend to, step {row['step']}", patterns_caption(row))
    return figure


@register_plot("attention_tracker", "singular_values")
def plot_attention_spectra(row: Row) -> Figure:
    """The largest singular values of the patterns over the run, one panel per prompt.

    Args:
        row: Of the analysis ``attention_tracker``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> line = {"prompt": "probe", "steps": [0, 5], "values": [[2.0, 1.0], [2.5, None]]}
        >>> figure = plot_attention_spectra({"step": 5, "result": {"spectra": [line]}})
        >>> [each.get_label() for each in figure.axes[0].lines]
        ['1', '2']
    """
    groups = spectra(row)
    figure = blank_figure(7.0, min(30.0, 1.6 + 2.4 * len(groups)))
    panels = figure.subplots(len(groups), sharex=True, squeeze=False)[:, 0]
    for axes, group in zip(panels, groups, strict=True):
        for index, values in enumerate(group.values.T):
            colour = _COLOURS[index % len(_COLOURS)]
            axes.plot(group.steps, values, marker="o", markersize=3, color=colour, label=str(index + 1))
        axes.set_ylabel(group.prompt, parse_math=False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="singular value", fontsize=8, title_fontsize=8, loc="outside right upper")
    panels[-1].set_xlabel("optimizer step")
    if len({step for group in groups for step in group.steps}) == 1:
        # One checkpoint alone: an axis around it would tell nothing.
        panels[-1].set_xticks(groups[0].steps)
    write_titles(panels[0], f"Spectra of attention, up to step {row['step']}", spectra_caption(row), 80)
    return figure


def plot_attention(maps: AttentionMaps, layer: int, head: int, *, sample: int = 0) -> Figure:
    """What one head attends to, with token names.

    Args:
        maps: Recorded patterns.
        layer: One of those recorded.
        head: From 0.
        sample: Row of the batch.

    Raises:
        IndexError: There is no such layer, head or sample.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from lightning_goldy.analysis.attention.statistics import AttentionMaps
        >>> maps = AttentionMaps((0,), (torch.eye(2)[None, None],), torch.ones(1, 2, dtype=torch.bool), (("a", "b"),))
        >>> [label.get_text() for label in plot_attention(maps, 0, 0).axes[0].get_yticklabels()]
        ['a', 'b']
    """
    weights = maps.pattern(layer, head, sample=sample).double().numpy()
    figure = blank_figure(5.4, 4.8)
    _pattern(figure, figure.add_subplot(), weights, maps.token_names(sample), f"layer {layer}, head {head}")
    return figure


def plot_attention_difference(
    maps: AttentionMaps, base: AttentionMaps, layer: int, head: int, *, sample: int = 0
) -> Figure:
    """One head's pattern, the base's, and their difference.

    Args:
        maps: Recorded patterns.
        base: Those of the base model on the same batch.
        layer: One of those recorded.
        head: From 0.
        sample: Row of the batch.

    Raises:
        ValueError: The two are of different prompts.
        IndexError: There is no such layer, head or sample.
        ImportError: matplotlib is not installed.
    """
    names = maps.token_names(sample)
    if base.token_names(sample) != names:
        raise ValueError("the patterns and the base's are of different prompts")
    now, before = (each.pattern(layer, head, sample=sample).double().numpy() for each in (maps, base))
    figure = blank_figure(14.0, 4.8)
    left, middle, right = figure.subplots(1, 3)
    _pattern(figure, left, before, names, f"base: layer {layer}, head {head}")
    _pattern(figure, middle, now, names, f"layer {layer}, head {head}", rows=False)
    _pattern(figure, right, now - before, names, "minus the base", signed=True, rows=False)
    return figure


def plot_attention_grid(maps: AttentionMaps, *, sample: int = 0, base: AttentionMaps | None = None) -> Figure:
    """All recorded heads at once: a row of panels per layer, a panel per head.

    Args:
        maps: Recorded patterns.
        sample: Row of the batch.
        base: Those of the base model on the same batch; the differences are then shown.

    Raises:
        IndexError: There is no such sample.
        ImportError: matplotlib is not installed.
    """
    columns = max(pattern.shape[1] for pattern in maps.patterns)
    figure = blank_figure(min(30.0, 0.6 + 1.1 * columns), min(30.0, 0.8 + 1.15 * len(maps.layers)))
    panels = figure.subplots(len(maps.layers), columns, squeeze=False)
    style: dict[str, Any] = {"cmap": "viridis", "vmin": 0, "vmax": 1}
    if base is not None:
        style = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}
    for axes in panels.flatten():
        axes.set_visible(False)
    for layer, head in maps.heads:
        values = maps.pattern(layer, head, sample=sample)
        if base is not None:
            values = values - base.pattern(layer, head, sample=sample)
        axes = panels[maps.layers.index(layer), head]
        axes.set_visible(True)
        axes.imshow(values.double().numpy(), interpolation="nearest", **style)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"{layer}.{head}", fontsize=7, pad=2)
    return figure


def _pattern(
    figure: Figure,
    axes: Axes,
    weights: NDArray[np.float64],
    tokens: Sequence[str],
    title: str,
    *,
    signed: bool = False,
    rows: bool = True,
) -> None:
    extent = max(float(np.abs(weights).max()), 1e-4) if signed else 1.0
    style: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -extent} if signed else {"cmap": "viridis", "vmin": 0}
    image = axes.imshow(weights, interpolation="nearest", vmax=extent, **style)
    axes.set_title(title, fontsize=9, parse_math=False)
    if len(tokens) <= _MOST_NAMES:
        size = 7 if len(tokens) <= 24 else 5
        # Names may hold a dollar sign, which matplotlib would read as mathematics.
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=size, parse_math=False)
        if rows:
            axes.set_yticks(range(len(tokens)), tokens, fontsize=size, parse_math=False)
        else:
            axes.set_yticks([])
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)


def _drift_words(row: Row) -> str:
    return drift_caption(row) if "drift" in heads_by_statistic(row) else ""
