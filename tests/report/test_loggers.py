from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_goldy.report.figures import Figure
from lightning_goldy.report.loggers import _tell_once, _warned, log_figure, log_histogram, log_scalars, log_text
from lightning_goldy.report.topics.golden import chart_golden_parameters

Build = Callable[..., dict[str, Any]]


class BoardLogger:
    def __init__(self, directory: Path) -> None:
        self.experiment = SummaryWriter(str(directory))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.experiment.add_scalar(name, value, step)

    def read(self) -> Any:
        self.experiment.close()
        accumulator = EventAccumulator(self.experiment.log_dir, size_guidance={"scalars": 0, "images": 0})
        accumulator.Reload()
        return accumulator


class TableLogger:
    """Takes scalars only, as the CSV logger."""

    def __init__(self) -> None:
        self.experiment = SimpleNamespace()
        self.metrics: list[Any] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.metrics.append((step, metrics))


class ImageLogger(TableLogger):
    """Takes images, as the Weights & Biases logger."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Any] = []

    def log_image(self, key: str, images: list[Image.Image], step: int | None = None) -> None:
        self.images.append((key, [image.size for image in images], step))


class ArtifactLogger(TableLogger):
    """Keeps images as files of a run, as MLflow."""

    run_id = "abc"

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Any] = []
        self.experiment = SimpleNamespace(log_image=self._take)

    def _take(self, run_id: str, image: Image.Image, artifact_file: str) -> None:
        self.images.append((run_id, image.size, artifact_file))


class NamedLogger(TableLogger):
    """Takes images by name, as Comet."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Any] = []
        self.experiment = SimpleNamespace(
            log_image=lambda image_data, name, step: self.images.append((name, image_data.size, step))
        )


class PixelLogger(TableLogger):
    """A writer that takes pixels and no events."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Any] = []
        self.experiment = SimpleNamespace(
            add_image=lambda tag, pixels, global_step, dataformats: self.images.append((tag, pixels.shape, global_step))
        )


@pytest.fixture(autouse=True)
def _told_nothing() -> None:
    _tell_once.cache_clear()
    _warned.clear()


@pytest.fixture
def board(tmp_path: Path) -> BoardLogger:
    return BoardLogger(tmp_path)


def test_scalars_reach_every_logger_without_those_that_do_not_exist(board: BoardLogger) -> None:
    table = TableLogger()
    log_scalars([board, table], {"goldy/count": 3, "goldy/jaccard": None, "goldy/norm": math.nan}, 7)
    step, metrics = table.metrics[0]
    assert step == 7
    assert list(metrics) == ["goldy/count", "goldy/norm"]
    assert all(isinstance(value, float) for value in metrics.values())
    accumulator = board.read()
    assert [(event.step, event.value) for event in accumulator.Scalars("goldy/count")] == [(7, 3.0)]
    assert math.isnan(accumulator.Scalars("goldy/norm")[0].value)


def test_nothing_is_logged_when_no_metric_exists() -> None:
    table = TableLogger()
    log_scalars([table], {"goldy/jaccard": None}, 7)
    assert table.metrics == []


def size_of(png: bytes) -> tuple[int, int]:
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def test_a_figure_becomes_an_image_in_tensorboard(board: BoardLogger, golden_row: Build) -> None:
    figure = chart_golden_parameters(golden_row())
    assert log_figure([board], "goldy/golden/density", figure, 7) == []
    (image,) = board.read().Images("goldy/golden/density")
    assert (image.step, image.width, image.height) == (7, *size_of(figure.png()))
    assert image.encoded_image_string == figure.png()


def test_every_logger_gets_a_figure_in_its_own_way(golden_row: Build) -> None:
    images, artifacts, named, pixels = ImageLogger(), ArtifactLogger(), NamedLogger(), PixelLogger()
    figure = chart_golden_parameters(golden_row())
    size = size_of(figure.png())
    assert log_figure([images, artifacts, named, pixels], "goldy/density", figure, 7) == []
    assert images.images == [("goldy/density", [size], 7)]
    assert artifacts.images == [("abc", size, "goldy/density/step=00000007.png")]
    assert named.images == [("goldy/density", size, 7)]
    assert pixels.images == [("goldy/density", (size[1], size[0], 4), 7)]


def test_a_figure_is_drawn_once_and_only_for_who_takes_it(board: BoardLogger, golden_row: Build) -> None:
    drawn = []

    class Counted:
        def png(self) -> bytes:
            drawn.append(1)
            return chart_golden_parameters(golden_row()).png()

    figure: Any = Counted()
    assert log_figure([TableLogger()], "goldy/density", figure, 1) == ["TableLogger"]
    assert drawn == []
    log_figure([board, ImageLogger()], "goldy/density", figure, 1)
    assert drawn == [1]


def test_figures_of_other_libraries_are_refused_with_what_to_give(board: BoardLogger) -> None:
    figure: Any = SimpleNamespace(savefig=None)
    with pytest.raises(TypeError, match=r"'goldy/any' is a types.SimpleNamespace; .* register_figure"):
        log_figure([board], "goldy/any", figure, 1)


def test_loggers_without_figures_are_named_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    loggers = [TableLogger(), SimpleNamespace()]
    with caplog.at_level(logging.WARNING):
        assert log_figure(loggers, "goldy/density", Figure({"mark": "point"}), 1) == ["TableLogger", "SimpleNamespace"]
        assert log_figure(loggers, "goldy/density", Figure({"mark": "point"}), 2) == ["TableLogger", "SimpleNamespace"]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert told[0].startswith("TableLogger cannot take figures")


def test_a_logger_is_warned_of_once_for_all_that_it_cannot_take(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_figure([TableLogger()], "goldy/density", Figure({"mark": "point"}), 1)
        log_histogram([TableLogger()], "goldy/change", [1.0], 1)
        log_text([TableLogger()], "goldy/answers", "text", 1)
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "INFO", "INFO"]


def test_texts_reach_loggers_that_keep_tables_or_files() -> None:
    tables, files = ImageLogger(), ArtifactLogger()
    kept: list[Any] = []
    tables.log_text = lambda key, columns, data, step: kept.append((key, data, step))  # type: ignore[attr-defined]
    files.experiment.log_text = lambda run_id, text, artifact_file: kept.append((run_id, text, artifact_file))
    assert log_text([tables, files, TableLogger()], "goldy/answers", "**moved**", 7) == ["TableLogger"]
    assert kept == [("goldy/answers", [["**moved**"]], 7), ("abc", "**moved**", "goldy/answers/step=00000007.md")]


def test_a_histogram_of_bins_keeps_its_counts(board: BoardLogger) -> None:
    table = TableLogger()
    assert log_histogram([board, table], "goldy/change", ([-3.0, -2.0, -1.0], [4, 1]), 7) == ["TableLogger"]
    (event,) = board.read().Histograms("goldy/change")
    value = event.histogram_value
    assert event.step == 7
    assert (value.min, value.max, value.num) == (-3.0, -1.0, 5)
    assert value.bucket_limit == [-2.0, -1.0]
    assert value.bucket == [4.0, 1.0]
    assert value.sum == pytest.approx(4 * -2.5 - 1.5)
    assert value.sum_squares == pytest.approx(4 * 2.5**2 + 1.5**2)


def test_a_histogram_of_values_is_binned_by_tensorboard(board: BoardLogger) -> None:
    assert log_histogram([board], "goldy/change", np.array([1.0, 2.0, 2.0]), 7) == []
    (event,) = board.read().Histograms("goldy/change")
    assert (event.histogram_value.num, event.histogram_value.sum) == (3, 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (([1.0, 2.0], [1, 2]), "2 edges and 2 counts"),
        (([2.0, 1.0], [1]), "ascending"),
        (([1.0, math.inf], [1]), "finite"),
        (([1.0], []), "1 edges and 0 counts"),
        ([], "'goldy/change' has no values"),
    ],
)
def test_bad_histograms_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_histogram([], "goldy/change", values, 1)


def test_lightnings_own_loggers_are_understood(tmp_path: Path, golden_row: Build) -> None:
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    board, table = TensorBoardLogger(str(tmp_path)), CSVLogger(str(tmp_path), name="table")
    log_scalars([board, table], {"goldy/count": 3}, 7)
    assert log_figure([board, table], "goldy/density", chart_golden_parameters(golden_row()), 7) == ["CSVLogger"]
    assert log_histogram([board, table], "goldy/change", ([0.0, 1.0], [2]), 7) == ["CSVLogger"]
    board.finalize("success")
    tags = EventAccumulator(board.log_dir).Reload().Tags()
    assert "goldy/count" in tags["scalars"]
    assert tags["images"] == ["goldy/density"]
    assert tags["histograms"] == ["goldy/change"]
