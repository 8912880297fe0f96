"""What the report says outside of its page: on the console and in TensorBoard."""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lightning_goldy.callbacks import AttentionTracker, GoldenParameters, GoldenSnapshot, RunReport, TaylorDiff
from lightning_goldy.report.answers import _SPEAKERS, answers_of, answers_table
from lightning_goldy.report.formatting import show
from lightning_goldy.report.loggers import _tell_once, _warned
from tests.callbacks.training import Finetune, TokenData, fit


def test_answers_are_told_on_the_console_and_in_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = TensorBoardLogger(tmp_path, name="run", version="a")
    trainer = L.Trainer(
        max_steps=4,
        logger=logger,
        callbacks=[GoldenSnapshot(every_n_steps=2), RunReport()],
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Finetune(), datamodule=TokenData())
    told = capsys.readouterr().out
    assert "What did this finetune change?" in told
    assert "not measured" in told
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0}).Reload()
    texts = {tag: [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)] for tag in TEXTS}
    (whole,) = texts["goldy/answers/text_summary"]
    assert whole.startswith("**Which parameters carry it?** The weights moved by ")
    assert "*(weak. " in whole
    each = texts["goldy/answers/golden_snapshot/text_summary"]
    assert len(each) == 2
    assert each[0] != each[1] == whole
    charts = charts_of(logger.log_dir)
    assert set(charts) == {f"golden_snapshot: {name}" for name in ("delta_norm", "relative_change")}


def charts_of(folder: str) -> dict[str, list[str]]:
    """The tags of each chart of a run, as TensorBoard would draw them; none has more than one."""
    events = EventAccumulator(folder, size_guidance={"tensors": 0, "scalars": 0}).Reload()
    scalars = events.Tags()["scalars"]
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    charts = [chart for category in layout.category for chart in category.chart]
    patterns = {chart.title: list(chart.multiline.tag) for chart in charts}
    assert len(patterns) == len(charts)
    assert all(category.chart for category in layout.category)
    return {title: [tag for tag in scalars if re.match(of, tag)] for title, (of,) in patterns.items()}


class Late(GoldenSnapshot):
    """Whose second headline has no value at first."""

    def describe(self, result, context):
        row = super().describe(result, context)
        hidden = {"relative_change": None} if context.step < 3 else {}
        return replace(row, metrics={**row.metrics, **hidden})


def watched(folder: Path, callbacks: list[L.Callback], max_steps: int = 4) -> TensorBoardLogger:
    logger = TensorBoardLogger(folder, name="run", version="a")
    trainer = L.Trainer(
        max_steps=max_steps,
        logger=logger,
        callbacks=callbacks,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Finetune(), datamodule=TokenData())
    return logger


@pytest.mark.filterwarnings("ignore:.*volume")
def test_each_chart_of_the_layout_has_a_line(tmp_path: Path) -> None:
    callbacks = [
        GoldenSnapshot(track_updates=True, every_n_steps=1),
        TaylorDiff(n_samples=4, every_n_steps=2),
        GoldenParameters(n_samples=4, control=False),
        AttentionTracker(n_samples=4),
        RunReport(),
    ]
    logger = watched(tmp_path, callbacks)
    charts = charts_of(logger.log_dir)
    assert all(charts.values()), charts
    told = {title.partition(": ")[2] for title in charts if title.startswith("golden_snapshot")}
    assert told == {"delta_norm", "relative_change", "update_cosine"}
    # Neither has a control been asked for, nor is there an earlier mask.
    golden = {title.partition(": ")[2] for title in charts if title.startswith("golden_parameters")}
    assert "over_null" in golden
    assert not golden & {"control_count", "jaccard_previous"}
    _, columns, latest = table_of_hyperparameters(logger.log_dir)
    assert set(columns) <= set(latest)
    assert columns[:2] == ["goldy/golden_snapshot/relative_change", "goldy/taylor_diff/nonlinearity"]


def test_a_headline_that_comes_later_gets_its_chart_then(tmp_path: Path) -> None:
    assert set(charts_of(watched(tmp_path / "two", [Late(every_n_steps=2), RunReport()], 2).log_dir)) == {
        "late: delta_norm"
    }
    assert set(charts_of(watched(tmp_path / "four", [Late(every_n_steps=2), RunReport()], 4).log_dir)) == {
        "late: delta_norm",
        "late: relative_change",
    }


def test_a_run_is_set_beside_earlier_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"compare names .*nowhere, which is no directory of a run"):
        RunReport(compare=[tmp_path / "nowhere"])
    fit(tmp_path / "a", [GoldenSnapshot(), RunReport()], max_epochs=1)
    fit(tmp_path / "b", [GoldenSnapshot(), RunReport(compare=[tmp_path / "a" / "run"])], max_epochs=1)
    page = (tmp_path / "b" / "run" / "comparison.html").read_text(encoding="utf-8")
    assert "b/run minus a/run" in page
    assert not (tmp_path / "a" / "run" / "comparison.html").exists()


def table_of_hyperparameters(folder: str) -> tuple[dict[str, Any], list[str], dict[str, float]]:
    """Parameters, columns and the latest scalars, as TensorBoard's table reads a run."""
    events = EventAccumulator(folder).Reload()
    start = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    whole = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/experiment").plugin_data.content)
    params = {
        name: getattr(value, value.WhichOneof("kind")) for name, value in start.session_start_info.hparams.items()
    }
    columns = [metric.name.tag for metric in whole.experiment.metric_infos]
    return params, columns, {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


def test_runs_can_be_sorted_by_their_headlines_in_tensorboard(tmp_path: Path) -> None:
    module = Finetune()
    module.save_hyperparameters({"optimizer": {"learning_rate": 0.01}})
    loggers = [TensorBoardLogger(tmp_path, name="run", version="a"), CSVLogger(tmp_path, name="csv", version="a")]
    trainer = L.Trainer(
        max_steps=2,
        logger=loggers,
        callbacks=[GoldenSnapshot(every_n_steps=1), RunReport()],
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=TokenData())
    params, columns, latest = table_of_hyperparameters(loggers[0].log_dir)
    assert params == {
        "optimizer/learning_rate": 0.01,
        "goldy/base": "GPT2LMHeadModel",
        "goldy/data": "TokenData",
        "goldy/precision": "32-true",
    }
    assert columns == [f"goldy/golden_snapshot/{name}" for name in ("relative_change", "delta_norm")]
    row = json.loads(next(Path(loggers[0].log_dir).rglob("results.jsonl")).read_text().splitlines()[-1])
    for name in columns:
        assert latest[name] == pytest.approx(row["metrics"][name.rpartition("/")[2]])
    assert "hp_metric" not in latest
    settings = yaml.safe_load((tmp_path / "csv" / "a" / "hparams.yaml").read_text())
    assert settings["goldy/data"] == "TokenData"
    assert settings["optimizer"] == {"learning_rate": 0.01}
    # The page of a run of one of them names what it cannot read from a configuration.
    assert yaml.safe_load((tmp_path / "run" / "a" / "hparams.yaml").read_text())["goldy/base"] == "GPT2LMHeadModel"
    assert "<dt>Base</dt><dd>GPT2LMHeadModel<" in (tmp_path / "run" / "a" / "report.html").read_text()


def test_an_answer_that_fails_is_told_and_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_SPEAKERS["robust"], "golden_snapshot", lambda rows: rows[-1]["metrics"]["nothing"])
    callbacks = [GoldenSnapshot(), RunReport()]
    trainer = L.Trainer(
        max_steps=2,
        logger=TensorBoardLogger(tmp_path, name="run", version="a"),
        callbacks=callbacks,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(Finetune(), datamodule=TokenData())
    texts = " ".join(str(warning.message) for warning in told)
    assert "the answer of golden_snapshot at step 2 is not logged: golden_snapshot: its rows do not hold" in texts
    assert "the report could not be written: golden_snapshot: its rows do not hold" in texts
    assert trainer.global_step == 2


TEXTS = ("goldy/answers/text_summary", "goldy/answers/golden_snapshot/text_summary")


def logged_by(tmp_path: Path, logger: Any, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings of a run that two analyses log to one logger."""
    _tell_once.cache_clear()
    _warned.clear()
    with caplog.at_level(logging.WARNING, logger="lightning_goldy"):
        trainer = L.Trainer(
            max_steps=2,
            default_root_dir=tmp_path,
            logger=logger,
            callbacks=[GoldenSnapshot(every_n_steps=1), RunReport()],
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(Finetune(), datamodule=TokenData())
    return [record.getMessage() for record in caplog.records if "cannot take" in record.getMessage()]


def test_a_logger_that_takes_only_numbers_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(logged_by(tmp_path, CSVLogger(tmp_path), caplog)) == 1


def test_weights_and_biases_gets_what_it_can_show(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    assert len(logged_by(tmp_path, logger, caplog)) <= 1
    assert logger.experiment.config["goldy/precision"] == "32-true"
    assert logger.experiment.summary["goldy/golden_snapshot/delta_norm"] > 0
    assert list(tmp_path.rglob("media/images/goldy/golden_snapshot/figure/relative_change_*.png"))
    assert list(tmp_path.rglob("media/table/goldy/answers*.table.json"))


def test_mlflow_gets_what_it_can_show(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from lightning.pytorch.loggers import MLFlowLogger

    # Its later versions call the file store legacy.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlruns")
    assert len(logged_by(tmp_path, logger, caplog)) <= 1
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.params["goldy/precision"] == "32-true"
    assert run.data.metrics["goldy/golden_snapshot/delta_norm"] > 0
    assert list(tmp_path.rglob("goldy/golden_snapshot/figure/relative_change/step=*.png"))
    assert list(tmp_path.rglob("goldy/answers/step=*.md"))


def test_answers_are_shown_on_a_console_without_their_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", shown)
    rows = [{"step": 4, "metrics": {"relative_change": 0.2, "relative_change/bl\u00f6ck": 0.5}, "result": {}}]
    show(answers_table(answers_of([("norms", "golden_snapshot", rows)])))
    assert b"bl?ck most" in shown.buffer.getvalue()
