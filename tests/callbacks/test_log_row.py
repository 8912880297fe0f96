from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_goldy.callbacks.engine import store
from lightning_goldy.report import figures, rendering

HISTOGRAM = {"edges": [-3.0, -2.0, -1.0], "counts": [4, 1], "zero": 5}
TENSORS = [{"name": "h.0.w", "block": "h.0", "kind": "mlp", "base_norm": 2.0, "delta_norm": 0.5}]
ROW = {
    "analysis": "golden_snapshot",
    "name": "golden_snapshot",
    "step": 3,
    "metrics": {},
    "cost": {},
    "result": {"tensors": TENSORS, "histogram": HISTOGRAM},
}


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    logger = SimpleNamespace(experiment=SummaryWriter(str(tmp_path)), log_metrics=lambda metrics, step: None)
    return SimpleNamespace(loggers=[logger], global_step=3, optimizers=[None])


def images_of(trainer: Any) -> list[str]:
    writer = trainer.loggers[0].experiment
    writer.close()
    return EventAccumulator(writer.log_dir).Reload().Tags()["images"]


def test_every_figure_of_a_row_becomes_an_image(trainer: Any) -> None:
    store.log_row(trainer, ROW, {})
    prefix = "goldy/golden_snapshot/figure"
    assert images_of(trainer) == [f"{prefix}/relative_change", f"{prefix}/change_histogram"]


def test_a_figure_that_cannot_be_drawn_is_told_and_ends_nothing(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rendering._RENDERER.close()
    monkeypatch.setattr(rendering, "_CHILD", "import sys; sys.exit(3)")
    with pytest.warns(
        UserWarning, match="figure '.*' of golden_snapshot at step 3 is not logged: .* died twice"
    ) as told:
        store.log_row(trainer, ROW, {})
    assert len(told) == 2
    assert images_of(trainer) == []


def test_nothing_is_drawn_for_loggers_that_take_no_figures(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(store, "draw_figures", lambda *_, **__: drawn.append(1) or {})
    table = SimpleNamespace(experiment=None, log_metrics=lambda metrics, step: None)
    store.log_row(SimpleNamespace(loggers=[table], global_step=3, optimizers=[None]), ROW, {})
    assert drawn == []
    store.log_row(SimpleNamespace(loggers=[table, *trainer.loggers], global_step=3, optimizers=[None]), ROW, {})
    assert drawn == [1]


@pytest.mark.parametrize("module", ["altair", "vl_convert"])
def test_what_is_missing_is_told_once(trainer: Any, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setattr(store, "_told", set())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.warns(UserWarning, match="figures are not logged: figures need .*lightning-goldy.report."):
        store.log_row(trainer, ROW, {})
    # Warnings are errors here.
    store.log_row(trainer, ROW, {})
    assert images_of(trainer) == []


@pytest.mark.parametrize(
    "figure",
    [
        lambda row: 1 / 0,
        lambda row: figures.Figure({"mark": "point"}, {"a": {"b": [1.0]}}, ranges={"x": (float("nan"), 1.0)}),
        lambda row: {"no": "figure"},
    ],
)
def test_a_faulty_figure_of_a_user_is_told_and_the_others_are_logged(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, figure: Any
) -> None:
    entry = figures.Entry("faulty", "Faulty", "step", (), figure)
    monkeypatch.setitem(figures.FIGURES["golden_snapshot"], "faulty", entry)
    with pytest.warns(UserWarning, match="figure 'faulty' of golden_snapshot at step 3 is not logged"):
        store.log_row(trainer, ROW, {})
    assert len(images_of(trainer)) == 2


def test_numbers_of_numpy_are_drawn() -> None:
    figure = figures.Figure({"mark": "point"}, {"a": {"b": [np.float32(0.5), np.int64(2), None, np.nan]}})
    assert figure.spec()["datasets"]["a"] == [{"b": 0.5}, {"b": 2}, {"b": None}, {"b": None}]
